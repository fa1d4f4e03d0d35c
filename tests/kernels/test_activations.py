"""Activation quantizers against blocks computed by hand from the engines' formulas."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fewbits.kernels.formulas import formula
from fewbits.kernels.reference.activations import Statics, quantize
from fewbits.spec import ActSpec

INT8 = ActSpec("int", 8, "token", True)
INT8_ASYMMETRIC = ActSpec("int", 8, "token", True, symmetric=False)
INT8_GROUP = ActSpec("int", 8, "group", True, 2)
INT8_STATIC = ActSpec("int", 8, "tensor", False)
INT8_STATIC_ASYMMETRIC = ActSpec("int", 8, "tensor", False, symmetric=False)
FP8 = ActSpec("float", 8, "token", True, exponent=4, mantissa=3)
FP8_TENSOR = ActSpec("float", 8, "tensor", True, exponent=4, mantissa=3)
FP8_STATIC = ActSpec("float", 8, "tensor", False, exponent=4, mantissa=3)
E8M0 = "float8_e8m0fnu"


def fp8_group(size):
    return ActSpec("float", 8, "group", True, size, exponent=4, mantissa=3)


NVFP4 = ActSpec("float", 4, "group", True, 16, global_scale=True, exponent=2, mantissa=1)
MXFP4 = ActSpec("float", 4, "group", True, 32, scale_dtype=E8M0, exponent=2, mantissa=1)
MXFP6 = ActSpec("float", 6, "group", True, 32, scale_dtype=E8M0, exponent=2, mantissa=3)
MXFP6E3M2 = ActSpec("float", 6, "group", True, 32, scale_dtype=E8M0, exponent=3, mantissa=2)
MXFP8 = ActSpec("float", 8, "group", True, 32, scale_dtype=E8M0, exponent=4, mantissa=3)


def f32(*rows):
    return np.array(rows, np.float32)


def test_int8_per_token_divides_by_127():
    found = quantize(f32([0.5, -1.27, 0.004, 0.016]), INT8)
    assert found.codes.tolist() == [[50, -127, 0, 2]]
    assert found.scale[0, 0] == np.float32(1.27) / np.float32(127)
    # With absmax / 127.5, as the producer simulates, the last code would be -96.
    assert quantize(f32([1, -1, 0.5, 0.002, -0.75]), INT8).codes.tolist() == [[127, -127, 64, 0, -95]]


def test_int8_of_a_row_of_zeros_has_scale_zero():
    found = quantize(f32([0, 0], [1, 0]), INT8)
    assert found.scale.tolist() == [[0], [np.float32(1 / 127)]]
    assert found.codes.tolist() == [[0, 0], [127, 0]]


def test_int8_groups():
    found = quantize(f32([0.5, -1.27, 0, 0, 3]), INT8_GROUP)
    assert found.codes.tolist() == [[50, -127, 0, 0, 127]]
    assert found.scale.tolist() == [[np.float32(1.27) / np.float32(127), 0, np.float32(3) / np.float32(127)]]


def test_int8_asymmetric_may_have_a_zero_point_outside_of_int8():
    found = quantize(f32([-1, 0, 1.9, 3]), INT8_ASYMMETRIC)
    assert found.codes.tolist() == [[-128, -64, 57, 127]]
    assert found.zero.tolist() == [[-64]]
    assert found.scale[0, 0] == np.float32(4) / np.float32(255)
    positive = quantize(f32([2, 3]), INT8_ASYMMETRIC)
    assert positive.codes.tolist() == [[-128, 127]] and positive.zero.tolist() == [[-638]]
    np.testing.assert_allclose(positive.values(), [[2, 3]], rtol=1e-6)


def test_int8_asymmetric_keeps_a_constant_row():
    np.testing.assert_array_equal(quantize(f32([-2.5, -2.5], [0, 0]), INT8_ASYMMETRIC).values(), [[-2.5] * 2, [0] * 2])


def test_int8_static():
    x = f32([0.124, 0.126, -7, 6.4])
    assert quantize(x, INT8_STATIC, Statics(0.05)).codes.tolist() == [[2, 3, -128, 127]]
    found = quantize(x, INT8_STATIC_ASYMMETRIC, Statics(0.05, -10))
    assert found.codes.tolist() == [[-8, -7, -128, 118]]
    np.testing.assert_allclose(found.values(), [[0.1, 0.15, -5.9, 6.4]], rtol=1e-6)
    with pytest.raises(ValueError, match="static activation scale"):
        quantize(x, INT8_STATIC)


@pytest.mark.parametrize("act", [FP8, FP8_TENSOR])
def test_fp8_dynamic_is_per_token_even_where_the_config_says_tensor(act):
    found = quantize(f32([1, -2, 0.3, 0.001], [0, 0, 0, 0]), act)
    assert found.codes.tolist() == [[224, -448, 64, 0.21875], [0, 0, 0, 0]]
    assert found.scale[0, 0] == np.float32(2) / np.float32(448)
    assert found.scale[1, 0] == np.float32(1 / (448 * 512))


def test_fp8_static_multiplies_by_the_reciprocal_and_saturates():
    # x / s is a midpoint that goes down to 5; x * (1 / s) lies just above it.
    x, s = float.fromhex("0x1.c9e3e4p-5"), float.fromhex("0x1.5cde64p-7")
    assert quantize(f32([x]), FP8_STATIC, Statics(s)).codes.tolist() == [[5.5]]
    assert quantize(f32([1000, -465]), FP8_STATIC, Statics(1.0)).codes.tolist() == [[448, -448]]


def test_fp8_groups():
    found = quantize(f32([1, -2, 0.5, 4]), fp8_group(2))
    assert found.codes.tolist() == [[224, -448, 56, 448]]
    np.testing.assert_allclose(found.scale, [[2 / 448, 4 / 448]], rtol=1e-6)
    zeros = quantize(f32([0, 0]), fp8_group(2))
    assert zeros.scale[0, 0] == np.float32(1e-10) * np.float32(1 / 448)


def test_a_ragged_last_group_has_its_own_scale():
    found = quantize(f32([1, -2, 4]), fp8_group(2))
    assert found.codes.shape == (1, 3) and found.scale.shape == (1, 2)
    np.testing.assert_allclose(found.values(), [[1, -2, 4]])


def test_nvfp4():
    x = np.zeros((1, 16), np.float32)
    x[0, :4] = [1, 0.5, 0.3, -0.07]
    found = quantize(x, NVFP4, Statics(global_scale=1 / 672))
    assert found.scale.tolist() == [[112]]
    assert found.codes[0, :4].tolist() == [6, 3, 2, -0.5]
    np.testing.assert_allclose(found.values()[0, 0], 6 * 112 / 672)
    assert not quantize(np.zeros((1, 16), np.float32), NVFP4, Statics(global_scale=1 / 672)).values().any()
    with pytest.raises(ValueError, match="static activation scale"):
        quantize(x, NVFP4)


@pytest.mark.parametrize(
    "act, exponents",
    [
        (MXFP4, {1.0: 125, 1.74: 125, 1.75: 126, 6.0: 127, 6.99: 127, 7.0: 128, 448: 134, 450: 134, 0.02: 119}),
        (MXFP6, {1.0: 125, 1.74: 125, 1.75: 125, 6.0: 127, 6.99: 127, 7.0: 127, 448: 133, 450: 133, 0.02: 119}),
        (MXFP6E3M2, {1.0: 123, 1.74: 123, 1.75: 123, 1.9: 124, 28.0: 127, 30.0: 128, 448: 131, 0.02: 117}),
        (replace(MXFP4, scale_rounding="floor"), {1.0: 125, 1.99: 125, 2.0: 126, 7.99: 127, 0.02: 119}),
        (replace(MXFP4, scale_rounding="ceil"), {1.0: 125, 1.01: 126, 2.0: 126, 4.01: 128, 0.02: 120}),
        (replace(MXFP6E3M2, scale_rounding="ceil"), {1.0: 123, 1.01: 124, 16.0: 127, 28.0: 128}),
        (MXFP8, {1.0: 119, 1.74: 119, 1.75: 119, 6.0: 121, 6.99: 121, 7.0: 121, 448: 127, 450: 128, 0.02: 113}),
    ],
    ids=str,
)
def test_shared_exponents(act, exponents):
    for largest, exponent in exponents.items():
        found = quantize(f32([-largest, 0.001]), act)
        assert found.scale[0, 0] == 2.0 ** (exponent - 127), largest
    assert quantize(f32([0, 0]), act).scale[0, 0] == 2.0**-127


def test_mxfp4_codes():
    found = quantize(f32([7, 1, 0.2, -3], [6.9, 5.2, 1, -3.5]), MXFP4)
    assert found.codes.tolist() == [[4, 0.5, 0, -1.5], [6, 6, 1, -4]]


@pytest.mark.parametrize(
    "act", [INT8, INT8_ASYMMETRIC, INT8_GROUP, FP8, fp8_group(8), MXFP4, MXFP6, MXFP6E3M2, MXFP8], ids=str
)
def test_rows_are_quantized_by_themselves(act):
    x = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32) * [[1], [100], [0], [1e-6], [3]]
    x = x.astype(np.float32)
    whole = quantize(x, act).values()
    for row in range(len(x)):
        np.testing.assert_array_equal(quantize(x[row : row + 1], act).values()[0], whole[row])
    assert quantize(x[:0], act).values().shape == (0, 40)


@pytest.mark.parametrize(
    "act",
    [
        ActSpec("int", 4, "token", True),
        ActSpec("int", 8, "group", True, 32, symmetric=False),
        ActSpec("int", 8, "token", False),
        ActSpec("float", 8, "token", True, exponent=5, mantissa=2),
        ActSpec("float", 8, "token", True, exponent=4, mantissa=3, symmetric=False),
        ActSpec("float", 4, "group", True, 16, exponent=2, mantissa=1),
        ActSpec("float", 6, "group", True, 32, exponent=2, mantissa=3),
    ],
    ids=str,
)
def test_what_has_no_definition_is_refused_by_name(act):
    assert formula(act) is None
    with pytest.raises(ValueError, match=rf"{re.escape(str(act))} have no definition"):
        quantize(f32([1.0]), act)
