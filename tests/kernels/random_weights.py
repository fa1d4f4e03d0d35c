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
    "mxfp6e3m2": floats(3, 2, GROUP, "float8_e8m0fnu"),
    "fp8-block128": floats(4, 3, (128, 128), "float32"),
    "int4-g12": integers(4, (1, 12)),
    "uint4-g12": integers(4, (1, 12), True),
    "int3-g10": integers(3, (1, 10)),
    "uint8-g5": integers(8, (1, 5), True),
    "nvfp4-g6": floats(2, 1, (1, 6), "float8_e4m3fn", global_scale=True),
    "fp8-g7": floats(4, 3, (1, 7), "float32"),
}


def int8(per: Any, dynamic: bool = True, symmetric: bool = True, group_size: int | None = None) -> ActSpec:
    return ActSpec("int", 8, per, dynamic, group_size, symmetric)


def float_act(exponent: int, mantissa: int, per: Any, **more: Any) -> ActSpec:
    more = {"dynamic": True} | more
    return ActSpec("float", 1 + exponent + mantissa, per, **more, exponent=exponent, mantissa=mantissa)


E8M0 = "float8_e8m0fnu"
ACTS = {
    "int8-token": int8("token"),
    "int8-token-asymmetric": int8("token", symmetric=False),
    "int8-static": int8("tensor", dynamic=False),
    "int8-static-asymmetric": int8("tensor", dynamic=False, symmetric=False),
    "int8-g32": int8("group", group_size=32),
    "int8-g24": int8("group", group_size=24),
    "fp8-token": float_act(4, 3, "token"),
    "fp8-static": float_act(4, 3, "tensor", dynamic=False),
    "fp8-g128": float_act(4, 3, "group", group_size=128),
    "nvfp4": float_act(2, 1, "group", group_size=16, global_scale=True, scale_dtype="float8_e4m3fn"),
    "mxfp4": float_act(2, 1, "group", group_size=32, scale_dtype=E8M0),
    "mxfp6": float_act(2, 3, "group", group_size=32, scale_dtype=E8M0),
    "mxfp6e3m2": float_act(3, 2, "group", group_size=32, scale_dtype=E8M0),
    "mxfp4-floor": float_act(2, 1, "group", group_size=32, scale_dtype=E8M0, scale_rounding="floor"),
    "mxfp6-ceil": float_act(2, 3, "group", group_size=32, scale_dtype=E8M0, scale_rounding="ceil"),
    "mxfp8": float_act(4, 3, "group", group_size=32, scale_dtype=E8M0),
}
