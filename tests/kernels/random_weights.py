"""Random weights of any spec, and inputs, for the kernel tests."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fewbits.kernels.reference.bound import product_parts
from fewbits.qweight import QLinear, QWeight, pack_nibbles
from fewbits.spec import ActSpec, WeightSpec, dense

GROUP = (1, 32)
CHANNEL = (1, 0)
TENSOR = (0, 0)


def integers(bits: int, block: tuple[int, int], asymmetric: bool = False, scale_dtype: str = "bfloat16") -> WeightSpec:
    kind = "uint" if asymmetric else "int"
    return WeightSpec(kind, bits, block, scale_dtype, zero_point="integer" if asymmetric else "none")


def floats(exponent: int, mantissa: int, block: tuple[int, int], scale_dtype: str, **more: Any) -> WeightSpec:
    bits = 1 + exponent + mantissa
    return WeightSpec("float", bits, block, scale_dtype, exponent, mantissa, **more)


def random_weight(spec: WeightSpec, shape: tuple[int, int], seed: int = 0) -> QWeight:
    random = np.random.default_rng(seed)
    if not spec.quantized:
        values = random.standard_normal(shape) / np.sqrt(shape[1])
        if spec.number == "bfloat16":
            return QWeight(spec, shape, values.astype(ml_dtypes.bfloat16).view(np.uint16))
        if spec.number == "float16":
            return QWeight(spec, shape, values.astype(np.float16).view(np.uint16))
        return QWeight(spec, shape, values.astype(spec.number))
    codes = random.integers(0, 1 << spec.bits, shape, dtype=np.uint8)
    if spec.kind == "float" and spec.bits == 8:
        codes[(codes & 0x7F) >= 0x7C] = 0x38  # neither NaN nor, in e5m2, infinity
    if spec.bits == 4:
        codes = pack_nibbles(codes)
    blocks = spec.blocks_of(shape)
    scale = random.uniform(0.5, 1.5, blocks) / np.sqrt(shape[1])
    zero = random.integers(0, 1 << spec.bits, blocks, dtype=np.uint8) if spec.zero_point == "integer" else None
    return QWeight(
        spec,
        shape,
        codes,
        scale.astype(spec.scale_dtype),
        zero,
        0.37 if spec.global_scale else None,
        random.permutation(shape[1]) if spec.act_order else None,
    )


def random_linear(spec: WeightSpec, shape: tuple[int, int], act: ActSpec | None = None, bias: bool = False) -> QLinear:
    values = np.linspace(-1, 1, shape[0], dtype=np.float32) if bias else None
    static = act is not None and not act.dynamic
    return QLinear(
        random_weight(spec, shape),
        act,
        values,
        input_scale=0.03 if static else None,
        input_zero=None if act is None or act.symmetric or not static else -7,
        input_global_scale=1 / 512 if act is not None and act.global_scale else None,
    )


def random_input(M: int, K: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)


def exact_and_bound(kernel: Any, layer: QLinear, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition of a product, and how far a kernel (its module) may be from it; both [M, N]."""
    parts = list(product_parts(layer, x, kernel.arithmetic(layer.spec, layer.weight.shape)))
    assert [row for part in parts for row in range(layer.weight.shape[0])[part.rows]] == [*range(layer.weight.shape[0])]
    return np.concatenate([part.exact for part in parts], 1), np.concatenate([part.bound for part in parts], 1)


WEIGHTS = {
    "bfloat16": dense("bfloat16"),
    "float16": dense("float16"),
    "float32": dense("float32"),
    **{f"int{bits}-g32": integers(bits, GROUP) for bits in range(2, 9)},
    **{f"uint{bits}-g32": integers(bits, GROUP, True) for bits in range(2, 9)},
    "int4-channel": integers(4, CHANNEL),
    "uint4-channel": integers(4, CHANNEL, True),
    "int4-tensor": integers(4, TENSOR),
    "int8-channel": integers(8, CHANNEL, scale_dtype="float32"),
    "uint8-channel": integers(8, CHANNEL, True, "float16"),
    "uint8-tensor": integers(8, TENSOR, True),
    "int4-act-order": WeightSpec("int", 4, GROUP, "bfloat16", act_order=True),
    "fp8-channel": floats(4, 3, CHANNEL, "bfloat16"),
    "fp8-block": floats(4, 3, (16, 32), "bfloat16"),
    "fp8e5m2-tensor": floats(5, 2, TENSOR, "float32"),
    "nvfp4": floats(2, 1, (1, 16), "float8_e4m3fn", global_scale=True),
    "mxfp4": floats(2, 1, GROUP, "float8_e8m0fnu"),
    "mxfp6": floats(2, 3, GROUP, "float8_e8m0fnu"),
    "mxfp8": floats(4, 3, GROUP, "float8_e8m0fnu"),
}
