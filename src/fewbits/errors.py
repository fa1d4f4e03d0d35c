"""Errors and warnings: what is wrong, where, why, and what helps.

Every one has a code from the table in `codes.py`, from which docs/errors.md is made. `FewbitsError` and its
subclasses end a command with exit code 2; any other exception is a fault of fewbits itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.codes import CODES


def printable(text: str) -> str:
    """A line with everything escaped that would do something to a terminal: names come from files."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning, or an error of a plan that is collected instead of raised. `module` is "" for the whole file."""

    code: str
    module: str
    text: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"{self.code} is not in the table of codes")

    def __str__(self) -> str:
        where = f"{self.module}: " if self.module else ""
        return printable(f"{self.code}: {where}{self.text}")


class FewbitsError(Exception):
    """Bad input or use, explained.

    `what` says in one sentence what is wrong; `module` names the module, tensor or file; `source` is where the
    claim comes from (a key of a file); `details` are further lines, each "label: text"; `hint` is one next step.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        module: str = "",
        source: str = "",
        details: tuple[str, ...] = (),
        hint: str = "",
    ) -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in the table of codes")
        super().__init__(what)
        self.code = code
        self.what = what
        self.module = module
        self.source = source
        self.details = details
        self.hint = hint

    def notice(self) -> Notice:
        return Notice(self.code, self.module, self.what)

    def __str__(self) -> str:
        lines = [f"{self.module}: {self.what}" if self.module else self.what]
        if self.source:
            lines.append(f"  from: {self.source}")
        lines += [f"  {line}" for line in self.details]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(map(printable, lines))


class CheckpointError(FewbitsError):
    """The files can't be read, or contradict themselves."""


class PlanError(FewbitsError):
    """The checkpoint is sound, but can't be run as asked."""


class UsageError(FewbitsError):
    """An option or an argument that can't be honoured."""
