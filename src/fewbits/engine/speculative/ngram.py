"""Drafting without a model: what followed the last time the newest tokens were seen (prompt look-up)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.engine.request import Request
from fewbits.errors import Notice

LONGEST = 5  # tokens that must repeat; vLLM's default. Fewer are tried where so many don't
SHORTEST = 2


class _Seen:
    """n-grams of one sequence → where the token behind their latest occurrence is."""

    __slots__ = ("length", "places")

    def __init__(self) -> None:
        self.length = 0
        self.places: dict[tuple[int, ...], int] = {}


class NGram:
    """Proposes up to as many tokens as are wanted from behind the latest earlier occurrence of the longest suffix.

    The latest rather than the first (vLLM's choice): text goes on as it did nearby.
    """

    taps: Sequence[int] = ()

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._seen: dict[int, _Seen] = {}

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        for sequence, (request, count) in wanted.items():
            request.draft_ids = self.continuation([*request.prompt_ids, *request.output_ids], sequence, count)

    def continuation(self, tokens: list[int], sequence: int, count: int) -> list[int]:
        """Up to `count` tokens that may follow `tokens`, all that are known of a sequence."""
        seen = self._seen.setdefault(sequence, _Seen())
        for end in range(seen.length + 1, len(tokens)):  # n-grams that have a token behind them
            for size in self._sizes:
                if size <= end:
                    seen.places[tuple(tokens[end - size : end])] = end
        seen.length = max(seen.length, len(tokens) - 1)
        for size in self._sizes:
            place = seen.places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return self._from(tokens, place, count)
        return []

    @staticmethod
    def _from(tokens: list[int], place: int, count: int) -> list[int]:
        """What follows from `place` on; where the text ends first, it is taken to repeat."""
        period = len(tokens) - place
        return [tokens[place + index % period] for index in range(count)]

    def watch(self, request: Request, states: Sequence[Any], new: int) -> None:
        pass

    def forget(self, sequence: int) -> None:
        self._seen.pop(sequence, None)

    def doubt(self) -> Notice:
        return Notice("draft-rejected", "", "the text doesn't repeat itself: looking it up finds nothing that helps")
