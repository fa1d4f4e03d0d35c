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

import numpy as np

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.request import Request
from fewbits.engine.speculative.waiting import MOST_WAITING, Waiting, joined
from fewbits.errors import Notice
from fewbits.load_drafter import LoadedDrafter
from fewbits.models.eagle3 import Draft


class Eagle:
    """`max_pages` bounds the drafter's cache, as that of the target's."""

    def __init__(self, loaded: LoadedDrafter, max_pages: int) -> None:
        self._loaded = loaded
        self._drafter = loaded.drafter
        self._ops = loaded.drafter.ops
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
            self._catch_up([request], keep=1)

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        going = {name: count for name, (_, count) in wanted.items() if self._follows(wanted[name][0])}
        if not going:
            return
        requests = {name: wanted[name][0] for name in going}
        drafts: dict[int, list[int]] = {name: [] for name in going}
        known = {name: request.computed - self._sequences[name].begin for name, request in requests.items()}
        try:
            draft = self._catch_up(list(requests.values()))
            names = list(going)
            while True:
                for name, token in zip(names, self._tokens(draft.logits), strict=True):
                    drafts[name].append(token)
                rows = [row for row, name in enumerate(names) if len(drafts[name]) < going[name]]
                if not rows:
                    break
                state = draft.states
                if len(rows) < len(names):
                    state = self._ops.take(state, np.array(rows, np.int64))
                names = [names[row] for row in rows]
                batch = self._cache.batch([Part(name, drafts[name][-1:]) for name in names])
                draft = self._drafter.forward(batch, state, self._cache)
        finally:
            for name, length in known.items():
                if self._cache.length(name) > length:
                    self._cache.truncate(name, length)
        for name, request in requests.items():
            request.draft_ids = drafts[name]

    def _follows(self, request: Request) -> bool:
        sequence = self._sequences.get(request.sequence)
        return sequence is not None and sequence.reaches(self._cache.length(request.sequence), request.computed)

    def _catch_up(self, requests: Sequence[Request], keep: int = 0) -> Draft:
        """Compute the rows that wait, but for the last `keep`; without these, also the guess of each request's last
        row.
        """
        waiting = [self._sequences[request.sequence] for request in requests]
        parts, states = [], []
        for request, sequence in zip(requests, waiting, strict=True):
            begin, end = sequence.begin + self._cache.length(request.sequence), request.computed - keep
            parts.append(Part(request.sequence, request.known_ids(begin + 1, end + 1), logits=int(not keep)))
            states += [[state[: end - begin] for state in sequence.all()]]
        batch = self._cache.batch(parts)
        try:
            draft = self._drafter.start(batch, joined(states), self._cache)
        except BaseException:
            for part in parts:
                self._cache.truncate(part.sequence, self._cache.length(part.sequence) - len(part.token_ids))
            raise
        for sequence in waiting:
            sequence.keep(keep)
        return draft

    def _tokens(self, logits: Any) -> list[int]:
        """The best guess of each row, as the target numbers it."""
        ids = self._loaded.ids
        if self._loaded.from_columns:
            logits = np.ascontiguousarray(logits[:, ids])
        best = self._ops.argmax(logits)
        tokens: list[int] = (best if ids is None else ids[best]).tolist()
        return tokens

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
