"""The product that makes of latents each head's keys and values (MLA's kv_b), taken apart and absorbed.

    scores   q_h . (K_h c) = (K_h^T q_h) . c        K_h [key, rank], the head's part of a query q_h [key]
    values   sum_j p_j (V_h c_j) = V_h (sum_j p_j c_j)

So attention looks at latents c [rank], which the cache keeps instead of every head's keys and values. Where the product
has its input quantized, c is what the quantization makes of the latent: in exact arithmetic nothing else is computed.
A bias of keys adds the same to all scores of a query, and so nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.kernels import Kernel, Param, bind_apart
from fewbits.kernels.reference import linear as reference
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import WHOLE, HeadRows, QuantSpec, WeightSpec, dense

Array = NDArray[Any]


class Halves(NamedTuple):
    """Of each head: the product that makes latents of queries [rank, key], the one that makes values [value, rank]."""

    keys: list[QLinear]
    values: list[QLinear]


def runs_as(spec: WeightSpec) -> QuantSpec:
    """What the halves are: as stored where that can be transposed, which takes codes of a byte and one scale for all of
    them; else dequantized.
    """
    whole = spec.block == (WHOLE, WHOLE) and spec.bits == 8 and spec.zero_point == "none" and not spec.act_order
    return QuantSpec(spec if whole or not spec.quantized else dense("bfloat16"))


def nbytes(kernel: Kernel, spec: WeightSpec, shape: tuple[int, int], rows: HeadRows) -> int:
    """What the halves of a product [N, rank] take in memory."""
    N, rank = shape
    of_head = sum(kernel.nbytes(runs_as(spec), one) for one in ((rank, rows.keys), (rows.values, rank)))
    return N // sum(rows) * of_head


def halves(linear: QLinear, rows: HeadRows, exact: bool = False) -> Halves:
    """In the spec of `runs_as`, or with `exact` in float64. Codes of `linear` are an array."""
    weight = linear.weight
    if exact:
        weight = QWeight(dense("float64"), weight.shape, weight.dequantize())
    elif runs_as(weight.spec).weight != weight.spec:
        codes = weight.dequantize().astype(ml_dtypes.bfloat16).view(np.uint16)
        weight = QWeight(dense("bfloat16"), weight.shape, codes)

    def part(codes: Array, bias: Array | None = None) -> QLinear:
        shape = (codes.shape[0], codes.shape[1])
        return QLinear(replace(weight, shape=shape, codes=np.ascontiguousarray(codes)), bias=bias)

    keys, values = [], []
    for begin in range(0, weight.shape[0], sum(rows)):
        middle, end = begin + rows.keys, begin + sum(rows)
        keys.append(part(weight.codes[begin:middle].T))
        values.append(part(weight.codes[middle:end], None if linear.bias is None else linear.bias[middle:end]))
    return Halves(keys, values)


def quantized_latents(linear: QLinear) -> Callable[[Array], Array]:
    """float32 [T, rank] → the same numbers as the product's input is quantized, or as they are."""
    act, static = linear.act, reference.statics(linear)
    if act is None:
        return lambda latents: latents
    return lambda latents: reference.input_of(np.asarray(latents), act, static)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLatents:
    """The product, packed in halves: `ops.Latents`."""

    keys: Sequence[Param]
    values: Sequence[Param]
    taken: Callable[[Array], Array]

    @property
    def nbytes(self) -> int:
        return sum(int(packed.nbytes) for _, packed in (*self.keys, *self.values))

    def bind(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        return bind_apart(self.keys), bind_apart(self.values)


def pack(linear: QLinear, rows: HeadRows, kernel: Kernel, run: Run = at_once) -> PackedLatents:
    """Complete once the tasks that were given to `run` have ended. In the reference nothing is rounded."""
    made = halves(linear, rows, exact=kernel.reference)
    keys, values = ([(kernel, kernel.pack(half, run)) for half in part] for part in made)
    return PackedLatents(keys, values, quantized_latents(linear))
