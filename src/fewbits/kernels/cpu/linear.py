"""cpu.dot_int8, cpu.dot_int16 and cpu.dot_bf16: products of packed weights with x, as integers or as floats.

The native weight decodes codes on the way into the registers and applies scales to partial sums; its layout
is drawn in native/gemm/kernel.h. x is quantized by the native module too, by the reference's formulas. The native
module is imported when a weight is packed: planning needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import INT16_GROUP, Arithmetic
from fewbits.kernels.cpu.container import PANEL_ROWS, Container, codes_of, container, scales_of, zeros_of
from fewbits.kernels.formulas import formula
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import QuantSpec

Array = NDArray[Any]

_SPAN = 512  # kSpanCodes of native/gemm/kernel.h: the products that are summed before they are scaled
_INTEGER_OFFSETS = {"int4": 8, "int8": 128}  # codes are multiplied as they are stored, offset-binary
_BF16_OFFSETS = {"int4": 136, "int8": 128}  # of Bf16 in native/gemm/gemm_avx512_bf16.cc
_BLOCK = 1 << 19  # bytes of codes packed at a time: read and packed, they stay in a core's cache
_FP4 = ("nvfp4", "mxfp4")  # of x: doubled, they and codes of fp4 are integers
_WITH_ZERO = ("int8_token_asymmetric", "int8_static_asymmetric")


def _container(spec: QuantSpec, shape: tuple[int, int]) -> Container | str:
    return container(spec.weight, shape, spec.act.group_size or 0 if spec.act else 0)


def _integers(spec: QuantSpec, shape: tuple[int, int]) -> Literal["int8", "int16"] | None:
    """The dot of integer codes with x, where x has integer codes too or is left as it is; and of fp4 with fp4."""
    found = _container(spec, shape)
    if isinstance(found, str):
        return None
    integers = found.kind in _INTEGER_OFFSETS
    if spec.act is None:
        return "int16" if integers else None
    how = formula(spec.act) or ""
    return "int8" if (integers and how.startswith("int8")) or (found.kind == "fp4" and how in _FP4) else None


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    found = _container(spec, shape)
    if isinstance(found, str):
        return found
    if spec.act is None:
        return None
    if formula(spec.act) is None:
        return "activations whose quantization is defined"
    if spec.weight.act_order and spec.act.group_size:
        return "activations in groups beside weights in input order"
    return None


def accepts_int8(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    integers = spec.act is not None and _integers(spec, shape)
    return accepts(spec, shape) if integers else "integer weights and int8 activations, or fp4 and fp4"


def accepts_int16(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    integers = spec.act is None and _integers(spec, shape)
    return None if integers else "integer weights and unquantized activations"


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    found = _container(spec, shape)
    assert not isinstance(found, str)
    return found.nbytes(shape)


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """Spans of products are summed, then scaled and summed; native/gemm/kernel.h has the order."""
    from fewbits import _native

    found = _container(spec, shape)
    assert not isinstance(found, str)
    integers = _integers(spec, shape)
    K = shape[1]
    x_group = INT16_GROUP if integers == "int16" else (spec.act and spec.act.group_size) or K
    span = min(found.group, x_group, _SPAN)
    spans = -(-K // found.group) + -(-K // x_group) + -(-K // _SPAN)
    row_zero = spec.act is not None and formula(spec.act) in _WITH_ZERO
    if integers == "int8":  # sums of codes are exact
        return Arithmetic(spans, "int8", row_zero=row_zero)
    if integers == "int16":
        return Arithmetic(span + spans, "int16", _INTEGER_OFFSETS[found.kind])
    bfloat16 = _native.tier() == "avx512_bf16" and found.kind not in ("f16", "f32")
    offset = _BF16_OFFSETS.get(found.kind)
    if offset is not None and not bfloat16:
        offset = 0
    return Arithmetic(span + spans, "bf16" if bfloat16 else "f32", offset, row_zero)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A native PackedWeight, what else the product takes, and float32 [N] sums of its rows where x has zero points.

    `linear`'s codes aren't looked at any more.
    """

    weight: Any
    bias: Array | None
    quantizer: dict[str, Any]
    order: Array | None
    row_sums: Array | None

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes)

    def product(self) -> Any:
        from fewbits import _native

        return _native.Product(self.weight, self.bias, **self.quantizer, order=self.order, row_sums=self.row_sums)


def pack(linear: QLinear, run: Run = at_once) -> PackedLinear:
    """Complete once the tasks that were given to `run` have ended."""
    from fewbits import _native

    weight = linear.weight
    N, K = weight.shape
    found = _container(linear.spec, weight.shape)
    assert not isinstance(found, str)
    packed = _native.PackedWeight(found.kind, N, K, found.group, found.scale, found.shared, found.zero)
    quantizer = _quantizer(linear)
    row_sums = np.empty(N, np.float32) if quantizer.get("quantizer") in _WITH_ZERO else None
    panel = PANEL_ROWS * -(-packed.nbytes // N)
    step = max(_BLOCK // panel, 1) * PANEL_ROWS
    for begin in range(0, N, step):
        run(partial(_fill, packed, weight, found, slice(begin, min(begin + step, N)), row_sums))
    bias = None if linear.bias is None else np.ascontiguousarray(linear.bias, np.float32)
    order = None if weight.perm is None else np.ascontiguousarray(weight.perm, np.int32)
    return PackedLinear(packed, bias, quantizer, order, row_sums)


def _quantizer(linear: QLinear) -> dict[str, Any]:
    """Keywords of native Product."""
    keywords: dict[str, Any] = {"multiplier": linear.weight.global_scale or 1.0}
    act = linear.act
    if act is None:
        if _integers(linear.spec, linear.weight.shape):
            keywords |= {"quantizer": "int16_group", "group_size": INT16_GROUP}
        return keywords
    keywords["quantizer"] = formula(act)
    if act.per == "group":
        keywords |= {"group_size": act.group_size, "scale_rounding": act.scale_rounding}
    if not act.dynamic:
        if linear.input_scale is None:
            raise ValueError("a static activation scale is missing")
        keywords["scale"] = linear.input_scale
        keywords["zero"] = linear.input_zero or 0
    if act.global_scale:
        if linear.input_global_scale is None:
            raise ValueError("a static activation scale is missing")
        keywords["global_scale"] = linear.input_global_scale
    return keywords


def _fill(packed: Any, weight: QWeight, found: Container, rows: slice, row_sums: Array | None) -> None:
    zero = zeros_of(weight, rows) if found.zero else None
    packed.fill(rows.start, codes_of(weight, rows, found.kind), scales_of(weight, rows, found.scale), zero)
    if row_sums is not None:
        values = weight.rows(rows.start, rows.stop).dequantize()
        row_sums[rows] = values.sum(axis=1) / (weight.global_scale or 1.0)


def bind(weights: Sequence[PackedLinear], apart: bool = False) -> Any:
    from fewbits.kernels.cpu.runner import Runner

    widths = [packed.weight.N for packed in weights]
    return Runner([packed.product() for packed in weights], [sum(widths)] if apart else widths, apart)
