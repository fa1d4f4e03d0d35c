"""Targets and ignore entries: which scheme a module's own name, as stored, falls under.

A pattern is `re:` and a regular expression that must match from the start of the name (not to its end), an exact
name, or a class name. Exact names go before regular expressions, these before class names, each in alphabetical
order. Source: compressed_tensors/utils/match.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex

from fewbits.errors import CheckpointError
from fewbits.formats.resolved import ModuleKind

_TIMEOUT = 0.5  # seconds for one pattern on one name; a sane pattern takes microseconds
_SLOW = 0.005  # seconds for all patterns on one name; what takes longer is added up
_SLOW_TOGETHER = 1.0
_LONG = 256  # characters of a name


def _may_hang(pattern: str) -> bool:
    """Whether a pattern needs a timeout, which re doesn't have and which costs ten times the match: more than three
    repetitions, or any that may be nested. Without, it takes at most 256^3 / 6 steps on a name that isn't long.
    """
    repetitions = len(re.findall(r"[*+?{]", pattern))
    return repetitions > 3 or re.search(r"\)[*+?{]|\(\?|\\[1-9gkK]", pattern) is not None


# Names of the classes that a module has or inherits from, in alphabetical order.
_CLASSES: dict[ModuleKind, tuple[str, ...]] = {
    "linear": ("Linear", "Module"),
    "head": ("LMHead", "Linear", "Module", "ParallelLMHead"),
    "expert": ("Linear", "Module"),
    "router": ("Linear", "Module"),
    "embedding": ("Embedding", "Module"),
    "norm": (),
    "conv": (),
    "other": (),
}
# A regular expression may well hit their names, but producers quantize linear layers and embeddings only.
NEVER_TARGETS: tuple[ModuleKind, ...] = ("norm", "conv", "other")


class Patterns:
    """A set of patterns, and how many modules each of them hit."""

    def __init__(self, patterns: Iterable[str], source: str) -> None:
        self.hits = dict.fromkeys(sorted(set(patterns)), 0)
        self._source = source
        self._classes = {kind: [name for name in names if name in self.hits] for kind, names in _CLASSES.items()}
        self._regexes = []
        self._slow = 0.0
        began = time.thread_time()
        for pattern in self.hits:
            if time.thread_time() - began > _SLOW_TOGETHER:
                raise CheckpointError("pattern-timeout", f"{len(self.hits)} patterns take too long", source=source)
            if pattern.startswith("re:"):
                try:
                    plain = re.compile(pattern[3:])  # the dialect; regex alone knows recursion, which takes gigabytes
                    self._regexes.append((pattern, not _may_hang(pattern), plain, regex.compile(pattern[3:])))
                except (re.error, regex.error, RecursionError, OverflowError) as error:
                    raise CheckpointError("pattern-invalid", f"{pattern[:80]!r}: {error}", source=source) from None

    def match(self, name: str, kind: ModuleKind) -> str | None:
        """The pattern that decides for this module, None where none matches."""
        found = None
        if name in self.hits and not name.startswith("re:"):
            self.hits[name] += 1
            found = name
        if self._regexes:
            found = self._match_regexes(name, found)
        for class_name in self._classes[kind]:
            self.hits[class_name] += 1
            found = found or class_name
        return found

    def _match_regexes(self, name: str, found: str | None) -> str | None:
        began = time.perf_counter()
        short = len(name) <= _LONG
        for pattern, tame, plain, timed in self._regexes:
            # Once decided, only patterns that never hit are still tried: to know those that hit nothing.
            if (found is None or self.hits[pattern] == 0) and (
                plain.match(name) if tame and short else self._match_timed(timed, pattern, name)
            ):
                self.hits[pattern] += 1
                found = found or pattern
        if time.perf_counter() - began > _SLOW:
            self._count_time(name)
        return found

    def _match_timed(self, timed: regex.Pattern[str], pattern: str, name: str) -> bool:
        try:
            return timed.match(name, timeout=_TIMEOUT) is not None
        except TimeoutError:
            raise CheckpointError(
                "pattern-timeout",
                f"{pattern[:80]!r} takes longer than {_TIMEOUT} s on {name}",
                source=self._source,
            ) from None

    def _count_time(self, name: str) -> None:
        """Many patterns that each stay below the limit may still take forever.

        The clock on the wall also counts the time of others: a slow name is tried again by the thread's own clock,
        which costs a system call and is therefore not asked for every name.
        """
        began = time.thread_time()
        for pattern, _, _, timed in self._regexes:
            self._match_timed(timed, pattern, name)
        self._slow += time.thread_time() - began
        if self._slow > _SLOW_TOGETHER:
            text = f"its regular expressions took {self._slow:.1f} s by the time of {name}"
            raise CheckpointError("pattern-timeout", text, source=self._source)

    def without_match(self) -> list[str]:
        return [pattern for pattern, count in self.hits.items() if count == 0]
