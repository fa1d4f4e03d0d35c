"""The results of tools/perplexity.py: the CSV that keeps them, and the tables and plot made from it.

Standard library only, so that the tests can check that README and plot are fresh.
"""

from __future__ import annotations

import csv
import math
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from perplexity_plot import Mark, plot

EXAMPLE = "examples/stdlib-lm"
CSV = Path(__file__).resolve().parent.parent / EXAMPLE / "perplexity.csv"

# The name in tools/quantize_example.py → the name that people know; in the order of the table.
SCHEMES = {
    "bf16": "bfloat16",
    "w8a8": "W8A8",
    "fp8": "FP8",
    "w4a16": "W4A16",
    "w4a16-asym": "W4A16 asym",
    "nvfp4a16": "NVFP4 A16",
    "nvfp4": "NVFP4 A4",
    "mxfp4a16": "MXFP4 A16",
    "mxfp4": "MXFP4 A4",
}
QUANTIZED_ACTIVATIONS = ("w8a8", "fp8", "nvfp4", "mxfp4")
INTEGER_WEIGHTS = ("w4a16", "w4a16-asym")  # alone, so that --activations int8 changes what they do
HEADS = ("bf16", "int8", "int4")
# CONTROL is the peer once more: how far a small change moves a program from itself.
FEWBITS, PEER, CONTROL = "fewbits", "transformers", "transformers, bfloat16 cache"
FEWBITS_INT8 = "fewbits --activations int8"


@dataclass(frozen=True)
class Result:
    """One line of the CSV.

    `bytes` of the weights on disk; `model`: 12 digits of the bf16 weights' SHA-256; `windows`: (tokens predicted,
    nats they cost) of each window of text.
    """

    scheme: str
    head: str
    program: str
    perplexity: float
    tokens: int
    bytes: int
    model: str
    how: str
    windows: tuple[tuple[int, float], ...]

    @staticmethod
    def of(windows: list[tuple[int, float]], **rest: str | int) -> Result:
        tokens = sum(count for count, _ in windows)
        value = math.exp(sum(nats for _, nats in windows) / tokens)
        return Result(perplexity=value, tokens=tokens, windows=tuple(windows), **rest)  # type: ignore[arg-type]


def read(path: Path = CSV) -> list[Result]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_result(row) for row in csv.DictReader(file)]


def _result(row: dict[str, str]) -> Result:
    windows = [window.split(":") for window in row.pop("windows").split()]
    numbers = {"perplexity": float(row.pop("perplexity")), "tokens": int(row.pop("tokens"))}
    size = int(row.pop("bytes"))
    return Result(**row, **numbers, bytes=size, windows=tuple((int(count), float(nats)) for count, nats in windows))


def append(path: Path, result: Result) -> None:
    new = not path.exists()
    row = {field.name: getattr(result, field.name) for field in fields(Result)}
    row["perplexity"] = f"{result.perplexity:.6f}"
    row["windows"] = " ".join(f"{count}:{nats:.4f}" for count, nats in result.windows)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


@dataclass(frozen=True)
class Difference:
    """Of two perplexities over the same text: relative, and its standard error from window to window."""

    relative: float
    error: float

    def __str__(self) -> str:
        percent = round(100 * self.relative, 3) + 0.0  # never -0.000
        return f"{percent:+.3f} ± {100 * self.error:.3f} %"


def difference(one: Result, other: Result) -> Difference:
    pairs = [(count, a - b) for (count, a), (_, b) in zip(one.windows, other.windows, strict=True)]
    tokens = sum(count for count, _ in pairs)
    mean = sum(nats for _, nats in pairs) / tokens
    scatter = sum((nats - count * mean) ** 2 for count, nats in pairs) * len(pairs) / (len(pairs) - 1)
    return Difference(math.expm1(mean), math.sqrt(scatter) / tokens)


def bound(scheme: str) -> float:
    """How far fewbits may be from the peer: more where a code that flips changes all that follows."""
    return 3e-3 if scheme in QUANTIZED_ACTIVATIONS else 5e-4


class Results:
    """All results, by (scheme, head, program)."""

    def __init__(self, rows: list[Result]) -> None:
        self.rows = {(row.scheme, row.head, row.program): row for row in rows}
        self.tokens = rows[0].tokens

    def perplexity(self, scheme: str, head: str, program: str = FEWBITS) -> float:
        return self.rows[scheme, head, program].perplexity

    def difference(self, scheme: str, head: str, one: str = FEWBITS, other: str = PEER) -> Difference:
        return difference(self.rows[scheme, head, one], self.rows[scheme, head, other])

    def beyond(self) -> list[tuple[str, str]]:
        """The variants that differ by more than their bound."""
        variants = [(scheme, head) for scheme in SCHEMES for head in HEADS]
        return [variant for variant in variants if abs(self.difference(*variant).relative) > bound(variant[0])]


def table(results: Results) -> str:
    """The README's section."""
    rows = results.rows
    lines = [
        f"![Perplexity per scheme]({EXAMPLE}/perplexity.svg)",
        "",
        *paragraph(
            f"Perplexity of the example over {results.tokens:,} held-out tokens, by fewbits and by transformers with"
            " compressed-tensors in float32; ± is the standard error of the difference. llm-compressor rounded the"
            " weights to nearest; NVFP4 A4 is calibrated for its input scales. The head stays in bfloat16."
        ),
        "",
        "| Scheme | MB | fewbits | transformers | difference |",
        "|---|--:|--:|--:|--:|",
    ]
    for scheme, name in SCHEMES.items():
        ours, theirs = (rows[scheme, "bf16", program] for program in (FEWBITS, PEER))
        cells = [name, f"{ours.bytes / 1e6:.1f}", f"{ours.perplexity:.3f}", f"{theirs.perplexity:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {difference(ours, theirs)} |")
    lines += [
        "",
        *paragraph(
            "What a quantized head costs, measured by fewbits: `lm_head` in int8 with a scale per row, and in int4 with"
            " groups of 128. The differences are from transformers, as above."
        ),
        "",
        "| Scheme | head bf16 | int8 | cost | difference | int4 | cost | difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for scheme, name in SCHEMES.items():
        base = results.perplexity(scheme, "bf16")
        cells = [name, f"{base:.3f}"]
        for head in ("int8", "int4"):
            value = results.perplexity(scheme, head)
            cells += [f"{value:.3f}", f"{100 * (value / base - 1):+.2f} %", str(results.difference(scheme, head))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *asked_for(results), "", *notes(results)]) + "\n"


def asked_for(results: Results) -> list[str]:
    """What `--activations int8` costs."""
    lines = paragraph(
        "What `--activations int8` costs: inputs of integer weights rounded to int8, with a scale for each token and"
        " group of 128, instead of left as they are; ± as above."
    )
    lines += ["", "| Scheme | head | as stored | int8 activations | cost |", "|---|---|--:|--:|--:|"]
    for scheme in INTEGER_WEIGHTS:
        for head in HEADS:
            stored, asked = (results.perplexity(scheme, head, program) for program in (FEWBITS, FEWBITS_INT8))
            cost = results.difference(scheme, head, FEWBITS_INT8, FEWBITS)
            lines.append(f"| {SCHEMES[scheme]} | {head} | {stored:.3f} | {asked:.3f} | {cost} |")
    return lines


def notes(results: Results) -> list[str]:
    """Why two programs differ at all."""
    control = [
        f"{results.difference(scheme, 'bf16', CONTROL)} ({name})"
        for scheme, name in SCHEMES.items()
        if scheme in QUANTIZED_ACTIVATIONS
    ]
    lines = paragraph(
        "Where activations are quantized, the last bit of a sum now and then decides a code, and all that follows is"
        " quantized otherwise, so that two programs seldom agree to the last digit. fewbits keeps keys and values in"
        " bfloat16, transformers in float32; with these rounded to bfloat16 as well, transformers differs from itself"
        f" by {', '.join(control)}. And fewbits quantizes int8 activations by absmax / 127 as engines do,"
        " compressed-tensors by absmax / 127.5."
    )
    for scheme, name in SCHEMES.items():
        heads = [head for beyond, head in results.beyond() if beyond == scheme]
        if not heads:
            continue
        text = f"{name} (head in {', '.join(heads)}) is beyond the bound of {100 * bound(scheme):g} %"
        if all((scheme, head, CONTROL) in results.rows for head in heads):
            apart = ", ".join(str(results.difference(scheme, head, other=CONTROL)) for head in heads)
            text += f"; from transformers with keys and values in bfloat16 it differs by {apart}"
        lines += ["", *paragraph(text + ".")]
    return lines


def paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def svg(results: Results) -> str:
    marks = [
        Mark(name, results.perplexity(scheme, head), results.perplexity(scheme, head, PEER), head)
        for scheme, name in SCHEMES.items()
        for head in HEADS
    ]
    return plot(marks, list(SCHEMES.values()), HEADS, results.tokens)
