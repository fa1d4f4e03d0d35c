"""How many tokens are worth drafting.

A draft token is worth its time if it raises the tokens that are to be expected of a pass by more than the time that the
pass and its drafting take. Both are known from the passes before: how often a draft's i-th token was accepted when
those before it were, and how long passes of so many tokens took. Where a proposer itself ends drafts of which it isn't
sure, what passes gain on the whole says whether drafting pays. What is chosen changes when tokens come, never which.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

MOST = 8  # draft tokens of a request, where nobody asks for a number
WHOLE = 6  # and the proposer itself ends drafts

_MEMORY = 0.95  # what a round leaves of the weight of those before it: some twenty count, tried or not
_PRIOR_RATE, _PRIOR_ROUNDS = 0.6, 2.0  # of acceptance, before anything was seen
_TRIED = 2  # draft tokens of a trial's passes, of proposers that end drafts themselves
_PATIENCE, _SHOWN = 0.5, 2.0  # plain passes' time: that drafts may lose before they rest; that shows that they pay
_LATELY = 0.98  # what a pass leaves of the weight of those before it, in what drafts gained
_TIMES = 5  # of passes of a size that are kept; their median counts
_TRIAL = 2  # passes with few draft tokens, which show whether drafting pays again
_REST = (8, 512)  # passes before drafting is tried again, where it didn't pay: twice as many each time
_FADED = 0.25  # what is left of what was known of acceptance before a rest
_WASTE = 0.01  # of the time, that drafting may have cost before new requests are no reason to try it
_RECENT = 0.999  # what a pass leaves of the weight of those before it, in that share
_SELDOM = 4  # while it rests, one pass of so many is timed
_REFRESH = 64  # passes with drafts before one without is timed again


class Lengths(Protocol):
    def choose(self, room: Mapping[int, int]) -> dict[int, int]:
        """Draft tokens for each sequence, of at most as many as there is room for."""

    def accepted(self, sequence: int, drafted: int, accepted: int) -> None:
        """A pass has verified the draft of a sequence."""

    def timed(self, tokens: int, drafts: int, seconds: float, drafting: float) -> None:
        """A pass over `tokens` in all took `seconds`; drafting `drafts` tokens for one of its sequences, and no more
        for the others, took `drafting`.
        """

    def forget(self, sequence: int) -> None: ...

    def wake(self) -> None:
        """A new request: it may be easier to guess than those before, and end a rest."""

    @property
    def resting(self) -> int:
        """Passes until something is drafted again."""


class Fixed:
    """Always as many."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def choose(self, room: Mapping[int, int]) -> dict[int, int]:
        return {sequence: min(self._tokens, most) for sequence, most in room.items()}

    def accepted(self, sequence: int, drafted: int, accepted: int) -> None:
        pass

    def timed(self, tokens: int, drafts: int, seconds: float, drafting: float) -> None:
        pass

    def forget(self, sequence: int) -> None:
        pass

    def wake(self) -> None:
        pass

    @property
    def resting(self) -> int:
        return 0


class Acceptance:
    """How often the i-th token of a draft is accepted, given that those before it are."""

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._tried: list[float] = []
        self._kept: list[float] = []

    def add(self, drafted: int, accepted: int) -> None:
        missing = drafted - len(self._tried)
        self._tried += [0.0] * missing
        self._kept += [0.0] * missing
        reached = min(accepted + 1, drafted)
        for position in range(len(self._tried)):
            self._tried[position] = _MEMORY * self._tried[position] + (position < reached)
            self._kept[position] = _MEMORY * self._kept[position] + (position < accepted)

    def fade(self) -> None:
        """Count what was seen for less."""
        self._tried = [_FADED * tried for tried in self._tried]
        self._kept = [_FADED * kept for kept in self._kept]

    def rates(self, count: int) -> list[float]:
        """Of the first `count` positions. What wasn't tried is taken to be as good as the position before: so it will
        be tried.
        """
        priors = None if self._prior is None else self._prior.rates(count)
        rates: list[float] = []
        rate = _PRIOR_RATE
        for position in range(count):
            prior = rate if priors is None else priors[position]
            rate = prior
            if position < len(self._tried):
                tried, kept = self._tried[position], self._kept[position]
                rate = (kept + prior * _PRIOR_ROUNDS) / (tried + _PRIOR_ROUNDS)
            rates.append(rate)
        return rates


class Times:
    """Seconds of something by its size: medians of the last, straight lines between sizes that were seen."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        if size not in self._seconds:
            bisect.insort(self._sizes, size)
            self._seconds[size] = deque(maxlen=_TIMES)
        self._seconds[size].append(seconds)
        ordered = sorted(self._seconds[size])  # statistics.median takes a hundredth of a small model's pass
        self._medians[size] = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2

    def at(self, size: int) -> float:
        """A size beyond those seen counts as the nearest of them: taken for cheap, it will be tried, and be seen."""
        place = bisect.bisect_left(self._sizes, size)
        around = self._sizes[max(place - 1, 0) : place + 1]
        if not around:
            return 0.0
        if size <= around[0] or size >= around[-1]:
            return self._medians[around[0] if size <= around[0] else around[-1]]
        low, high = around
        share = (size - low) / (high - low)
        return (1 - share) * self._medians[low] + share * self._medians[high]

    def __contains__(self, size: int) -> bool:
        return size in self._seconds


class _Paying:
    """Drafts as long as that pays, rests where it doesn't, and tries again. `_wanted` says what pays."""

    _timing: ClassVar[int] = 1  # of so many passes with drafts one is timed

    def __init__(self, most: int) -> None:
        self._most = most
        self._passes = Times()  # at the pace that passes had when they were first timed
        self._paces: deque[float] = deque(maxlen=_TIMES)
        self._pace = 1.0  # how long passes take now, beside that
        self._drafted = 0  # passes in a row
        self._trial = _TRIAL  # passes left of it
        self._resting, self._rest = 0, _REST[0]  # passes left, and of the next rest
        self._sequences = 0  # of the pass
        self._gained = 0  # draft tokens that it accepted
        self._spent = self._lost = 0.0  # seconds, and how many of them drafts took beyond what they gained

    def _wanted(self, most: Mapping[int, int]) -> dict[int, int]:
        """Draft tokens for each sequence, where they pay."""
        raise NotImplementedError

    def _shown(self) -> bool:
        """Whether drafts pay by what was seen, not only by what was hoped."""
        return not self._trial

    def choose(self, room: Mapping[int, int]) -> dict[int, int]:
        sequences = self._sequences = len(room)
        self._gained = 0
        most = {sequence: min(self._most, its) for sequence, its in room.items()}
        none = dict.fromkeys(room, 0)
        if self._resting or sequences not in self._passes or self._drafted >= _REFRESH or not any(most.values()):
            return none
        wanted = self._wanted(most)
        if any(wanted.values()):
            if self._shown():
                self._rest = _REST[0]
            return wanted
        if self._trial:
            return {sequence: min(1, its) for sequence, its in most.items()}
        self._resting, self._rest = self._rest, min(2 * self._rest, _REST[1])
        return none

    def accepted(self, sequence: int, drafted: int, accepted: int) -> None:
        self._gained += accepted

    def timed(self, tokens: int, drafts: int, seconds: float, drafting: float) -> None:
        timing = not (self._resting % _SELDOM if self._resting else self._drafted % self._timing)
        if timing:
            # A machine that others share may be half as fast a second later: what is known of other sizes then is, too.
            if tokens in self._passes:
                self._paces.append(seconds / self._passes.at(tokens))
                self._pace = sorted(self._paces)[len(self._paces) // 2]
            self._passes.add(tokens, seconds / self._pace)
        self._spent = _RECENT * self._spent + seconds + drafting
        self._lost *= _RECENT
        self._drafted = self._drafted + 1 if drafts else 0
        if drafts:
            self._trial = max(self._trial - 1, 0)
            plain = self._passes.at(self._sequences) * self._pace
            lost = seconds + drafting - (1 + self._gained / self._sequences) * plain
            self._lost = max(self._lost + lost, 0.0)
            self._count(drafts, drafting / self._pace, lost / plain)
        if self._resting:
            self._resting -= 1
            if not self._resting:
                self._try_again()

    def _count(self, drafts: int, drafting: float, lost: float) -> None:
        """Drafting so many tokens took so long, and with it the pass lost so many plain passes' time, or gained it."""

    def forget(self, sequence: int) -> None:
        pass

    def wake(self) -> None:
        if not self._resting or self._lost <= _WASTE * self._spent:
            self._try_again()

    def _try_again(self) -> None:
        self._resting, self._trial = 0, _TRIAL

    @property
    def resting(self) -> int:
        return self._resting


class Adaptive(_Paying):
    """As many as raise tokens a second, none where none does: for proposers that draft as many as they are asked."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__(most)
        self._drafting = Times()
        self._all = Acceptance()
        self._each: dict[int, Acceptance] = {}

    def _wanted(self, most: Mapping[int, int]) -> dict[int, int]:
        sequences = len(most)
        chosen = dict.fromkeys(most, 0)
        best = chosen.copy()
        expected, longest = float(sequences), 0
        rate = expected / self._passes.at(sequences)
        for count, (chance, sequence) in enumerate(self._chances(most), 1):
            chosen[sequence] += 1
            longest = max(longest, chosen[sequence])
            expected += chance
            seconds = self._passes.at(sequences + count) + self._drafting.at(longest)
            if expected / seconds > rate:
                rate, best = expected / seconds, chosen.copy()
        return best

    def _chances(self, most: Mapping[int, int]) -> Sequence[tuple[float, int]]:
        """(chance to be accepted, its sequence) of every token that could be drafted, the best first: of a draft, those
        before come before.
        """
        chances = []
        for sequence, its in most.items():
            acceptance = self._each.get(sequence) or self._all
            chance = 1.0
            for position, rate in enumerate(acceptance.rates(its)):
                chance *= rate
                chances.append((chance, position, sequence))
        chances.sort(key=lambda one: (-one[0], one[1]))
        return [(chance, sequence) for chance, _, sequence in chances]

    def _count(self, drafts: int, drafting: float, lost: float) -> None:
        self._drafting.add(drafts, drafting)

    def accepted(self, sequence: int, drafted: int, accepted: int) -> None:
        super().accepted(sequence, drafted, accepted)
        if sequence not in self._each:
            self._each[sequence] = Acceptance(self._all)
        self._each[sequence].add(drafted, accepted)
        self._all.add(drafted, accepted)

    def forget(self, sequence: int) -> None:
        self._each.pop(sequence, None)

    def _try_again(self) -> None:
        super()._try_again()
        for acceptance in (self._all, *self._each.values()):
            acceptance.fade()


class Whole(_Paying):
    """Always as many, or none where these don't pay: for proposers that end a draft where they aren't sure, and so have
    an easy text's long drafts and a hard one's short ones of their own.

    What passes gain by drafts is averaged: no position and no length is judged by itself.
    """

    _timing = 4  # the example feels the 3 us

    def __init__(self, most: int = WHOLE) -> None:
        super().__init__(most)
        self._balance = 0.0  # of late, in plain passes' time

    def _wanted(self, most: Mapping[int, int]) -> dict[int, int]:
        if self._trial:
            return {sequence: min(_TRIED, its) for sequence, its in most.items()}
        return dict(most) if self._balance > -_PATIENCE else {}

    def _shown(self) -> bool:
        return not self._trial and self._balance > _SHOWN

    def _count(self, drafts: int, drafting: float, lost: float) -> None:
        self._balance = _LATELY * self._balance - min(lost, 1.0)  # a prompt that was taken in says nothing

    def wake(self) -> None:
        if self._resting and self._lost <= _WASTE * self._spent:
            self._try_again()

    def _try_again(self) -> None:
        super()._try_again()
        self._balance = 0.0
