"""What the plots have in common: text as text, the same bytes always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

TEXT, GRID, BAND = "#24292f", "#d0d7de", "#f6f8fa"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers around low … high, four to ten of them."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(factor for factor in (0.2, 0.5, 1.0, 2.0) if (high - low) / (step * factor) <= 8)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 6) for number in range(first, last + 1)]


def text(at: str, y: float, words: str, anchor: str) -> str:
    return f'<text x="{at}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def document(width: int, height: int, title: str, lines: Sequence[str]) -> str:
    """A picture of a title and elements, on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' font-family="sans-serif" font-size="13" fill="{TEXT}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *lines,
            "</svg>\n",
        ]
    )
