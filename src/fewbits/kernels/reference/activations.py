"""How a linear's input is quantized: the formulas that deployed engines use, in float32 as they compute them.

Division and multiplication by a reciprocal differ near rounding midpoints, so each function does what its
engine does. Where the engines offer a scale per tensor computed at run time, it is taken per token: a row
must not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.formulas import Formula, formula
from fewbits.spec import ActSpec

Array = NDArray[Any]

E4M3_MAX = np.float32(448.0)
E2M1_MAX = np.float32(6.0)
E2M3_MAX = np.float32(7.5)
E3M2_MAX = np.float32(28.0)


@dataclass(frozen=True, slots=True)
class Quantized:
    """x as numbers: value = (code - zero) x scale x global_scale, columns in groups of `group`.

    `codes` float32 [M, K] are decoded elements; `scale` float32 [M, groups]; `zero` float32 [M, 1] or None.
    """

    codes: Array
    scale: Array
    group: int
    zero: Array | None = None
    global_scale: float = 1.0

    def values(self) -> Array:
        """float64 [M, K]."""
        codes = self.codes.astype(np.float64)
        if self.zero is not None:
            codes -= self.zero
        scale = np.repeat(self.scale.astype(np.float64), self.group, axis=1)
        scaled: Array = codes * scale[:, : codes.shape[1]] * self.global_scale
        return scaled


@dataclass(frozen=True, slots=True)
class Statics:
    """What the checkpoint stores for a projection's input; see `QLinear`."""

    scale: float | None = None
    zero: int | None = None
    global_scale: float | None = None


Quantizer = Callable[[Array, ActSpec, Statics], Quantized]


def quantize(x: Array, act: ActSpec, statics: Statics = Statics()) -> Quantized:
    """Quantize x, float32 [M, K]. Raises ValueError for a spec without definition."""
    name = formula(act)
    if name is None:
        raise ValueError(undefined(act))
    # A row of infinities or of nothing is the caller's to judge; NumPy's warnings would only hide where it
    # began.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _QUANTIZERS[name](x, act, statics)


def undefined(act: ActSpec) -> str:
    """The sentence why a spec can't run."""
    return f"activations {act} have no definition"


def _absmax(x: Array) -> Array:
    largest: Array = np.abs(x).max(axis=1, keepdims=True, initial=np.float32(0))
    return largest


def _grouped(x: Array, act: ActSpec) -> tuple[Array, int, Array]:
    """x as [M, groups, size], a ragged end filled with zeros; the size; largest magnitudes [M, groups]."""
    size = act.group_size or x.shape[1]
    groups = -(-x.shape[1] // size)
    padded = np.zeros((len(x), groups * size), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), groups, size)
    return padded, size, np.abs(padded).max(axis=2, initial=np.float32(0))


def _flat(grouped: Array, columns: int) -> Array:
    return grouped.reshape(len(grouped), grouped.shape[1] * grouped.shape[2])[:, :columns]


def _to_int8(t: Array) -> Array:
    return np.clip(np.rint(t), -128, 127).astype(np.float32)


def _round(t: Array, dtype: Any, largest: np.float32) -> Array:
    """To the nearest element of `dtype`, ties to even, saturating. float32."""
    return np.clip(t, -largest, largest).astype(dtype).astype(np.float32)


def _constant(x: Array, value: float | None) -> Array:
    if value is None:
        raise ValueError("a static activation scale is missing")
    return np.full((len(x), 1), value, np.float32)


def _int8_token(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    largest = _absmax(x)
    scale = largest / np.float32(127)
    inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    return Quantized(_to_int8(x * inverse), scale, x.shape[1])


def _int8_group(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    grouped, size, largest = _grouped(x, act)
    scale = largest / np.float32(127)
    inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    return Quantized(_flat(_to_int8(grouped * inverse[:, :, np.newaxis]), x.shape[1]), scale, size)


def _int8_token_asymmetric(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    # The range isn't extended to 0, so the zero point may lie far outside of int8.
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(255)
    flat = scale == 0
    divisor = np.where(flat, np.float32(1), scale)
    zero = np.rint(np.float32(-128) - low / divisor)
    codes = _to_int8(np.rint(x / divisor) + zero)
    # A constant row has no range to scale by; its one value stands as code - zero = 1.
    codes, zero = np.where(flat, np.float32(1), codes), np.where(flat, np.float32(0), zero)
    return Quantized(codes, np.where(flat, low, scale), x.shape[1], zero)


def _int8_static(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    scale = _constant(x, statics.scale)
    return Quantized(_to_int8(x / scale), scale, x.shape[1])


def _int8_static_asymmetric(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    scale = _constant(x, statics.scale)
    zero = _constant(x, statics.zero)
    whole = np.clip(np.rint(x * (np.float32(1) / scale)), -(2.0**31), 2.0**31 - 1)
    return Quantized(_to_int8(whole + zero), scale, x.shape[1], zero)


def _fp8_token(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    scale = np.maximum(_absmax(x) / E4M3_MAX, np.float32(1 / (448 * 512)))
    return Quantized(_round(x / scale, ml_dtypes.float8_e4m3fn, E4M3_MAX), scale, x.shape[1])


def _fp8_static(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    scale = _constant(x, statics.scale)
    codes = _round(x * (np.float32(1) / scale), ml_dtypes.float8_e4m3fn, E4M3_MAX)
    return Quantized(codes, scale, x.shape[1])


def _fp8_group(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    grouped, size, largest = _grouped(x, act)
    scale = np.maximum(largest, np.float32(1e-10)) * np.float32(1 / 448)
    codes = _round(grouped / scale[:, :, np.newaxis], ml_dtypes.float8_e4m3fn, E4M3_MAX)
    return Quantized(_flat(codes, x.shape[1]), scale, size)


def _nvfp4(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    if statics.global_scale is None:
        raise ValueError("a static activation scale is missing")
    grouped, size, largest = _grouped(x, act)
    divisor = np.float32(1 / statics.global_scale)
    scale = _round(divisor * (largest * np.float32(1 / 6)), ml_dtypes.float8_e4m3fn, E4M3_MAX)
    step = scale * (np.float32(1) / divisor)
    inverse = np.where(scale > 0, np.float32(1) / step, np.float32(0))
    codes = _round(grouped * inverse[:, :, np.newaxis], ml_dtypes.float4_e2m1fn, E2M1_MAX)
    return Quantized(_flat(codes, x.shape[1]), scale, size, global_scale=statics.global_scale)


def _shared_exponent(x: Array, act: ActSpec, dtype: Any, top: np.float32) -> Quantized:
    """MXFP4 and MXFP6: the exponent of the largest magnitude, less that of the largest element.

    Source of the roundings: quark/torch/quantization/observer/observer.py, get_scale.
    """
    grouped, size, largest = _grouped(x, act)
    added = {"even": 1 << (23 - act.mantissa - 1), "floor": 0, "ceil": (1 << 23) - 1}[act.scale_rounding]
    rounded = largest.view(np.uint32) + np.uint32(added)
    exponent = np.clip((rounded >> 23).astype(np.int32) - int(np.log2(top)), 0, 254)
    scale = np.ldexp(np.float32(1), exponent - 127)
    codes = _round(grouped / scale[:, :, np.newaxis], dtype, top)
    return Quantized(_flat(codes, x.shape[1]), scale, size)


def _mxfp4(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    return _shared_exponent(x, act, ml_dtypes.float4_e2m1fn, E2M1_MAX)


def _mxfp6(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    return _shared_exponent(x, act, ml_dtypes.float6_e2m3fn, E2M3_MAX)


def _mxfp6e3m2(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    return _shared_exponent(x, act, ml_dtypes.float6_e3m2fn, E3M2_MAX)


def _mxfp8(x: Array, act: ActSpec, statics: Statics) -> Quantized:
    grouped, size, largest = _grouped(x, act)
    fraction, exponent = np.frexp(largest / E4M3_MAX)
    ceiling = exponent - (fraction == 0.5)  # ceil(log2) without a logarithm's rounding
    exponent = np.where(largest > 0, np.clip(ceiling + 127, 0, 254), 0)
    scale = np.ldexp(np.float32(1), exponent - 127)
    codes = _round(grouped / scale[:, :, np.newaxis], ml_dtypes.float8_e4m3fn, E4M3_MAX)
    return Quantized(_flat(codes, x.shape[1]), scale, size)


_QUANTIZERS: dict[Formula, Quantizer] = {
    "int8_token": _int8_token,
    "int8_token_asymmetric": _int8_token_asymmetric,
    "int8_static": _int8_static,
    "int8_static_asymmetric": _int8_static_asymmetric,
    "int8_group": _int8_group,
    "fp8_token": _fp8_token,
    "fp8_static": _fp8_static,
    "fp8_group": _fp8_group,
    "nvfp4": _nvfp4,
    "mxfp4": _mxfp4,
    "mxfp6": _mxfp6,
    "mxfp6e3m2": _mxfp6e3m2,
    "mxfp8": _mxfp8,
}
