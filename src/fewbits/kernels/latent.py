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
from fewbits.spec import HeadRows, QuantSpec, WeightSpec, dense

Array = NDArray[Any]


class Halves(NamedTuple):
    """Of each head: the product that makes latents of queries [rank, key], the one that makes values [value, rank]."""

    keys: list[QLinear]
    values: list[QLinear]


def runs_as(spec: WeightSpec) -> QuantSpec:
    """What the halves are: as stored where that can be transposed, else dequantized."""
    return QuantSpec(dense("bfloat16") if spec.quantized else spec)


def nbytes(kernel: Kernel, spec: WeightSpec, shape: tuple[int, int], rows: HeadRows) -> int:
    """What the halves of a product [N, rank] take in memory."""
    N, rank = shape
    of_head = sum(kernel.nbytes(runs_as(spec), one) for one in ((rank, rows.keys), (rows.values, rank)))
    return N // sum(rows) * of_head


def halves(linear: QLinear, rows: HeadRows, exact: bool = False) -> Halves:
    """In the spec of `runs_as`, or with `exact` in float64. Codes of `linear` are an array."""
    weight = linear.weight
    codes, spec = weight.codes, weight.spec
    if exact:
        codes, spec = weight.dequantize(), dense("float64")
    elif spec.quantized:
        codes, spec = weight.dequantize().astype(ml_dtypes.bfloat16).view(np.uint16), dense("bfloat16")
    keys, values = [], []
    for begin in range(0, len(codes), rows.keys + rows.values):
        middle, end = begin + rows.keys, begin + rows.keys + rows.values
        keys.append(_dense(np.ascontiguousarray(codes[begin:middle].T), spec))
        bias = None if linear.bias is None else linear.bias[middle:end]
        values.append(replace(_dense(np.ascontiguousarray(codes[middle:end]), spec), bias=bias))
    return Halves(keys, values)


def _dense(codes: Array, spec: WeightSpec) -> QLinear:
    return QLinear(QWeight(spec, (codes.shape[0], codes.shape[1]), codes))


def quantized_latents(linear: QLinear) -> Callable[[Array], Array]:
    """float32 [T, rank] → the same numbers as the product's input is quantized, or as they are."""
    act, static = linear.act, reference.statics(linear)
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
