"""Rows that a drafter was shown and hasn't computed: they wait for the next draft, whose first pass computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Rows that may wait: a draft's first pass then still costs little more than for one row. Prompts are computed at once.
MOST_WAITING = 16


@dataclass(slots=True)
class Waiting:
    """Of one sequence. The drafter's cache begins with row `begin`: not all passes are watched, and after a gap the
    drafter starts anew. `states` of the rows, pass by pass one for each tapped boundary.
    """

    begin: int
    states: list[list[Any]] = field(default_factory=list)
    rows: int = 0

    def add(self, states: list[Any], rows: int) -> None:
        self.states.append(states)
        self.rows += rows

    def end(self, cached: int) -> int:
        """The row behind those that wait, where `cached` are in the drafter's cache."""
        return self.begin + cached + self.rows

    def reaches(self, cached: int, computed: int) -> bool:
        """Whether the states that the next guess reads are there: not if the last pass wasn't watched."""
        return self.rows > 0 and self.end(cached) == computed

    def all(self) -> list[Any]:
        """States of all the rows, one for each boundary."""
        return joined(self.states)

    def keep(self, rows: int) -> None:
        """All but the last `rows` were computed."""
        self.states = [[state[len(state) - rows :] for state in self.all()]] if rows else []
        self.rows = rows


def joined(pieces: Sequence[Sequence[Any]]) -> list[Any]:
    """States of several passes or sequences, one for each boundary."""
    if len(pieces) == 1:
        return list(pieces[0])
    return [np.concatenate(states) for states in zip(*pieces, strict=True)]
