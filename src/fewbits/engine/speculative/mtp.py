"""Drafting with a model's own MTP modules.

A single module guesses the tokens behind its first one too, from its own states, as an Eagle3 drafter does. Several
guess one each. Module m at row P takes the token P + m, so behind the newest token n its last m - 1 rows are made of
guesses. These rows are forgotten with the guesses and computed again once the tokens are known; for that each module
keeps what it made of the last row that stays:

    token             … n-2   n-1    n     guess 1   guess 2
    module 1, row P   … n-3   n-2   n-1                        reads the model's states
    module 2, row P   … n-4   n-3   n-2     n-1                reads what module 1 made of the same row
    module 3, row P   … n-5   n-4   n-3     n-2      n-1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.request import Request
from fewbits.engine.speculative.waiting import MOST_WAITING, Waiting, joined
from fewbits.errors import Notice
from fewbits.kernels.batch import CacheLayer
from fewbits.kernels.ops import Ops
from fewbits.models.mtp import MtpModule


@dataclass(slots=True)
class _Sequence(Waiting):
    """Of rows that no module has seen. `last[m]`: what module m made of its last row that stays."""

    last: list[Any] = field(default_factory=list)


class Mtp:
    """`boundary` is that behind the model's last layer; `layers` are what the modules' caches keep, `max_pages` each.
    `norm` is the model's last one, where modules read states behind it.
    """

    def __init__(
        self,
        modules: Sequence[MtpModule],
        boundary: int,
        layers: Sequence[CacheLayer],
        max_pages: int,
        ops: Ops,
        norm: Callable[[Any], Any] | None = None,
    ) -> None:
        self._modules, self._ops, self._norm = modules, ops, norm
        self._caches = [KVCache([layer], max_pages) for layer in layers]
        self._sequences: dict[int, _Sequence] = {}
        self.taps: Sequence[int] = (boundary,)

    def watch(self, request: Request, states: Sequence[Any], new: int) -> None:
        if request.done:
            return
        name, begin = request.sequence, request.computed - new
        sequence = self._sequences.get(name)
        if sequence is None or sequence.end(self._caches[0].length(name)) != begin:
            for cache in self._caches:
                cache.free(name)
            sequence = self._sequences[name] = _Sequence(begin)
        state = states[0][:new]
        sequence.add([state if self._norm is None else self._ops.computed(self._norm(state))], new)
        if sequence.rows > MOST_WAITING:
            self._draft([request], [1])

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        ready = [request for request, _ in wanted.values() if self._follows(request)]
        counts = [wanted[request.sequence][1] for request in ready]
        for request, draft, count in zip(ready, self._draft(ready, counts), counts, strict=True):
            request.draft_ids = draft[:count]

    def _follows(self, request: Request) -> bool:
        sequence = self._sequences.get(request.sequence)
        return sequence is not None and sequence.reaches(self._caches[0].length(request.sequence), request.computed)

    def _draft(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Tokens behind what is known of each request, its count by a single module, or one by each; all rows are
        computed that weren't.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        if not requests:
            return drafts
        sequences = [self._sequences[request.sequence] for request in requests]
        lasts: list[list[Any]] = [[] for _ in requests]
        given = [one.all()[0] for one in sequences]
        begins = [self._caches[0].length(request.sequence) for request in requests]  # the first row of what is given
        ends = [request.computed - one.begin for request, one in zip(requests, sequences, strict=True)]
        lengths = [[cache.length(request.sequence) for request in requests] for cache in self._caches]
        try:
            for number, (module, cache) in enumerate(zip(self._modules, self._caches, strict=True), 1):
                parts, states = [], []
                for index, request in enumerate(requests):
                    begin = cache.length(request.sequence)
                    if begin < begins[index]:  # by one: what the module before made of it was kept
                        given[index] = np.concatenate((sequences[index].last[number - 2], given[index]))
                    first = sequences[index].begin + begin
                    tokens = request.known_ids(first, request.computed + 1) + drafts[index]
                    parts.append(Part(request.sequence, tokens[number : number + ends[index] - begin]))
                    states.append([given[index]])
                    begins[index] = begin
                guess = module.forward(cache.batch(parts), joined(states)[0], cache.layers[0])
                best = self._ops.argmax(guess.logits).tolist()
                row = 0
                for index, part in enumerate(parts):
                    drafts[index].append(best[index])
                    given[index] = guess.states[row : row + len(part.token_ids)]
                    row += len(part.token_ids)
                    kept = ends[index] - number - begins[index]  # the last row that is made of known tokens
                    lasts[index].append(given[index][kept : kept + 1].copy() if kept >= 0 else None)
            if len(self._modules) == 1:
                self._further(requests, drafts, [one[-1:] for one in given], counts)
        except BaseException:
            for cache, before in zip(self._caches, lengths, strict=True):
                for request, length in zip(requests, before, strict=True):
                    if cache.length(request.sequence) > length:
                        cache.truncate(request.sequence, length)
            raise
        for index, request in enumerate(requests):
            sequences[index].keep(0)
            sequences[index].last = lasts[index]
            for number, cache in enumerate(self._caches):
                cache.truncate(request.sequence, max(ends[index] - number, 0))
        return drafts

    def _further(
        self, requests: Sequence[Request], drafts: list[list[int]], states: list[Any], counts: Sequence[int]
    ) -> None:
        """What the only module guesses from its own guesses. None beyond its count: there may be no page for it."""
        (module,), (cache,) = self._modules, self._caches
        while going := [index for index, draft in enumerate(drafts) if len(draft) < counts[index]]:
            batch = cache.batch([Part(requests[index].sequence, drafts[index][-1:]) for index in going])
            guess = module.forward(batch, joined([[states[index]] for index in going])[0], cache.layers[0])
            for row, (index, token) in enumerate(zip(going, self._ops.argmax(guess.logits).tolist(), strict=True)):
                drafts[index].append(token)
                states[index] = guess.states[row : row + 1]

    def forget(self, sequence: int) -> None:
        self._sequences.pop(sequence, None)
        for cache in self._caches:
            cache.free(sequence)

    def doubt(self) -> Notice:
        names = f"{len(self._modules)} MTP modules"
        return Notice("draft-rejected", "", f"the model's own {names} guess nothing that it says")
