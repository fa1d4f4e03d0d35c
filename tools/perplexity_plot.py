"""The plot of tools/perplexity_report.py as SVG: one line per scheme and head, text as text, the same bytes always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svg import BAND, GRID, TEXT, document, text, ticks

LEFT, RIGHT, TOP, ROW, WIDTH = 110, 30, 62, 40, 760
LANE = 10  # between the heads of one scheme
COLOURS = {"bf16": "#1f5fa8", "int8": "#2e8b57", "int4": "#d2691e"}


@dataclass(frozen=True)
class Mark:
    """Where fewbits and its peer stand, on the line of a scheme and a head."""

    scheme: str
    fewbits: float
    peer: float
    head: str


def plot(marks: Sequence[Mark], schemes: Sequence[str], heads: Sequence[str], tokens: int) -> str:
    values = [value for mark in marks for value in (mark.fewbits, mark.peer)]
    scale = ticks(min(values), max(values))
    bottom = TOP + ROW * len(schemes)

    def x(value: float) -> str:
        return f"{LEFT + (value - scale[0]) / (scale[-1] - scale[0]) * (WIDTH - LEFT - RIGHT):.1f}"

    lines = []
    for number, head in enumerate(heads):
        at = LEFT + 130 * number
        lines.append(f'<circle cx="{at}" cy="20" r="4.5" fill="{COLOURS[head]}"/>')
        lines.append(text(f"{at + 12}", 24.5, f"head in {head}", "start"))
    at = LEFT + 130 * len(heads)
    lines.append(f'<circle cx="{at}" cy="20" r="4.5" fill="{TEXT}"/>')
    lines.append(text(f"{at + 10}", 24.5, "fewbits", "start"))
    lines.append(f'<circle cx="{at + 78}" cy="20" r="6.5" fill="none" stroke="{TEXT}"/>')
    lines.append(text(f"{at + 90}", 24.5, "transformers", "start"))
    for value in scale:
        lines.append(f'<path d="M{x(value)} {TOP - LANE}V{bottom - LANE}" stroke="{GRID}"/>')
        lines.append(text(x(value), bottom + 8, f"{value:g}", "middle"))
    lines.append(
        text(f"{(LEFT + WIDTH - RIGHT) // 2}", bottom + 36, "perplexity per token (lower is better)", "middle")
    )
    for number, scheme in enumerate(schemes):
        if number % 2 == 0:
            band = f'<rect y="{TOP - LANE + ROW * number}" width="{WIDTH}" height="{ROW}" fill="{BAND}"/>'
            lines.insert(0, band)
        lines.append(text(f"{LEFT - 14}", TOP + ROW * number + LANE + 4.5, scheme, "end"))
    for mark in marks:
        y = TOP + ROW * list(schemes).index(mark.scheme) + LANE * list(heads).index(mark.head)
        colour = COLOURS[mark.head]
        lines.append(f'<circle cx="{x(mark.peer)}" cy="{y}" r="6.5" fill="none" stroke="{colour}"/>')
        lines.append(f'<circle cx="{x(mark.fewbits)}" cy="{y}" r="3.5" fill="{colour}"/>')
    title = f"Perplexity of the example over {tokens} tokens, by scheme and head"
    return document(WIDTH, bottom + 38, title, lines)
