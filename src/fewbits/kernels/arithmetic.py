"""How a kernel computes: as much as it takes to say how far rounding may bring its results from the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Dot = Literal["f32", "bf16", "int8"]  # the instruction that multiplies, and so the peak that a kernel can reach
DOTS: tuple[Dot, ...] = get_args(Dot)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sums are float32. What the bound makes of this is in `reference/bound.py`.

    `chain`: the most float32 operations, one on the other's result, between an input and its output.
    `bfloat16_input`: unquantized x is rounded to bfloat16 before the product.
    `int8_dot`: int8 codes of x are multiplied with those of the weight.
    `row_zero`: zero points of x are multiplied with the weight's row sums apart from the codes.
    `offset`: None where the product takes dequantized weights. Otherwise codes and zero points are multiplied
    apart and meet in the sums; decoding leaves this number in the codes, which the sums of x take out again.
    """

    chain: int
    bfloat16_input: bool = False
    offset: float | None = None
    int8_dot: bool = False
    row_zero: bool = False

    @property
    def dot(self) -> Dot:
        return "int8" if self.int8_dot else "bf16" if self.bfloat16_input else "f32"
