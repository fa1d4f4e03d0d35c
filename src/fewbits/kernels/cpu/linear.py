"""cpu.dot_bf16: weight-only integers of 4 and 8 bits and unquantized weights, times float activations.

The native weight decodes codes on the way into the registers and applies scales to partial sums; its layout
is drawn in native/gemm/kernel.h. The native module is imported when a weight is packed: planning needs none
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import WHOLE, QuantSpec, WeightSpec

Array = NDArray[Any]

PANEL_ROWS = 64  # kPanelRows of native/gemm/kernel.h
_SPAN = 512  # kSpanCodes there: the products that are summed before they are scaled
_INT4_OFFSET = 136  # kInt4Offset of native/gemm/gemm_avx512_bf16.cc
_BLOCK = 1 << 19  # bytes of codes packed at a time: read and packed, they stay in a core's cache
_FLOATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_CODES_PER_WORD = {"int4": 8, "int8": 4, "bf16": 2, "f16": 2, "f32": 1}


def kind(spec: WeightSpec) -> str:
    """The native name of the codes' kind."""
    return _FLOATS[spec.number] if spec.kind == "float" else f"int{spec.bits}"


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    weight = spec.weight
    if spec.act is not None:
        return "unquantized activations"
    if not weight.quantized:
        return None if weight.number in _FLOATS else "floats of 16 or 32 bits"
    if weight.kind == "float":
        return "integer codes"
    return accepts_integers(weight, shape)


def accepts_integers(weight: WeightSpec, shape: tuple[int, int]) -> str | None:
    if weight.bits not in (4, 8):
        return "codes of 4 or 8 bits"
    if weight.act_order:
        return "weights in input order"
    if weight.zero_point == "float":
        return "integer zero points"
    rows, columns = weight.block_of(shape)
    if rows not in (1, shape[0]) or (rows != 1 and columns != shape[1]):
        return "blocks of a tensor, a row or a group of a row"
    if columns < shape[1] and columns % _CODES_PER_WORD[kind(weight)]:
        return f"groups of a multiple of {_CODES_PER_WORD[kind(weight)]} columns"
    return None


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    weight = spec.weight
    rows = -(-shape[0] // PANEL_ROWS) * PANEL_ROWS
    words = -(-shape[1] // _CODES_PER_WORD[kind(weight)])
    groups = weight.blocks_of(shape)[1] if weight.quantized else 0
    return rows * 4 * (words + groups * (2 if weight.zero_point != "none" else 1))


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """Spans of products are summed, then scaled and summed; native/gemm/kernel.h has the order."""
    from fewbits import _native

    weight, K = spec.weight, shape[1]
    number = kind(weight)
    group = min(weight.block_of(shape)[1], K) if weight.quantized else K
    spans = -(-K // group) * -(-group // _SPAN)
    bfloat16 = _native.tier() == "avx512_bf16" and number in ("int4", "int8", "bf16")
    return Arithmetic(min(group, _SPAN) + spans, bfloat16, _INT4_OFFSET if bfloat16 and number == "int4" else 0)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A native PackedWeight and its bias, float32 [N]."""

    weight: Any
    bias: Array | None

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes)


def per_row(blocks: Array | None, weight: QWeight, rows: slice) -> Array | None:
    """Scales or zero points of some rows, contiguous float32 [rows, groups]."""
    if blocks is None:
        return None
    count = rows.stop - rows.start
    own = blocks[rows] if weight.spec.block[0] != WHOLE else np.broadcast_to(blocks, (count, blocks.shape[1]))
    return np.ascontiguousarray(own, np.float32)


def pack(linear: QLinear, run: Run = at_once) -> PackedLinear:
    """Complete once the tasks that were given to `run` have ended."""
    from fewbits import _native

    weight = linear.weight
    N, K = weight.shape
    group_size = weight.spec.block_of(weight.shape)[1] if weight.spec.quantized else K
    packed = _native.PackedWeight(kind(weight.spec), N, K, min(group_size, K), weight.zero is not None)
    panel = PANEL_ROWS * -(-packed.nbytes // N)
    step = max(_BLOCK // panel, 1) * PANEL_ROWS
    for begin in range(0, N, step):
        run(partial(_fill, packed, weight, slice(begin, min(begin + step, N))))
    bias = None if linear.bias is None else np.ascontiguousarray(linear.bias, np.float32)
    return PackedLinear(packed, bias)


def _fill(packed: Any, weight: QWeight, rows: slice) -> None:
    scale, zero = per_row(weight.scale, weight, rows), per_row(weight.zero, weight, rows)
    packed.fill(rows.start, np.ascontiguousarray(weight.codes[rows]), scale, zero)


class Runner:
    """One native call for several weights that share x."""

    __slots__ = ("_K", "_N", "_address", "_run")

    def __init__(self, weights: Sequence[PackedLinear]) -> None:
        from fewbits import _native

        gemm = _native.Gemm([packed.weight for packed in weights], [packed.bias for packed in weights])
        self._run = gemm.run
        self._address = _native.address
        self._K = weights[0].weight.K
        self._N = tuple(packed.weight.N for packed in weights)

    def __call__(self, x: Array, add_to: Array | None = None) -> tuple[Array, ...]:
        M, K = x.shape
        if K != self._K or x.dtype != np.float32:
            raise ValueError(f"x must be float32 [M, {self._K}], not {x.dtype} {list(x.shape)}")
        address = self._address
        if add_to is None:
            y = tuple([np.empty((M, N), np.float32) for N in self._N])
            self._run(address(x), M, [address(one) for one in y], False)
            return y
        if len(self._N) > 1 or add_to.shape != (M, self._N[0]) or add_to.dtype != np.float32:
            raise ValueError(f"add_to must be float32 [{M}, {self._N[0]}] of a single weight")
        self._run(address(x), M, (address(add_to),), True)
        return (add_to,)


def bind(weights: Sequence[PackedLinear]) -> Runner:
    return Runner(weights)
