"""One step: scheduled tokens through the model, and new tokens for requests that have caught up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.request import Request
from fewbits.engine.sampler import sample
from fewbits.errors import FewbitsError
from fewbits.kernels.batch import Batch, Cache
from fewbits.kernels.ops import Ops

Array = NDArray[Any]


class Model(Protocol):
    """What a step needs of a decoder: `forward` returns an object whose `logits` is float32 [R, V]."""

    ops: Ops

    def forward(self, batch: Batch, cache: Cache, taps: Sequence[int] = ()) -> Any: ...


class Outcome(NamedTuple):
    """What a step was for a request: `computed` tokens, the last `drafted` of them a draft, of which the first
    `accepted` stay; and it got so many `tokens`.
    """

    request: Request
    computed: int
    drafted: int
    accepted: int
    tokens: int


class Watcher(Protocol):
    """Who learns from a step, also from the target's states at the layer boundaries `taps`."""

    @property
    def taps(self) -> Sequence[int]: ...

    def watch(self, outcomes: Sequence[Outcome], taps: Sequence[Any]) -> None:
        """`taps` has one [T, H] for each boundary: of all tokens computed, in the order of the outcomes."""


def step(
    model: Model, cache: KVCache, scheduled: Sequence[tuple[Request, int]], watcher: Watcher | None = None
) -> None:
    """Compute `count` tokens of each (request, count): pending ones, then drafted ones. A request that has no pending
    token left gets its next token, and one more for each draft token that is what would have been chosen.

    A request whose logits can't be sampled from gets `error`, the others go on. When the pass itself ends
    with an exception (an interrupt, say), requests and cache are as before.
    """
    begin = time.perf_counter()
    parts = [
        Part(request.sequence, request.next_ids(count), logits=max(count - request.pending + 1, 0))
        for request, count in scheduled
    ]
    try:
        output = model.forward(cache.batch(parts), cache, () if watcher is None else watcher.taps)
        best = model.ops.argmax(output.logits)
    except BaseException:
        for request, _ in scheduled:
            if cache.length(request.sequence):
                cache.truncate(request.sequence, request.computed)
        raise
    row = 0
    outcomes = []
    for (request, count), part in zip(scheduled, parts, strict=True):
        request.started_at = request.started_at or begin
        before, drafted, accepted = request.sampled, max(part.logits - 1, 0), 0
        if part.logits:
            rows = slice(row, row + part.logits)
            row += part.logits
            accepted = _verify(request, request.draft_ids[:drafted], output.logits[rows], best[rows])
            request.draft_ids = []
        request.computed += count - drafted + accepted
        if accepted < drafted:
            cache.truncate(request.sequence, request.computed)
        outcomes.append(Outcome(request, count, drafted, accepted, request.sampled - before))
    if watcher is not None:
        watcher.watch(outcomes, output.taps)


def _verify(request: Request, draft: Sequence[int], logits: Array, best: Array) -> int:
    """Give the request its next token, and as long as that is the next one of the draft, the token behind it. Logits
    are those of the last known token and of each of the draft. Returns how many of the draft were accepted.

    Every token is drawn from the distribution and with the random number that it would be drawn with alone, so drafts
    change neither the distribution nor even the text. Where q is one token, as a draft is, this is rejection sampling
    (Leviathan et al. 2023): a token d is accepted with probability p(d), another comes with p / (1 - p(d)).
    """
    accepted = 0
    for row in range(len(draft) + 1):
        try:
            token = sample(logits[row], int(best[row]), request)
        except FewbitsError as error:
            request.error = error
            break
        request.accept(token, time.perf_counter())
        if row == len(draft) or token != draft[row]:
            break
        accepted += 1
        if request.done:
            break
    request.tell()
    return accepted
