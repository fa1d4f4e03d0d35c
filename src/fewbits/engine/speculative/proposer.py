"""What drafts tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fewbits.engine.request import Request
from fewbits.errors import Notice


class Proposer(Protocol):
    """Drafts the tokens that may come next; what it keeps of a request goes by its sequence's number."""

    @property
    def taps(self) -> Sequence[int]:
        """Layer boundaries of the target whose states it wants to see."""

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        """Set `draft_ids` of each (request, tokens at most), by sequence; requests have caught up, but for one
        token.
        """

    def watch(self, request: Request, states: Sequence[Any], new: int) -> None:
        """Of the tokens of a request that were just computed, the first `new` stay: `states` are their rows and those
        of rejected drafts, one [tokens, H] for each of `taps`. Not every pass is watched.
        """

    def forget(self, sequence: int) -> None:
        """A request is finished, or no longer wanted."""

    def doubt(self) -> Notice:
        """What to look at where next to nothing is accepted."""
