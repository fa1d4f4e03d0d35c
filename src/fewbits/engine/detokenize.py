"""From token ids to text, piece by piece.

A token can end inside a character, a stop string can begin in one token and end in the next, and decoders
that drop the space before the first token must not drop it in the middle. So text is held back until it can't
change any more:

    decode(ids[window:]) = | emitted | stable | U+FFFD … |
                                      ^ goes out now
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_WINDOW = 32  # tokens decoded again at each step; longer windows only cost time


class Detokenizer:
    """Decodes a growing list of ids; `decode` turns a list of ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the window's first token on
        self._emitted = 0  # characters of decode(self._ids) that are out already
        self._clean = 0  # tokens after which the text last ended with a whole character

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain, often one word, sometimes nothing."""
        self._ids += tokens
        text = self._decode(self._ids)
        stable = text.rstrip(_REPLACEMENT)
        piece = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if len(stable) == len(text):
            if len(self._ids) > _WINDOW:
                del self._ids[: self._clean]
                self._emitted = len(self._decode(self._ids))
            self._clean = len(self._ids)
        return piece

    def finish(self) -> str:
        """What was held back: characters that were never completed, as U+FFFD."""
        return self._decode(self._ids)[self._emitted :]


class StopStrings:
    """Cuts a stream at the first of several strings; holds back only what could still become one of them."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.any = any(strings)
        self.stopped = False

    def feed(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in (text.find(string) for string in self._strings) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class TextStream:
    """Detokenizer and stop strings of one request. `text` is all that has come out."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = StopStrings(stop)
        self._pieces: list[str] = []

    @property
    def searched(self) -> bool:
        """Whether there are strings that end it."""
        return self._stop.any

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def feed(self, tokens: Sequence[int], search: bool = True) -> str:
        """The next piece. Without `search`, stop strings in it don't count."""
        return self._out(self._detokenizer.feed(tokens), search, end=False)

    def finish(self, search: bool = True) -> str:
        """The rest, after the last token."""
        return self._out(self._detokenizer.finish(), search, end=True)

    def _out(self, piece: str, search: bool, end: bool) -> str:
        if search:
            piece = self._stop.feed(piece)
            if end and not self._stop.stopped:
                piece += self._stop.finish()
        self._pieces.append(piece)
        return piece
