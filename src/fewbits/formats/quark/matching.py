"""Which part of a Quark config a module falls under.

Quark matches names as a shell matches files (`fnmatch`), against the checkpoint's own names; published files mostly
list whole names. `re:` is the engines' dialect and is read too. A fused name never comes into it: q_proj is q_proj.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import regex

from fewbits.errors import CheckpointError
from fewbits.formats.resolved import ModuleKind

_TIMEOUT = 1.0  # seconds for one name
# Classes of torch.nn in layer_type_quant_config.
CLASSES: dict[str, tuple[ModuleKind, ...]] = {
    "Linear": ("linear", "head", "expert", "router"),
    "Embedding": ("embedding",),
}


class Entries:
    """Names and patterns in order, and how many modules each of them hit."""

    def __init__(self, entries: Iterable[str], source: str) -> None:
        self.hits = dict.fromkeys(entries, 0)
        self._source = source
        self._entries = list(self.hits)
        self._places = {entry: place for place, entry in enumerate(self._entries) if not _is_pattern(entry)}
        self._patterns = [
            (place, self._compiled(entry)) for place, entry in enumerate(self._entries) if _is_pattern(entry)
        ]

    def _compiled(self, entry: str) -> regex.Pattern[str]:
        try:
            if entry.startswith("re:"):
                return regex.compile(entry[3:])
            return regex.compile(fnmatch.translate(entry))
        except regex.error as error:
            raise CheckpointError("pattern-invalid", f"{entry[:80]!r}: {error}", source=self._source) from None

    def match(self, name: str) -> str | None:
        """The first entry that the name falls under."""
        exact = self._places.get(name)
        found = None if exact is None else name
        for place, pattern in self._patterns:
            if exact is not None and place > exact:
                break
            if self._matches(pattern, name):
                found = self._entries[place]
                break
        if found is not None:
            self.hits[found] += 1
        return found

    def _matches(self, pattern: regex.Pattern[str], name: str) -> bool:
        try:
            return pattern.match(name, timeout=_TIMEOUT) is not None
        except TimeoutError:
            text = f"{pattern.pattern[:80]!r} takes too long on {name[:80]!r}"
            raise CheckpointError("pattern-timeout", text, source=self._source) from None

    def without_match(self) -> list[str]:
        return [entry for entry, count in self.hits.items() if not count]


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or any(mark in entry for mark in "*?[")
