"""How a kernel computes: as much as it takes to say how far rounding may bring its results from the definition."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sums are float32. What the bound makes of this is in `reference/bound.py`.

    `chain`: the most float32 operations, one on the other's result, between an input and its output.
    `bfloat16_input`: unquantized x is rounded to bfloat16 before the product.
    `offset`: None where the product takes dequantized weights. Otherwise codes and zero points are multiplied
    apart and meet in the sums; decoding leaves this number in the codes, which the sums of x take out again.
    """

    chain: int
    bfloat16_input: bool = False
    offset: float | None = None
