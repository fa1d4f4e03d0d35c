"""The driver: before each pass it has tokens drafted, after each it learns from what became of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fewbits.engine.request import Request, Speculation
from fewbits.engine.runner import Outcome
from fewbits.engine.speculative.lengths import Lengths
from fewbits.engine.speculative.proposer import Proposer
from fewbits.errors import Notice

_ROUNDS = 32  # after which acceptance says something
_WARM = 8  # passes before a rest ends in which states are watched again, so that a draft has something to read
_NEAR_ZERO = 0.1  # of first draft tokens. An Eagle3 drafter that reads the wrong states has a tenth (vLLM PR 43671)


class Driver:
    """`watch` and `taps` make it a step's watcher."""

    def __init__(self, proposer: Proposer, lengths: Lengths) -> None:
        self._proposer, self._lengths = proposer, lengths
        self.total = Speculation()
        self._drafting = self._drafted_at = 0.0

    @property
    def taps(self) -> Sequence[int]:
        return () if self._lengths.resting > _WARM else self._proposer.taps

    def draft(self, running: Sequence[Request]) -> None:
        """Give the requests that have caught up as many draft tokens as pay."""
        begin = time.perf_counter()
        if any(not request.computed for request in running):
            self._lengths.wake()
        elif self._lengths.resting:
            for request in running:
                request.draft_ids = []
            self._drafted_at, self._drafting = begin, 0.0
            return
        ready = {request.sequence: request for request in running if request.output_ids and request.pending == 1}
        counts: dict[int, int] = {}
        if ready:
            # A pass gives one token more than it accepts.
            room = {name: request.length_limit - len(request.output_ids) - 1 for name, request in ready.items()}
            counts = self._lengths.choose(room)
        wanted = {name: (ready[name], count) for name, count in counts.items() if count}
        for request in ready.values():
            request.draft_ids = []
        if wanted:
            self._proposer.propose(wanted)
        self._drafted_at = time.perf_counter()
        self._drafting = self._drafted_at - begin

    def watch(self, outcomes: Sequence[Outcome], taps: Sequence[Any]) -> None:
        seconds = time.perf_counter() - self._drafted_at
        row = 0
        for one in outcomes:
            if taps:
                states = [tap[row : row + one.computed] for tap in taps]
                row += one.computed
                self._proposer.watch(one.request, states, one.computed - one.drafted + one.accepted)
        decoding = [one for one in outcomes if one.tokens and one.request.sampled > one.tokens]
        for one in decoding:
            for statistics in (one.request.speculation, self.total):
                if statistics is not None:
                    statistics.count(one.drafted, one.accepted, one.tokens)
            if one.drafted:
                self._lengths.accepted(one.request.sequence, one.drafted, one.accepted)
        if len(decoding) == len(outcomes):  # a pass that has a prompt in it says nothing
            longest = max((one.drafted for one in outcomes), default=0)
            self._lengths.timed(sum(one.computed for one in outcomes), longest, seconds, self._drafting)

    def forget(self, request: Request) -> None:
        self._proposer.forget(request.sequence)
        self._lengths.forget(request.sequence)

    @property
    def warning(self) -> Notice | None:
        """Said once acceptance is near zero, with what to look at."""
        total = self.total
        if total.rounds < _ROUNDS or total.accepted[0] > _NEAR_ZERO * total.rounds:
            return None
        doubt = self._proposer.doubt()
        share = f"{total.accepted[0]} of {total.rounds} first draft tokens were accepted"
        return Notice(doubt.code, doubt.module, f"{share}: {doubt.text}")
