"""The gallery: small checkpoints that go wrong elsewhere, and what `inspect` says of each, `run` of drafters.

Folders are made while this runs, with the helpers of tests/make.py; tests/test_gallery.py holds each case to what it
is meant to show. `python tools/generate_docs.py` writes the page.
"""

from __future__ import annotations

import io
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from fewbits.cli import main
from fewbits.draft_plan import plan_draft
from fewbits.errors import FewbitsError
from fewbits.load import inspect, load
from fewbits.report import failure_text, print_draft, print_table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

from gallery_cases import CASES, Case  # noqa: E402

# Blocks below the table that the page shows; the rest (memory) says nothing here.
_BLOCKS = ("why not native:", "tensors that belong to no module:", "warnings:", "errors:", "beside its target:")


INTRODUCTION = """
    Checkpoints that went wrong elsewhere, rebuilt small, and what fewbits says of them. Numbers are threads where
    people met the case: `vllm#1` is issue or pull request 1 of vllm-project/vllm; `llmc` is
    vllm-project/llm-compressor, `CT` vllm-project/compressed-tensors, `sglang` sgl-project/sglang. What the engines
    do is as these threads tell it; later versions may do better. Made by `tools/gallery.py`."""


def page() -> str:
    lines = ["# Gallery", "", *_wrapped(INTRODUCTION)]
    with tempfile.TemporaryDirectory() as temporary:
        for number, case in enumerate(CASES):
            folder = Path(temporary) / str(number)
            case.build(folder)
            lines += [
                "",
                f"## {case.title}",
                "",
                *_wrapped(case.seen),
                "",
                *_wrapped(f"*Elsewhere:* {case.engines}"),
                "",
            ]
            lines += ["```text", *shown(case, folder), "```"]
            lines += ["", *_wrapped(case.note)] if case.note else []
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def shown(case: Case, folder: Path) -> list[str]:
    """What the command prints of the modules that the case is about."""
    if case.target is not None:
        return _beside_its_target(case, folder)
    lines = [f"$ fewbits {case.command} FOLDER", *(_inspected if case.command == "inspect" else _run)(case, folder)]
    return [line.replace(str(folder), "FOLDER").rstrip() for line in lines]


def _beside_its_target(case: Case, folder: Path) -> list[str]:
    """Of a drafter: both plans, and what is said where the two run, if the case is about that."""
    assert case.target is not None
    target = folder.with_name(f"{folder.name}-target")
    if not target.exists():
        case.target(target)
    planned = inspect(target)
    found = plan_draft(folder, planned)
    heading, *rows = _table(case, lambda text: print_table(planned, text))
    lines = ["$ fewbits inspect TARGET --draft DRAFTER", *([heading, *rows, ""] if rows else [])]
    lines += ["drafter:", *_table(case, lambda text: print_draft(found, text))]
    if case.command == "run":
        command = "run {} --draft {} --draft-tokens 1 --prompt-ids 4,5 --max-tokens " + str(case.tokens)
        lines += ["", f"$ fewbits {command.format('TARGET', 'DRAFTER')}"]
        lines += _said(command.format(target, folder).split())
    return [line.replace(str(target), "TARGET").replace(str(folder), "DRAFTER").rstrip() for line in lines]


def _said(arguments: list[str]) -> list[str]:
    """On stderr, but for counts and speeds, which are the machine's."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        main(arguments)
    lines = [line for line in said.getvalue().splitlines() if not line.startswith(("prompt:", "drafted:"))]
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="  ")]


def _inspected(case: Case, folder: Path) -> list[str]:
    return _table(case, lambda text: print_table(inspect(folder), text))


def _table(case: Case, show: Callable[[io.StringIO], None]) -> list[str]:
    """What is printed, without the modules that the case isn't about."""
    text = io.StringIO()
    show(text)
    lines = text.getvalue().splitlines()
    heading = next(number for number, line in enumerate(lines) if line.startswith("module "))
    end = next(number for number in range(heading, len(lines) + 1) if number == len(lines) or not lines[number].strip())
    rows = [line for line in lines[heading + 1 : end] if any(word in line.split()[0] for word in case.modules)]
    return [*_narrow([lines[heading], *rows]), *_blocks(lines[end:], "\n".join(rows))]


def _narrow(table: list[str]) -> list[str]:
    """The table without the columns of spaces that rows left out had needed."""
    width = max(map(len, table))
    padded = [line.ljust(width) for line in table]
    blank = [all(line[column] == " " for line in padded) for column in range(width)]
    kept = [column for column in range(width) if not all(blank[max(column - 2, 0) : column + 1])]
    return ["".join(line[column] for column in kept) for line in padded]


def _blocks(lines: list[str], rows: str) -> list[str]:
    """The blocks below the table; of the reasons, those of the rows that are shown."""
    found: list[str] = []
    title = ""
    for line in lines:
        if not line.startswith("  "):
            title = line if line in _BLOCKS else ""
        elif title and (title != _BLOCKS[0] or line.split(": ")[1] in rows):
            found += ["", title, line] if title not in found else [line]
    return found


def _run(case: Case, folder: Path) -> list[str]:
    try:
        load(folder, allow_reference=True)
    except FewbitsError as error:
        return failure_text(error).splitlines()
    raise AssertionError(f"{case.title}: it runs")
