"""One step: scheduled tokens through the model, and a new token for requests that have caught up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.request import Request
from fewbits.engine.sampler import sample
from fewbits.errors import FewbitsError
from fewbits.kernels.batch import Batch, Cache
from fewbits.kernels.ops import Ops


class Model(Protocol):
    """What a step needs of a decoder: `forward` returns an object whose `logits` is float32 [R, V]."""

    ops: Ops

    def forward(self, batch: Batch, cache: Cache, taps: Sequence[int] = ()) -> Any: ...


def step(model: Model, cache: KVCache, scheduled: Sequence[tuple[Request, int]]) -> None:
    """Compute `count` pending tokens of each (request, count); a request without any left gets its next
    token.

    A request whose logits can't be sampled from gets `error`, the others go on. When the pass itself ends
    with an exception (an interrupt, say), requests and cache are as before.
    """
    begin = time.perf_counter()
    parts = [
        Part(request.sequence, request.pending_ids(count), logits=int(count == request.pending))
        for request, count in scheduled
    ]
    try:
        logits = model.forward(cache.batch(parts), cache).logits
        best = model.ops.argmax(logits)
    except BaseException:
        for request, _ in scheduled:
            if cache.length(request.sequence):
                cache.truncate(request.sequence, request.computed)
        raise
    row = 0
    for (request, count), part in zip(scheduled, parts, strict=True):
        request.started_at = request.started_at or begin
        request.computed += count
        if part.logits:
            try:
                request.accept(sample(logits[row], int(best[row]), request), time.perf_counter())
            except FewbitsError as error:
                request.error = error
            row += 1
