"""The held-out text of the example, and what its perplexity means. Without torch: every program scores alike.

Every file is encoded by itself, beginning with the begin-of-text token, which the tokenizer adds, and closed by
the end-of-text token. It is cut into windows that fill the model's positions and share one token; each window is
scored alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "stdlib-lm"
HELDOUT = EXAMPLE / "heldout"


def texts(folder: Path = HELDOUT) -> list[str]:
    """The .txt files of a folder, in the order of their names."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


def windows(
    texts: Iterable[str], encode: Callable[[str], list[int]], end_id: int, positions: int
) -> Iterator[list[int]]:
    """Windows of up to positions + 1 tokens: each token of a text but the first is predicted once."""
    for text in texts:
        ids = [*encode(text), end_id]
        for start in range(0, len(ids) - 1, positions):
            yield ids[start : start + positions + 1]


def first(windows: Iterable[list[int]], tokens: int) -> list[list[int]]:
    """So many whole windows that at least `tokens` tokens are predicted, or all there are."""
    chosen, count = [], 0
    for window in windows:
        if count >= tokens:
            break
        chosen.append(window)
        count += predicted(window)
    return chosen


def predicted(window: list[int]) -> int:
    return len(window) - 1


def nats(logits: NDArray[Any], window: list[int]) -> float:
    """-log of the probability that the logits, [tokens, vocabulary], of all but the last token give the rest."""
    targets = window[1:]
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(targets)), targets]
    return float((np.log(np.exp(wide).sum(axis=1)) - chosen).sum())
