"""What each scheme of tools/make_synthetic.py stores: codes and scales as if weights ~ N(0, STD²) had been quantized.

A code comes from a table of the normal distribution's quantiles, looked up with uniform random bits: that is many times
faster than drawing weights and rounding them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Random = np.random.Generator

BF16 = "bf16"
STD = 0.02
ROW_PEAK = 3.6  # the largest of a row's magnitudes, in standard deviations; of 2,048 normal numbers on average
INPUT_PEAK = 10.0  # the largest magnitude of a layer's input, for static scales


@dataclass(frozen=True)
class Scheme:
    """`tensors(random, N, K)` gives a module's arrays by suffix; K is a multiple of `columns`."""

    tensors: Callable[[Random, int, int], dict[str, Array]]
    format: str | None = None
    weights: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None
    columns: int = 1


def bfloat16_of(values: Array) -> Array:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16)


@cache
def quantiles(count: int) -> Array:
    """The middles of `count` equally probable parts of N(0, 1), ascending, float64."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((part + 0.5) / count) for part in range(count)])


def one_each(table: Array, random: Random, N: int, K: int) -> Array:
    """[N, K] entries of a table of 65,536. Whole 64-bit numbers are drawn, the quickest, and looked up in pieces."""
    numbers = random.integers(0, 1 << 64, -(-N * K // 4), np.uint64).view(np.uint16)[: N * K]
    chosen = np.empty(N * K, table.dtype)
    for begin in range(0, N * K, 1 << 16):
        piece = slice(begin, begin + (1 << 16))
        np.take(table, numbers[piece], out=chosen[piece], mode="clip")
    return chosen.reshape(N, K)


def nibbles(codes: Array, random: Random, N: int, K: int) -> Array:
    """uint8 [N, K / 2] of two 4-bit codes each, the earlier one low, from a table of 256."""
    low, high = np.meshgrid(codes, codes)
    return one_each((low | high << 4).astype(np.uint8).reshape(-1), random, N, K // 2)


def scales(random: Random, mean: float, N: int, groups: int) -> Array:
    """float32 [N, groups], as uneven as those of real groups."""
    return (mean * random.uniform(0.85, 1.15, (N, groups))).astype(np.float32)


def bf16(random: Random, N: int, K: int) -> dict[str, Array]:
    return {"weight": one_each(bfloat16_of(STD * quantiles(1 << 16)), random, N, K)}


def int4(symmetric: bool, group: int = 128) -> Callable[[Random, int, int], dict[str, Array]]:
    peak = 2.7  # of 128

    def tensors(random: Random, N: int, K: int) -> dict[str, Array]:
        codes = np.clip(np.rint(quantiles(256) * 7.5 / peak) + 8, 0, 15).astype(np.uint8)
        groups = K // group
        arrays = {
            "weight_packed": nibbles(codes, random, N, K).view(np.int32),
            "weight_scale": bfloat16_of(scales(random, STD * peak / 7.5, N, groups)),
            "weight_shape": np.array([N, K], np.int64),
        }
        if not symmetric:
            arrays["weight_zero_point"] = packed_rows(random.integers(7, 10, (N, groups)))
        return arrays

    return tensors


def packed_rows(codes: Array) -> Array:
    """4-bit codes [N, groups] → int32 [N / 8, groups]: zero points are packed along N, the first row lowest."""
    N, groups = codes.shape
    padded = np.zeros((-(-N // 8) * 8, groups), np.uint32)
    padded[:N] = codes
    shifted = padded.reshape(-1, 8, groups) << np.arange(0, 32, 4, dtype=np.uint32)[:, np.newaxis]
    packed: Array = np.bitwise_or.reduce(shifted, axis=1).view(np.int32)
    return packed


def int8(random: Random, N: int, K: int) -> dict[str, Array]:
    codes = np.clip(np.rint(quantiles(1 << 16) * 127 / ROW_PEAK), -128, 127).astype(np.int8)
    return {
        "weight": one_each(codes, random, N, K),
        "weight_scale": bfloat16_of(scales(random, STD * ROW_PEAK / 127, N, 1)),
    }


def fp8(random: Random, N: int, K: int) -> dict[str, Array]:
    codes = np.clip(quantiles(1 << 16) * 448 / ROW_PEAK, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {
        "weight": one_each(codes, random, N, K),
        "weight_scale": bfloat16_of(scales(random, STD * ROW_PEAK / 448, N, 1)),
    }


def fp4_codes(scale: float) -> Array:
    values = np.clip(quantiles(256) / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return values.view(np.uint8)


def nvfp4(static_input: bool) -> Callable[[Random, int, int], dict[str, Array]]:
    peak = 1.8  # of 16
    largest = 5.0  # of the whole weight

    def tensors(random: Random, N: int, K: int) -> dict[str, Array]:
        whole = 448 * 6 / (largest * STD)
        arrays = {
            "weight_packed": nibbles(fp4_codes(peak / 6), random, N, K),
            "weight_scale": scales(random, STD * peak / 6 * whole, N, K // 16).astype(ml_dtypes.float8_e4m3fn),
            "weight_global_scale": np.array([whole], np.float32),
        }
        if static_input:
            arrays["input_global_scale"] = np.array([448 * 6 / INPUT_PEAK], np.float32)
        return arrays

    return tensors


def mxfp4(random: Random, N: int, K: int) -> dict[str, Array]:
    exponent = -7  # floor(log2 of the largest of 32) - 2
    return {
        "weight_packed": nibbles(fp4_codes(2.0**exponent / STD), random, N, K),
        "weight_scale": (127 + exponent - (random.random((N, K // 32)) < 0.1)).astype(np.uint8),
    }


def arguments(bits: int, kind: str, strategy: str, **rest: Any) -> dict[str, Any]:
    """QuantizationArgs as compressed-tensors 0.19 writes them."""
    values = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
    }
    return values | rest


def by_token(kind: str) -> dict[str, Any]:
    return arguments(8, kind, "token", dynamic=True, observer=None)


_INT4 = arguments(4, "int", "group", group_size=128)
_INT4_ASYM = _INT4 | {"symmetric": False, "zp_dtype": "torch.int8"}
_FP8 = arguments(8, "float", "channel")
_NVFP4 = arguments(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_MXFP4 = arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")

SCHEMES = {
    BF16: Scheme(bf16),
    "w4a16": Scheme(int4(True), "pack-quantized", _INT4, columns=128),
    "w4a16-asym": Scheme(int4(False), "pack-quantized", _INT4_ASYM, columns=128),
    "w8a8": Scheme(int8, "int-quantized", arguments(8, "int", "channel"), by_token("int")),
    "fp8": Scheme(fp8, "float-quantized", _FP8, by_token("float")),
    "fp8a16": Scheme(fp8, "naive-quantized", _FP8),
    "nvfp4": Scheme(
        nvfp4(True), "nvfp4-pack-quantized", _NVFP4, _NVFP4 | {"dynamic": "local", "observer": "static_minmax"}, 16
    ),
    "nvfp4a16": Scheme(nvfp4(False), "nvfp4-pack-quantized", _NVFP4, columns=16),
    "mxfp4": Scheme(mxfp4, "mxfp4-pack-quantized", _MXFP4, _MXFP4 | {"dynamic": True, "observer": None}, 32),
    "mxfp4a16": Scheme(mxfp4, "mxfp4-pack-quantized", _MXFP4, columns=32),
}
