"""QWeight: the one canonical form that every format is decoded into.

    value[n, k] = (decode(codes[n, k]) - zero[i, j]) x scale[i, j] x global_scale
    with i = n // block rows, j = k' // block columns, k' the place of input k in `perm`'s order

Containers:
    4-bit codes (int4, uint4, fp4)   uint8 [N, ceil(K/2)], low nibble = even column
    every other quantized code       uint8 [N, K]
    bfloat16, float16                uint16 [N, K] bit patterns;  float32, float64: themselves
Integer codes are offset-binary: unsigned, with a scalar zero of 2^(bits-1) when symmetric. Float codes are bit
patterns. Scales are multipliers, in the dtype that was stored (E8M0 as float8_e8m0fnu).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.spec import WHOLE, ActSpec, QuantSpec, WeightSpec, dense

Array = NDArray[Any]

_DENSE_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CODE_DTYPES = {
    (2, 1): ml_dtypes.float4_e2m1fn,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
}


def unpack_nibbles(packed: Array, columns: int) -> Array:
    """uint8 [N, ceil(columns/2)] → uint8 [N, columns]; low nibble first."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes[:, :columns]


def pack_nibbles(codes: Array) -> Array:
    """uint8 [N, K] of values below 16 → uint8 [N, ceil(K/2)]; low nibble first, an odd end padded with 0."""
    rows, columns = codes.shape
    packed = np.zeros((rows, (columns + 1) // 2), np.uint8)
    packed |= codes[:, 0::2]
    packed[:, : columns // 2] |= codes[:, 1::2] << 4
    return packed


@dataclass(frozen=True, slots=True, eq=False)
class QWeight:
    """A weight `[N, K]` in canonical form. Arrays are as the module docstring says; nothing is checked here.

    `scale` and `zero` have shape [ceil(N/rows), ceil(K/columns)] of the spec's block; `zero` is None when
    symmetric, else uint8 offset-binary (float32 for float zero points). `perm` (int64 [K]) is set for act-order:
    stored column j is input column perm[j]. Codes of a weight that is being loaded may still lie in its file
    (`formats.blocks`): then only slices of rows can be taken of them.
    """

    spec: WeightSpec
    shape: tuple[int, int]
    codes: Array
    scale: Array | None = None
    zero: Array | None = None
    global_scale: float | None = None
    perm: Array | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.codes, self.scale, self.zero, self.perm)
        return sum(int(array.nbytes) for array in arrays if array is not None)

    def unpacked(self) -> Array:
        """Codes one by one, [N, K], in stored column order."""
        if self.spec.quantized and self.spec.bits == 4:
            return unpack_nibbles(self.codes, self.shape[1])
        return self.codes

    def _numbers(self) -> Array:
        """Decoded codes before zero point and scale, [N, K]: integers still offset-binary. float64."""
        codes = self.unpacked()
        if self.spec.kind != "float":
            return codes.astype(np.float64)
        if self.spec.quantized:
            dtype = CODE_DTYPES[self.spec.exponent, self.spec.mantissa]
            numbers: Array = codes.view(dtype).astype(np.float64)
            return numbers
        if self.spec.number in _DENSE_DTYPES:
            codes = codes.view(_DENSE_DTYPES[self.spec.number])
        return codes.astype(np.float64)

    def spread(self, blocks: Array) -> Array:
        """One value a block → one value a weight (as a broadcastable view where the block spans an axis)."""
        rows, columns = self.spec.block
        if rows not in (WHOLE, 1):
            blocks = np.repeat(blocks, min(rows, self.shape[0]), axis=0)[: self.shape[0]]
        if columns not in (WHOLE, 1):
            blocks = np.repeat(blocks, min(columns, self.shape[1]), axis=1)[:, : self.shape[1]]
        return blocks

    def _in_input_order(self, values: Array) -> Array:
        if self.perm is None:
            return values
        restored = np.empty_like(values)
        restored[:, self.perm] = values
        return restored

    def dequantize(self, rounding: Literal["exact", "producer"] = "exact") -> Array:
        """The weight, [N, K].

        "exact": float64, the definition. "producer": rounded as the owner's library rounds its own
        decompression, in that library's dtype (compressed-tensors: integers and FP8 in the dtype of the scale,
        FP4 and MX in bfloat16), equal to it bit for bit.
        """
        if not self.spec.quantized:
            if rounding == "producer":
                return self.codes.view(_DENSE_DTYPES.get(self.spec.number, self.codes.dtype))
            return self._numbers()
        assert self.scale is not None
        values = self._producer() if rounding == "producer" else self._exact()
        return self._in_input_order(values)

    def _exact(self) -> Array:
        assert self.scale is not None
        values = self._numbers()
        if self.zero is not None:
            values = values - self.spread(self.zero.astype(np.float64))
        elif self.spec.kind != "float":
            values = values - float(1 << (self.spec.bits - 1))
        values = values * self.spread(self.scale.astype(np.float64))
        return values if self.global_scale is None else values * self.global_scale

    def _producer(self) -> Array:
        assert self.scale is not None
        spec = self.spec
        numbers = self._numbers()
        if spec.kind == "float" and (spec.bits == 4 or spec.scale_dtype == "float8_e8m0fnu"):
            scale = self.scale.astype(np.float32)
            if self.global_scale is not None:
                # The producer divides by its stored divisor in float32; the float64 reciprocal rounds to the same.
                scale = (scale.astype(np.float64) * self.global_scale).astype(np.float32)
                return (numbers.astype(np.float32) * self.spread(scale)).astype(ml_dtypes.bfloat16)
            return numbers.astype(ml_dtypes.bfloat16) * self.spread(scale.astype(ml_dtypes.bfloat16))
        dtype = self.scale.dtype
        if spec.kind != "float":
            half = float(1 << (spec.bits - 1))
            numbers = (numbers - half).astype(dtype)
            if self.zero is not None:
                numbers = numbers - self.spread((self.zero.astype(np.float64) - half).astype(dtype))
        return numbers.astype(dtype) * self.spread(self.scale)

    def in_float32(self) -> QWeight:
        """The same numbers, of a weight that isn't quantized and is an array."""
        codes = self.codes.view(_DENSE_DTYPES.get(self.spec.number, self.codes.dtype))
        return replace(self, spec=dense("float32"), codes=codes.astype(np.float32))

    def evens_first(self) -> QWeight:
        """Rows 0, 2, 4 … and behind them 1, 3, 5 …; blocks may not span some of the rows."""
        if self.spec.block[0] > 1:
            raise ValueError(f"rows of {self.spec} can't change places")

        def ordered(array: Array | None) -> Array | None:
            if array is None or self.spec.block[0] == WHOLE:
                return array
            return np.concatenate((array[0::2], array[1::2]))

        codes = np.concatenate((self.codes[0::2], self.codes[1::2]))
        return replace(self, codes=codes, scale=ordered(self.scale), zero=ordered(self.zero))

    def rows(self, begin: int, end: int) -> QWeight:
        """Rows [begin, end); `begin` must lie on a block border."""
        height = self.spec.block[0]
        if height not in (WHOLE, 1) and begin % height:
            raise ValueError(f"row {begin} isn't on a border of blocks of {height} rows")

        def cut(blocks: Array | None) -> Array | None:
            if blocks is None or height == WHOLE:
                return blocks
            return blocks[begin // height : -(-end // height)]

        return replace(
            self,
            shape=(end - begin, self.shape[1]),
            codes=self.codes[begin:end],
            scale=cut(self.scale),
            zero=cut(self.zero),
        )

    def cols(self, begin: int, end: int) -> QWeight:
        """Columns [begin, end); `begin` must lie on a block border and, with act-order, is not allowed."""
        width = self.spec.block[1]
        if self.perm is not None:
            raise ValueError("columns of an act-ordered weight can't be cut")
        if width not in (WHOLE, 1) and begin % width:
            raise ValueError(f"column {begin} isn't on a border of blocks of {width} columns")

        def cut(blocks: Array | None) -> Array | None:
            if blocks is None or width == WHOLE:
                return blocks
            return blocks[:, begin // width : -(-end // width)]

        nibbles = self.spec.quantized and self.spec.bits == 4
        if nibbles:
            codes = pack_nibbles(self.unpacked()[:, begin:end])
        else:
            codes = self.codes[:, begin:end]
        return replace(
            self,
            shape=(self.shape[0], end - begin),
            codes=codes,
            scale=cut(self.scale),
            zero=cut(self.zero),
        )


@dataclass(frozen=True, slots=True, eq=False)
class QLinear:
    """A stored projection, decoded: weight, bias and the static scales of its input.

    `bias` is float32 [N]. `input_scale` multiplies int8 or fp8 codes of x (static schemes); `input_zero` is the
    int8 zero point beside it; `input_global_scale` is a multiplier (the stored divisor's reciprocal, float64).
    """

    weight: QWeight
    act: ActSpec | None = None
    bias: Array | None = None
    input_scale: float | None = None
    input_zero: int | None = None
    input_global_scale: float | None = None

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.weight.spec, self.act)

    def evens_first(self) -> QLinear:
        """With its rows, and so its bias, as in `QWeight.evens_first`."""
        bias = None if self.bias is None else np.concatenate((self.bias[0::2], self.bias[1::2]))
        return replace(self, weight=self.weight.evens_first(), bias=bias)
