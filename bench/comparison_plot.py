"""The plot of bench/compare.py's results as SVG: a row per variant, a panel per case, a bar per result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from comparison import FEWBITS, ROOT, Result
from comparison_table import by_variant

sys.path.append(str(ROOT / "tools"))

from svg import BAND, GRID, TEXT, document, text, ticks

PANELS = ("decode, batch 1", "decode, batch 16", "prefill 512")
LEFT, PANEL, GAP, TOP, ROW, BAR = 290, 180, 46, 62, 24, 12
COLOURS = {FEWBITS: "#1f5fa8", "other": "#9aa4af"}


def plot(rows: Sequence[Result]) -> str:
    """A bar ends at the median; a thin line spans the repeats; a tick is the limit of the variant's own bytes."""
    variants = {key: cases for key, cases in by_variant(rows).items() if any(case in cases for case in PANELS)}
    width = LEFT + len(PANELS) * (PANEL + GAP)
    groups = list(dict.fromkeys(group for group, _, _ in variants))
    tops = {key: TOP + ROW * number + 10 * groups.index(key[0]) for number, key in enumerate(variants)}
    bottom = max(tops.values(), default=TOP) + ROW
    lines = _legend()
    for group in groups[::2]:
        its = [top for key, top in tops.items() if key[0] == group]
        lines.append(f'<rect y="{its[0] - 5}" width="{width}" height="{its[-1] - its[0] + ROW + 10}" fill="{BAND}"/>')
    for (_, program, scheme), top in ((key, tops[key]) for key in variants):
        lines.append(text(f"{LEFT - 10}", top + 16, f"{program} {scheme}", "end"))
    for number, case in enumerate(PANELS):
        results = {tops[key]: cases[case] for key, cases in variants.items() if case in cases and cases[case].seconds}
        lines += _panel(LEFT + number * (PANEL + GAP), bottom, case, results)
    title = "Tokens a second of fewbits and its peers: " + "; ".join(PANELS)
    return document(width, bottom + 34, title, lines)


def _legend() -> list[str]:
    lines = []
    for at, name, words in ((LEFT, FEWBITS, FEWBITS), (LEFT + 90, "other", "peers")):
        lines.append(f'<rect x="{at}" y="9" width="12" height="{BAR}" fill="{COLOURS[name]}"/>')
        lines.append(text(f"{at + 18}", 20, words, "start"))
    lines.append(f'<path d="M{LEFT + 170} 6V24" stroke="{TEXT}" stroke-width="2"/>')
    lines.append(text(f"{LEFT + 180}", 20, "limit of its bytes and instructions on this machine", "start"))
    return lines


def _panel(left: int, bottom: int, case: str, results: dict[int, Result]) -> list[str]:
    """`results` by the top of their rows."""
    lines = [text(f"{left}", TOP - 16, f"{case}, tokens/s", "start")]
    if not results:
        return lines
    ends = [max(row.per_second[2], row.limit_per_second if row.limits else 0.0) for row in results.values()]
    scale = ticks(0.0, max(ends))
    if len(scale) > 6:
        scale = scale[::2] if len(scale) % 2 else [*scale[::2], 2 * scale[-1] - scale[-2]]

    def x(value: float) -> str:
        return f"{left + value / scale[-1] * PANEL:.1f}"

    for value in scale:
        lines.append(f'<path d="M{x(value)} {TOP - 5}V{bottom}" stroke="{GRID}"/>')
        lines.append(text(x(value), bottom + 18, f"{value:g}", "middle"))
    for top, row in results.items():
        middle, low, high = row.per_second
        colour = COLOURS.get(row.program, COLOURS["other"])
        length = f"{middle / scale[-1] * PANEL:.1f}"
        lines.append(f'<rect x="{left}" y="{top + 6}" width="{length}" height="{BAR}" fill="{colour}"/>')
        lines.append(f'<path d="M{x(low)} {top + 12}H{x(high)}" stroke="{TEXT}"/>')
        if row.limits:
            lines.append(f'<path d="M{x(row.limit_per_second)} {top + 3}v{BAR + 6}" stroke="{TEXT}" stroke-width="2"/>')
    return lines
