"""Writes the pages of docs/ that are made from code. tests/test_docs.py checks that they are up to date.

python tools/generate_docs.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from fewbits.cli import build_parser

DOCS = Path(__file__).resolve().parents[1] / "docs"


def cli() -> str:
    """Every command with its options, from the parser itself: --help's own layout differs between Pythons."""
    parser = build_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    lines = ["# The `fewbits` command", "", f"{parser.description} Made by `tools/generate_docs.py`.", ""]
    lines += [
        "Generated text and data go to standard output, everything else to standard error.",
        "Exit codes: 0 fine, 2 bad input or use, 3 a fault of fewbits itself, 130 interrupted, 143 terminated.",
    ]
    for name, command in commands.choices.items():
        arguments = " ".join(_usage(action) for action in command._actions if not action.option_strings)
        lines += ["", f"## fewbits {name} {arguments}".rstrip(), "", command.description or ""]
        for group in command._action_groups:
            rows = list(_rows(group))
            if rows:
                title = {"positional arguments": "Arguments", "options": "Options"}.get(group.title or "", group.title)
                lines += ["", f"{(title or '').capitalize()}:", "", "| | |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _usage(action: argparse.Action) -> str:
    return f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)


def _rows(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if action.dest == "help":
            continue
        value = "{" + ",".join(action.choices) + "}" if action.choices else action.metavar or ""
        names = ", ".join(action.option_strings) or str(action.metavar)
        shown = f"{names} {value}".rstrip() if action.option_strings and action.nargs != 0 else names
        yield f"| `{shown}` | {action.help} |"


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
