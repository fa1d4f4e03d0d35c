"""The quantizers of inputs against vectors worked out by hand from the engines' formulas, and products made of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fewbits.kernels.reference.activations import Statics, quantize
from fewbits.kernels.reference.linear import linear_exact
from fewbits.qweight import QLinear, QWeight, pack_nibbles
from fewbits.spec import ActSpec, WeightSpec

E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = ml_dtypes.float4_e2m1fn
E8M0 = "float8_e8m0fnu"
INT8 = ActSpec("int", 8, "token", True)
INT8_ASYM = ActSpec("int", 8, "token", True, symmetric=False)
INT8_STATIC = ActSpec("int", 8, "tensor", False)
INT8_STATIC_ASYM = ActSpec("int", 8, "tensor", False, symmetric=False)
FP8 = ActSpec("float", 8, "token", True, exponent=4, mantissa=3)
FP8_STATIC = ActSpec("float", 8, "tensor", False, exponent=4, mantissa=3)
FP8_PAIRS = ActSpec("float", 8, "group", True, 2, exponent=4, mantissa=3)
NVFP4 = ActSpec("float", 4, "group", True, 16, global_scale=True, exponent=2, mantissa=1)
MXFP4 = ActSpec("float", 4, "group", True, 32, scale_dtype=E8M0, exponent=2, mantissa=1)
MXFP8 = ActSpec("float", 8, "group", True, 32, scale_dtype=E8M0, exponent=4, mantissa=3)


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def padded(values: list[float], columns: int) -> np.ndarray:
    x = np.zeros((1, columns), np.float32)
    x[0, : len(values)] = values
    return x


def bits(codes: np.ndarray, dtype: object) -> list[int]:
    """The codes' bit patterns."""
    found: list[int] = codes[0].astype(dtype).view(np.uint8).tolist()
    return found


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def test_nvfp4_codes_and_bytes():
    """Gx = 672, the group's largest 1.0: 112 (6E), 6 3 1.8 −0.42 → the codes 7 5 4 9."""
    found = quantize(padded([1, 0.5, 0.3, -0.07], 16), NVFP4, Statics(global_scale=1 / 672))
    assert found.scale.astype(E4M3).view(np.uint8).tolist() == [[0x6E]]
    codes = np.array([bits(found.codes, E2M1)], np.uint8)
    assert codes[0, :4].tolist() == [7, 5, 4, 9]
    assert pack_nibbles(codes)[0, :2].tolist() == [0x57, 0x94]


def test_nvfp4_product():
    """alpha = 1 / (672 · 896): the sum of codes and local scales times it."""
    spec = WeightSpec("float", 4, (1, 16), "float8_e4m3fn", exponent=2, mantissa=1, global_scale=True)
    codes = np.zeros((1, 16), np.uint8)
    codes[0, :4] = [7, 13, 3, 0]  # 6 −3 1.5 0
    scale = np.array([[0x7E]], np.uint8).view(E4M3)  # 448
    weight = QWeight(spec, (1, 16), pack_nibbles(codes), scale, global_scale=1 / 896)
    linear = QLinear(weight, NVFP4, input_global_scale=1 / 672)
    alpha = 1 / (672 * 896)
    assert alpha == pytest.approx(1.6608205e-6, rel=1e-7)
    y = linear_exact(linear, padded([1, 0.5, 0.3, -0.07], 16))
    assert y[0, 0] == pytest.approx(alpha * 112 * 448 * (6 * 6 + 3 * -3 + 2 * 1.5 + -0.5 * 0), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.25, 0), (0.250001, 1), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5, 6), (5.01, 7),
        (-0.1, 8), (-7, 15), (0.0, 0), (6, 7),
    ],
)  # fmt: skip
def test_fp4_rounding(value, code):
    """Ties to the even code, small negatives to −0, everything beyond 6 to 6. A group whose step is one."""
    group = padded([value, 6], 32)
    group[0, 1] = 4  # MXFP4 with a largest of 4 to 7 has the step 2^0; −7 itself would move it
    found = quantize(np.clip(group, -6.9, 6.9), MXFP4)
    assert found.scale.tolist() == [[1]]
    assert bits(found.codes, E2M1)[0] == code


# ---- FP8 -------------------------------------------------------------------------------------------------------------

ROUNDED = [
    (17, 16, 0x58), (18, 18, 0x59), (19, 20, 0x5A), (0.3, 0.3125, 0x2A), (1 / 3, 0.34375, 0x2B),
    (-0.2, -0.203125, 0xA5), (2**-10, 0, 0x00), (0.001, 2**-9, 0x01), (3 * 2**-10, 2**-8, 0x02), (448, 448, 0x7E),
    (464, 448, 0x7E), (465, 448, 0x7E), (1e9, 448, 0x7E), (-1e9, -448, 0xFE),
]  # fmt: skip


@pytest.mark.parametrize(("value", "rounded", "code"), ROUNDED)
def test_e4m3_rounding(value, rounded, code):
    """Clamped to ±448 before the cast, which knows no infinity and makes NaN of 465."""
    found = quantize(f32([value]), FP8_STATIC, Statics(1.0))
    assert found.codes.tolist() == [[rounded]] and bits(found.codes, E4M3) == [code]


def test_e4m3_decodes():
    decoded = np.array([0x08, 0x07, 0x7E, 0xFE], np.uint8).view(E4M3).astype(np.float64)
    assert decoded.tolist() == [2**-6, 0.013671875, 448, -448]
    assert np.isnan(np.array([0x7F, 0xFF], np.uint8).view(E4M3).astype(np.float64)).all()


def test_division_per_token():
    """The largest is 0.84: x / s = 136 is a tie that goes to 128; x · (1/s) = 136.00002 would go to 144."""
    found = quantize(f32([0.84, 0.255]), FP8)
    assert found.scale[0, 0] == np.float32(0.84) / np.float32(448)
    assert found.codes.tolist() == [[448, 128]]
    assert np.float32(0.255) * (np.float32(1) / found.scale[0, 0]) > 136


def test_multiplication_by_the_reciprocal_of_a_static_scale():
    """x / s = 5.25 is a tie that goes to 5; x · (1/s) = 5.2500005 goes to 5.5."""
    x, scale = float.fromhex("0x1.c9e3e4p-5"), float.fromhex("0x1.5cde64p-7")
    assert np.float32(x) / np.float32(scale) == 5.25
    assert quantize(f32([x]), FP8_STATIC, Statics(scale)).codes.tolist() == [[5.5]]


def test_fp8_per_token():
    found = quantize(f32([1, -2, 0.3, 0.001]), FP8)
    assert bits(found.codes, E4M3) == [0x76, 0xFE, 0x68, 0x26]
    assert found.scale[0, 0] == np.float32(0.00446428591)
    np.testing.assert_allclose(found.values(), [[1, -2, 0.2857143, 0.0009765625]], rtol=1e-6)
    zeros = quantize(f32([0, 0]), FP8)
    assert zeros.codes.tolist() == [[0, 0]] and zeros.scale[0, 0] == np.float32(4.359654e-6)


def test_fp8_block_product():
    spec = WeightSpec("float", 8, (2, 2), "float32", exponent=4, mantissa=3)
    codes = np.array([[1, 2, -3, 0.5], [4, -1, 2, 1.5]]).astype(E4M3).view(np.uint8)
    linear = QLinear(QWeight(spec, (2, 4), codes, f32([0.5, 0.25])), FP8_PAIRS)
    x = f32([1, -2, 0.5, 4])
    assert quantize(x, FP8_PAIRS).codes.tolist() == [[224, -448, 56, 448]]
    np.testing.assert_allclose(linear_exact(linear, x), [[-1.375, 4.75]], rtol=1e-6)


# ---- int8 ------------------------------------------------------------------------------------------------------------


def test_int8_per_token():
    found = quantize(f32([0.5, -1.27, 0.004, 0.016]), INT8)
    assert found.codes.tolist() == [[50, -127, 0, 2]]
    np.testing.assert_allclose(found.scale, [[0.01]], rtol=1e-6)  # the producer's would be 0.00996078


def test_int8_asymmetric_product():
    """Σ A B = 284 −674, Σ B = 6 −4, a zero point of −64: 668 −930 before the scales."""
    spec = WeightSpec("int", 8, (1, 0), "float32")
    codes = np.array([[1, 3, -5, 7], [2, -4, 6, -8]])
    weight = QWeight(spec, (2, 4), (codes + 128).astype(np.uint8), f32([0.01], [0.02]))
    x = f32([-1, 0, 1.9, 3])
    found = quantize(x, INT8_ASYM)
    assert found.scale[0, 0] == np.float32(0.015686275) and found.zero.tolist() == [[-64]]
    sums = found.codes @ codes.T
    assert sums.tolist() == [[284, -674]] and codes.sum(axis=1).tolist() == [6, -4]
    assert (sums - found.zero * codes.sum(axis=1)).tolist() == [[668, -930]]
    np.testing.assert_allclose(linear_exact(QLinear(weight, INT8_ASYM), x), [[0.10478432, -0.29176472]], rtol=1e-6)


def test_int8_asymmetric_of_positive_inputs():
    found = quantize(f32([2, 3]), INT8_ASYM)
    assert found.scale[0, 0] == np.float32(1) / np.float32(255)
    assert found.zero.tolist() == [[-638]] and found.codes.tolist() == [[-128, 127]]


def test_int8_static():
    x = f32([0.124, 0.126, -7, 6.4])
    found = quantize(x, INT8_STATIC, Statics(0.05))
    assert found.codes.tolist() == [[2, 3, -128, 127]]
    np.testing.assert_allclose(found.values(), [[0.1, 0.15, -6.4, 6.35]], rtol=1e-6)


def test_int8_static_asymmetric_product():
    """Ranges of (0.02, −10): −2.36 to 2.74 around a zero point that stands for zero exactly."""
    spec = WeightSpec("int", 8, (1, 0), "float32")
    weight = QWeight(spec, (1, 3), np.array([[130, 127, 129]], np.uint8), f32([0.5]))
    x = f32([-2.36, 2.74, 0], [-9, 9, 0.01])
    found = quantize(x, INT8_STATIC_ASYM, Statics(0.02, -10))
    assert found.codes.tolist() == [[-128, 127, -10], [-128, 127, -10]]
    np.testing.assert_allclose(found.values(), [[-2.36, 2.74, 0]] * 2, rtol=1e-6)
    linear = QLinear(weight, INT8_STATIC_ASYM, input_scale=0.02, input_zero=-10)
    np.testing.assert_allclose(linear_exact(linear, x), [[0.5 * (2 * -2.36 - 2.74)]] * 2, rtol=1e-6)


# ---- MX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "exponent", "codes", "decoded"),
    [
        ([7, 1, 0.2, -3], 128, [6, 1, 0, 11], [8, 1, 0, -3]),
        ([6.9, 5.2, 1, -3.5], 127, [7, 7, 2, 14], [6, 6, 1, -4]),
    ],
)
def test_mxfp4_group(values, exponent, codes, decoded):
    found = quantize(padded(values, 32), MXFP4)
    assert found.scale.tolist() == [[2.0 ** (exponent - 127)]]
    assert bits(found.codes, E2M1)[:4] == codes
    assert found.values()[0, :4].tolist() == decoded


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [(1.0, 119), (1.74, 119), (1.75, 119), (6.0, 121), (6.99, 121), (7.0, 121), (448, 127), (450, 128), (0.02, 113)],
)
def test_mxfp8_takes_the_ceiling(largest, exponent):
    """An amax of 1.75 · 2^n keeps the exponent that compressed-tensors' own rule would raise."""
    found = quantize(padded([-largest, largest / 3], 32), MXFP8)
    assert found.scale.tolist() == [[2.0 ** (exponent - 127)]]
    assert np.abs(found.codes).max() <= 448
