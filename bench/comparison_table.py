"""The tables of bench/README.md, from the CSV of bench/compare.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from comparison import CASES, FIRST_TOKEN, Fact, Result

Variants = dict[tuple[str, str, str], dict[str, Result]]  # (group, program, scheme) → case → result


def by_variant(rows: Sequence[Result]) -> Variants:
    found: Variants = {}
    for row in rows:
        found.setdefault((row.group, row.program, row.scheme), {})[row.case] = row
    return found


def tables(rows: Sequence[Result], facts: Sequence[Fact]) -> str:
    """Where it was measured; tokens a second, seconds to the first token; shares of the limit; what was skipped."""
    if not rows:
        return "There are no results yet: see below.\n"
    variants = by_variant(rows)
    measured = {key: cases for key, cases in variants.items() if "" not in cases}
    cases = [str(case) for case in CASES]
    parts = [
        *_machine(facts),
        "",
        "Tokens a second, median (least – most), and seconds from the start of a process to its first token:",
        "",
        *_table(measured, [*cases, FIRST_TOKEN], _figure),
        "",
        "Share of the limit of the variant's own bytes and instructions:",
        "",
        *_table(measured, cases, _share),
        "",
        "| Program | Version | Scheme | Activations are multiplied as |",
        "|---|---|---|---|",
    ]
    for (_, program, scheme), results in measured.items():
        row = next(iter(results.values()))
        parts.append(f"| {program} | {row.version} | {scheme} | {row.activations} |")
    notes = [
        f"- {row.program} {row.scheme}{', ' if row.case else ''}{row.case}: {row.note}" for row in rows if row.note
    ]
    if notes:
        parts += ["", "Not measured:", "", *notes]
    return "\n".join(parts) + "\n"


def _machine(facts: Sequence[Fact]) -> list[str]:
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.group, []).append(fact)
    lines = ["| Group | Measured on |", "|---|---|"]
    for group, its in groups.items():
        words = [
            f"{fact.name} {fact.value}" + (f" ({fact.low} – {fact.high})" if fact.low else "")
            for fact in its
            if fact.value
        ]
        lines.append(f"| {group} | {'; '.join(words)} |")
    return lines


def _table(variants: Variants, cases: Sequence[str], cell: Callable[[Result], str]) -> list[str]:
    lines = [f"| | {' | '.join(cases)} |", "|---|" + "--:|" * len(cases)]
    for (_, program, scheme), results in variants.items():
        cells = [cell(results[case]) if case in results and results[case].seconds else "–" for case in cases]
        lines.append(f"| {program} {scheme} | {' | '.join(cells)} |")
    return lines


def _figure(row: Result) -> str:
    if row.case == FIRST_TOKEN:
        middle, low, high = (of(row.seconds) for of in (statistics.median, min, max))
        return f"{middle:.2f} s ({low:.2f} – {high:.2f})"
    middle, low, high = row.per_second
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _share(row: Result) -> str:
    return "–" if row.share is None else f"{100 * row.share:.0f} %"
