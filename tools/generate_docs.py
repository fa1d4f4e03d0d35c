"""Writes what the docs say twice from the code that says it once; tests/test_docs.py checks that it is fresh.

python tools/generate_docs.py

docs/errors.md   the table of codes
docs/cli.md      the options of every command
docs/gallery.md  checkpoints that go wrong elsewhere (tools/gallery.py)
README.md        between its markers: the support table, the example's plan, the perplexities
bench/README.md  between its markers: the comparison with peers (bench/compare.py), speculation (bench/speculation.py)
examples/stdlib-lm/perplexity.svg   the plot of the perplexities (tools/perplexity_report.py)
bench/results/comparison.svg        the plot of the comparison
bench/results/speculation_passes.svg  the plot of passes over several tokens
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from fewbits.checkpoint.config import Config
from fewbits.cli import build_parser
from fewbits.codes import CODES
from fewbits.formats import FORMATS
from fewbits.formats.compressed_tensors.config import PRESETS, act_spec, weight_spec
from fewbits.kernels import choose
from fewbits.load import inspect
from fewbits.models import FAMILIES
from fewbits.report import print_table
from fewbits.spec import QuantSpec, WeightSpec, dense

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT / "bench")]  # the first where this file isn't run as a program
EXAMPLE = "examples/stdlib-lm/w4a16-asym"
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"


def errors_page() -> str:
    lines = [
        "# Errors and warnings",
        "",
        "Every error and warning of fewbits has a code. `inspect` lists them; an error ends `run` with exit code 2.",
        "",
        "| Code | What it means | What helps |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {code.cause} | {code.cure} |" for name, code in CODES.items()]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Every command with its options, from the parser itself: --help's own layout differs between Pythons."""
    parser = build_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    lines = ["# The `fewbits` command", "", f"{parser.description} Made by `tools/generate_docs.py`.", ""]
    lines += [
        "Generated text and data go to standard output, everything else to standard error.",
        "Exit codes: 0 fine, 1 `verify` found a difference, 2 bad input or use, 3 a fault of fewbits itself,",
        "130 interrupted, 143 terminated.",
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


SHAPE = (4096, 4096)  # any ordinary shape: what runs depends on the spec


def _specs() -> Iterator[tuple[str, QuantSpec]]:
    """What people publish: unquantized weights, and the presets of llm-compressor."""
    for dtype in ("bfloat16", "float16", "float32"):
        yield dtype, QuantSpec(dense(dtype))
    for name, (weights, inputs) in PRESETS.items():
        if weights is None or name == "INT8":  # INT8 is another name of W8A8
            continue
        weight = _stored(weight_spec(Config(weights, "preset")))
        yield name, QuantSpec(weight, act_spec(Config(inputs, "preset")) if inputs else None)


def _stored(weight: WeightSpec) -> WeightSpec:
    return weight if weight.scale_dtype else replace(weight, scale_dtype="bfloat16")


def _runs(spec: QuantSpec) -> str:
    kernel = choose("linear", spec, SHAPE, allow_reference=True).kernel
    if kernel is None:
        return "refused"
    return "with `--allow-reference`" if kernel.reference else "native"


def support_tables() -> str:
    """Schemes that differ only in the bits of integer weights share a line."""
    lines: dict[tuple[str, str], list[tuple[str, QuantSpec]]] = {}
    for name, spec in _specs():
        bits = str(spec.weight.bits) if spec.weight.kind == "int" else ""
        pattern = str(spec).replace(f"int{bits} ", "int{} ", 1) if bits else str(spec)
        lines.setdefault((pattern, _runs(spec)), []).append((name, spec))
    rows = ["| Schemes | What is stored | Runs |", "|---|---|---|"]
    for (pattern, runs), members in lines.items():
        bits = ", ".join(str(spec.weight.bits) for _, spec in members)
        stored = pattern.replace("int{} ", f"int{bits} ", 1)
        rows.append(f"| {', '.join(name for name, _ in members)} | {stored} | {runs} |")
    formats = ", ".join(row.name for row in FORMATS if row.name != "dense")
    families = ", ".join(family.name for family in FAMILIES)
    return f"Formats: {formats}, and unquantized checkpoints. Families: {families}.\n\n" + "\n".join(rows) + "\n"


def inspect_table() -> str:
    text = io.StringIO()
    print_table(inspect(ROOT / EXAMPLE), text)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(["```console", f"$ .venv/bin/fewbits inspect {EXAMPLE}", *lines, "```", ""])


def perplexity_tables() -> str:
    import perplexity_report

    return perplexity_report.table(perplexity_report.Results(perplexity_report.read()))


def comparison_tables() -> str:
    import comparison
    import comparison_table

    return comparison_table.tables(comparison.read(), comparison.read_machine())


def speculation_tables() -> str:
    import speculation

    return speculation.tables() + "\n"


Sections = dict[str, Callable[[], str]]
README: Sections = {
    "support": support_tables,
    "inspect": inspect_table,
    "perplexity": perplexity_tables,
}
BENCH: Sections = {"comparison": comparison_tables, "speculation": speculation_tables}


def with_sections(page: str, sections: Sections) -> str:
    """A page with its generated sections made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, section in sections.items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{page} has no line {begin}")
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n{section()}{END}{after}"
    return text


def gallery_page() -> str:
    import gallery

    return gallery.page()


def perplexity_plot() -> str:
    import perplexity_report

    return perplexity_report.svg(perplexity_report.Results(perplexity_report.read()))


def comparison_plot() -> str:
    import comparison
    from comparison_plot import plot

    return plot(comparison.read())


def speculation_plot() -> str:
    import speculation

    return speculation.picture()


PAGES: dict[str, Callable[[], str]] = {
    "docs/errors.md": errors_page,
    "docs/cli.md": cli_page,
    "docs/gallery.md": gallery_page,
    "README.md": partial(with_sections, "README.md", README),
    "bench/README.md": partial(with_sections, "bench/README.md", BENCH),
    "examples/stdlib-lm/perplexity.svg": perplexity_plot,
    "bench/results/comparison.svg": comparison_plot,
    "bench/results/speculation_passes.svg": speculation_plot,
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
