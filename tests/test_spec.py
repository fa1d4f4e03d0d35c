"""Specs: how they read, that they are keys, and the shapes they give their scales."""

from __future__ import annotations

import dataclasses

import pytest

from fewbits.spec import WHOLE, ActSpec, QuantSpec, WeightSpec, dense

INT4 = WeightSpec("int", 4, (1, 128), "bfloat16")
INT8_TOKEN = ActSpec("int", 8, "token", True)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (INT4, "int4 g128"),
        (WeightSpec("uint", 4, (1, 128), "bfloat16", zero_point="integer"), "uint4 g128 asym"),
        (WeightSpec("uint", 4, (1, 128), "bfloat16", zero_point="float"), "uint4 g128 float-zero"),
        (WeightSpec("int", 3, (1, WHOLE), "float16"), "int3 channel"),
        (WeightSpec("int", 8, (WHOLE, WHOLE), "float32"), "int8 tensor"),
        (WeightSpec("float", 8, (128, 64), "float32", 4, 3), "fp8 128x64"),
        (WeightSpec("float", 8, (1, WHOLE), "float32", 5, 2), "fp8e5m2 channel"),
        (WeightSpec("float", 4, (1, 16), "float8_e4m3fn", 2, 1, global_scale=True), "fp4 g16+global"),
        (WeightSpec("float", 6, (1, 32), "float8_e8m0fnu", 2, 3), "fp6 g32 e8m0"),
        (WeightSpec("float", 8, (1, WHOLE), "float32", 3, 4), "float8e3m4 channel"),
        (WeightSpec("int", 4, (1, 32), "bfloat16", act_order=True), "int4 g32 act-order"),
        (WeightSpec("float", 0), "unknown"),
        (dense("bfloat16"), "bfloat16"),
        (dense("float16"), "float16"),
        (dense("float32"), "float32"),
        (dense("float64"), "float64"),
        (INT8_TOKEN, "int8 token dynamic"),
        (ActSpec("int", 8, "tensor", False, symmetric=False), "int8 tensor static asym"),
        (ActSpec("float", 8, "group", True, 128, exponent=4, mantissa=3), "fp8 g128 dynamic"),
        (ActSpec("float", 8, "group", False, exponent=4, mantissa=3), "fp8 head static"),
        (ActSpec("float", 4, "group", True, 16, global_scale=True, exponent=2, mantissa=1), "fp4 local"),
        (
            ActSpec("float", 8, "group", True, 32, scale_dtype="float8_e8m0fnu", exponent=4, mantissa=3),
            "fp8 g32 e8m0 dynamic",
        ),
        (QuantSpec(INT4), "int4 g128 × a16"),
        (QuantSpec(INT4, INT8_TOKEN), "int4 g128 × int8 token dynamic"),
        (QuantSpec(dense("bfloat16")), "bfloat16"),
        (QuantSpec(dense("bfloat16"), INT8_TOKEN), "bfloat16 × int8 token dynamic"),
    ],
)
def test_phrases(spec, text):
    assert str(spec) == text


def test_specs_are_keys():
    assert {QuantSpec(INT4): 1}[QuantSpec(WeightSpec("int", 4, (1, 128), "bfloat16"))] == 1
    assert QuantSpec(INT4) != QuantSpec(INT4, INT8_TOKEN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        INT4.bits = 8


@pytest.mark.parametrize(
    ("block", "shape", "size", "count"),
    [
        ((WHOLE, WHOLE), (40, 64), (40, 64), (1, 1)),
        ((1, WHOLE), (40, 64), (1, 64), (40, 1)),
        ((1, 32), (40, 64), (1, 32), (40, 2)),
        ((1, 32), (40, 65), (1, 32), (40, 3)),
        ((128, 128), (192, 576), (128, 128), (2, 5)),
        ((128, 128), (1, 1), (128, 128), (1, 1)),
        ((WHOLE, WHOLE), (0, 0), (0, 0), (0, 0)),
        ((1, WHOLE), (0, 8), (1, 8), (0, 1)),
        ((1, 32), (4, 0), (1, 32), (4, 0)),
    ],
)
def test_blocks(block, shape, size, count):
    spec = WeightSpec("int", 8, block, "float32")
    assert (spec.block_of(shape), spec.blocks_of(shape)) == (size, count)


def test_only_floats_of_16_bits_or_more_are_dense():
    for dtype in ("int8", "float8_e4m3fn", "bool", "complex64"):
        with pytest.raises(KeyError):
            dense(dtype)
    assert not dense("float32").quantized and INT4.quantized
