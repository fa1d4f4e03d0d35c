"""How a kernel computes: as much as it takes to say how far rounding may bring its results from the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# The instruction that multiplies, and so the peak that a kernel can reach.
Dot = Literal["f32", "bf16", "int8", "int16"]
DOTS: tuple[Dot, ...] = get_args(Dot)

INT16_GROUP = 128  # columns of x that share a scale where x is taken as integers of 16 bits


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sums are float32. What the bound makes of this is in `reference/bound.py`.

    `chain`: the most float32 operations, one on the other's result, between an input and its output.
    `dot`: as what x is multiplied. Unquantized x is rounded to bfloat16 (`bf16`), or taken as integers of 16 bits with
    a scale for each INT16_GROUP columns (`int16`).
    `row_zero`: zero points of x are multiplied with the weight's row sums apart from the codes.
    `offset`: None where the product takes dequantized weights. Otherwise codes and zero points are multiplied
    apart and meet in the sums; decoding leaves this number in the codes, which the sums of x take out again.
    """

    chain: int
    dot: Dot = "f32"
    offset: float | None = None
    row_zero: bool = False
