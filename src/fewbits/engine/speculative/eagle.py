"""Drafting with an Eagle3 drafter: a chain of guesses from the target's states and the newest token.

The drafter's row j holds token j + 1 beside the target's state of token j. Rows [0, computed) of a sequence are in the
drafter's cache or wait among its `states` for the next draft; guesses make further rows, from the drafter's own states,
which are forgotten when the target has spoken:

    target    token     0     1     2    …   n-1    n (newest)
              state     f0    f1    f2   …   f(n-1)
    drafter   row       0     1     2    …   n-1    n         n+1
              token     1     2     3    …   n      guess 1   guess 2
              state     f0    f1    f2   …   f(n-1) own       own          each gives the next guess
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.request import Request
from fewbits.engine.speculative.waiting import MOST_WAITING, Waiting, joined
from fewbits.errors import Notice
from fewbits.load_drafter import LoadedDrafter
from fewbits.models.eagle3 import Draft

# Where nobody asks for a number of draft tokens. What the example's drafter gives a quarter is right in six of ten
# cases; one that is right in hardly more costs what it brings where passes are bound by products (bench/log.md).
LEAST = 0.3


class Eagle:
    """`max_pages` bounds the drafter's cache, as that of the target's. A chain ends where the drafter gives it less
    than the probability `least`; its first token is drafted anyway.
    """

    def __init__(self, loaded: LoadedDrafter, max_pages: int, least: float = 0.0) -> None:
        self._loaded, self._least = loaded, least
        self._drafter = loaded.drafter
        self._cache = KVCache(loaded.cache_layers, max_pages)
        self._sequences: dict[int, Waiting] = {}
        self.taps: Sequence[int] = loaded.planned.boundaries

    def watch(self, request: Request, states: Sequence[Any], new: int) -> None:
        if request.done:
            return
        name, begin = request.sequence, request.computed - new
        sequence = self._sequences.get(name)
        if sequence is None or sequence.end(self._cache.length(name)) != begin:
            self._cache.free(name)
            sequence = self._sequences[name] = Waiting(begin)
        sequence.add([state[:new] for state in states], new)
        if sequence.rows > MOST_WAITING:
            self._read([request], [0], keep=1)

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        ready = [(request, count) for request, count in wanted.values() if count and self._follows(request)]
        if not ready:
            return
        ready.sort(key=lambda one: -one[1])  # those whose drafts are shorter fall away at the end
        requests, counts = [request for request, _ in ready], [count for _, count in ready]
        known = [request.computed - self._sequences[request.sequence].begin for request in requests]
        try:
            draft = self._read(requests, counts)
        finally:
            for request, length in zip(requests, known, strict=True):
                if self._cache.length(request.sequence) > length:
                    self._cache.truncate(request.sequence, length)
        tokens, chances = draft.tokens.T.tolist(), draft.chances.T.tolist()
        for (request, count), its, sure in zip(ready, tokens, chances, strict=True):
            further = zip(its[1:count], sure[1:count], strict=True)
            request.draft_ids = its[:1] + [token for token, chance in further if chance >= self._least]

    def _follows(self, request: Request) -> bool:
        sequence = self._sequences.get(request.sequence)
        return sequence is not None and sequence.reaches(self._cache.length(request.sequence), request.computed)

    def _read(self, requests: Sequence[Request], counts: Sequence[int], keep: int = 0) -> Draft:
        """Compute the rows that wait, but for the last `keep`, and at most so many guesses of each request, most
        first.
        """
        rows = [len(counts)] * counts[-1] or [0]
        rows += [sum(count > place for count in counts) for place in range(len(rows), counts[0])]
        waiting = [self._sequences[request.sequence] for request in requests]
        parts, states = [], []
        for request, sequence, count in zip(requests, waiting, counts, strict=True):
            begin, end = sequence.begin + self._cache.length(request.sequence), request.computed - keep
            tokens = request.known_ids(begin + 1, end + 1)
            parts.append(Part(request.sequence, tokens, logits=int(count > 0), ahead=max(count - 1, 0)))
            its = sequence.all()
            states.append([state[: end - begin] for state in its] if keep else its)
        lengths = [self._cache.length(part.sequence) for part in parts]
        batch = self._cache.batch(parts)
        try:
            draft = self._drafter.draft(batch, joined(states), rows, self._cache, self._least)
        except BaseException:
            for part, length in zip(parts, lengths, strict=True):
                self._cache.truncate(part.sequence, length)
            raise
        for sequence in waiting:
            sequence.keep(keep)
        return draft

    def forget(self, sequence: int) -> None:
        self._sequences.pop(sequence, None)
        self._cache.free(sequence)

    def doubt(self) -> Notice:
        found = self._loaded.planned
        rows = [row for row in found.plan.rows if row.runs and row.kind not in ("norm", "other")]
        modules = ", ".join(f"{row.name} {row.spec}" for row in rows)
        boundaries = ", ".join(map(str, found.boundaries))
        text = (
            f"the drafter reads the states behind layers {boundaries} ({found.why}); --draft-layers names others."
            f" Its modules: {modules}"
        )
        return Notice("draft-rejected", "", text)
