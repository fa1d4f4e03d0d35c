"""How a weight's codes lie in native memory: few kinds of codes hold every number format without rounding.

    native kind   codes of                                              a group is a multiple of
    int4          integers of 1 to 4 bits                               8 columns
    int8          integers of 5 to 8 bits                               4
    fp4           e2m1                                                  8
    fp8           e4m3; e2m3 and e3m2, whose values e4m3 has            4
    bf16          bfloat16; e5m2; what doesn't fit its own kind's words 2
    f16, f32      float16, float32; groups of an odd number of columns  2, 1

Narrower integers keep their distance from the middle of the range: in a wider kind it is the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.qweight import CODE_DTYPES, QWeight, pack_nibbles, unpack_nibbles
from fewbits.spec import WHOLE, WeightSpec

Array = NDArray[Any]

PANEL_ROWS = 64  # kPanelRows of native/gemm/kernel.h
CODES_PER_WORD = {"int4": 8, "int8": 4, "fp4": 8, "fp8": 4, "bf16": 2, "f16": 2, "f32": 1}

_DENSE = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_FLOATS = {(2, 1): "fp4", (4, 3): "fp8", (2, 3): "fp8", (3, 2): "fp8", (5, 2): "bf16"}
_WIDER = {"int4": "int8", "int8": "bf16", "fp4": "bf16", "fp8": "bf16", "bf16": "f32"}
_SCALES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("bf16", np.uint16),
    "float16": ("f16", np.uint16),
    "float8_e4m3fn": ("e4m3", np.uint8),
    "float8_e8m0fnu": ("e8m0", np.uint8),
}
_SCALE_BYTES = {"none": 0, "f32": 4, "bf16": 2, "f16": 2, "e4m3": 1, "e8m0": 1}


@dataclass(frozen=True, slots=True)
class Container:
    """A weight's native kind, and its parameters: `group` columns share a scale of type `scale`, all rows of each
    panel do too where `shared`; `zero` says whether zero points are kept beside it.
    """

    kind: str
    group: int
    scale: str
    shared: bool
    zero: bool

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed weight [N, K]."""
        panels = -(-shape[0] // PANEL_ROWS)
        words = -(-shape[1] // CODES_PER_WORD[self.kind])
        groups = -(-shape[1] // self.group)
        scales = _SCALE_BYTES[self.scale] * (1 if self.shared else PANEL_ROWS)
        return panels * (4 * PANEL_ROWS * words + groups * (scales + PANEL_ROWS * self.zero))


def container(weight: WeightSpec, shape: tuple[int, int], x_group: int = 0) -> Container | str:
    """Where a weight [N, K] goes that is multiplied with x scaled in groups of `x_group` columns (0: as a whole);
    or the sentence which weights can.
    """
    if not weight.quantized:
        kind = _DENSE.get(weight.number)
        if kind is None:
            return "floats of 16 or 32 bits"
        group, scale, shared = shape[1], "none", False
    else:
        if weight.zero_point == "float":
            return "integer zero points"
        if weight.kind != "float":
            kind = "int4" if weight.bits <= 4 else "int8"
        else:
            kind = _FLOATS.get((weight.exponent, weight.mantissa))
        if kind is None or weight.bits > 8:
            return "codes of at most 8 bits"
        rows, columns = weight.block_of(shape)
        group = min(columns, shape[1])
        scale = _SCALES.get(weight.scale_dtype or "", ("f32", np.float32))[0]
        shared = rows == shape[0] or rows % PANEL_ROWS == 0
    if x_group >= shape[1]:
        x_group = 0
    while any(size % CODES_PER_WORD[kind] for size in (x_group, group if group < shape[1] else 0)):
        if kind not in _WIDER:
            return f"groups of a multiple of {CODES_PER_WORD[kind]} columns"
        kind = _WIDER[kind]
    zero = weight.zero_point == "integer" and kind in ("int4", "int8")
    return Container(kind, group, scale, shared, zero)


def codes_of(weight: QWeight, rows: slice, kind: str) -> Array:
    """Codes of some rows as the native kind wants them: uint8, uint16 or float32, C-contiguous."""
    spec = weight.spec
    codes = weight.codes[rows]
    if not spec.quantized or kind == _native_kind(spec):
        return np.ascontiguousarray(codes)
    columns = weight.shape[1]
    if spec.bits == 4:
        codes = unpack_nibbles(codes, columns)
    if kind in ("int4", "int8"):
        codes = codes + np.uint8((8 if kind == "int4" else 128) - (1 << (spec.bits - 1)))
        return pack_nibbles(codes) if kind == "int4" else codes
    if spec.kind == "float":
        return _floats(spec.exponent, spec.mantissa, kind)[codes]
    numbers = codes.astype(np.float32)
    zero = weight.zero[rows if spec.block[0] == 1 else slice(None)] if weight.zero is not None else None
    if zero is None:
        numbers -= 1 << (spec.bits - 1)
    else:
        numbers -= np.repeat(zero.astype(np.float32), min(spec.block[1] or columns, columns), axis=1)[:, :columns]
    return numbers if kind == "f32" else numbers.astype(ml_dtypes.bfloat16).view(np.uint16)


def _native_kind(spec: WeightSpec) -> str | None:
    """The kind whose codes are the canonical ones, bit for bit."""
    if spec.kind != "float":
        return {4: "int4", 8: "int8"}.get(spec.bits)
    return {(2, 1): "fp4", (4, 3): "fp8"}.get((spec.exponent, spec.mantissa))


@cache
def _floats(exponent: int, mantissa: int, kind: str) -> Array:
    """Every code of a small float in another kind that holds its value."""
    dtype = CODE_DTYPES[exponent, mantissa]
    values = np.arange(1 << (1 + exponent + mantissa), dtype=np.uint8).view(dtype).astype(np.float32)
    targets: dict[str, tuple[Any, Any]] = {
        "fp8": (ml_dtypes.float8_e4m3fn, np.uint8),
        "bf16": (ml_dtypes.bfloat16, np.uint16),
        "f32": (np.float32, np.float32),
    }
    number, stored = targets[kind]
    codes: Array = values.astype(number).view(stored)
    return codes


def parameters(blocks: Array, weight: QWeight, rows: slice) -> Array:
    """Scales or zero points of some rows, one for each row: [rows, groups], C-contiguous, in their own dtype."""
    height = weight.spec.block[0]
    count = rows.stop - rows.start
    if height == WHOLE:
        return np.ascontiguousarray(np.broadcast_to(blocks, (count, blocks.shape[1])))
    if height == 1:
        return np.ascontiguousarray(blocks[rows])
    return np.ascontiguousarray(blocks[np.arange(rows.start, rows.stop) // height])


def scales_of(weight: QWeight, rows: slice, scale: str) -> Array | None:
    """Scales of some rows as the container's type wants them."""
    if weight.scale is None:
        return None
    values = parameters(weight.scale, weight, rows)
    if scale == "f32":
        with np.errstate(over="ignore"):  # beyond float32: infinite, and the results say so
            return np.ascontiguousarray(values, np.float32)
    stored: Array = values.view(_SCALES[weight.scale.dtype.name][1])
    return stored


def zeros_of(weight: QWeight, rows: slice) -> Array | None:
    """Zero points of some rows, int8, relative to the middle of the range."""
    if weight.zero is None:
        return None
    values = parameters(weight.zero, weight, rows)
    return (values.astype(np.int16) - (1 << (weight.spec.bits - 1))).astype(np.int8)
