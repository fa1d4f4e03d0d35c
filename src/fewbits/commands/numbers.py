"""Options that are lists of numbers."""

from __future__ import annotations

from fewbits.errors import UsageError


def numbers(text: str, option: str) -> list[int]:
    """1,2,3 → [1, 2, 3]. Raises UsageError, which names the option."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError("usage", f"{option} takes numbers, as in 1,2,3, not {text[:60]!r}") from None
