"""The definition of a linear layer, by hand, and the float32 runner against it."""

from __future__ import annotations

import numpy as np
import pytest
from random_weights import CHANNEL, WEIGHTS, exact_and_bound, floats, integers, random_input, random_linear
from test_activations import FP8, FP8_STATIC, INT8, INT8_ASYMMETRIC, INT8_STATIC_ASYMMETRIC, MXFP4, NVFP4, fp8_group

from fewbits.kernels.reference import linear
from fewbits.qweight import QLinear, QWeight, pack_nibbles
from fewbits.spec import ActSpec, QuantSpec, WeightSpec


def test_asymmetric_int8_with_the_zero_point_taken_out():
    codes = np.array([[1, 3, -5, 7], [2, -4, 6, -8]]) + 128
    scale = np.array([[0.01], [0.02]], np.float32)
    weight = QWeight(integers(8, CHANNEL, scale_dtype="float32"), (2, 4), codes.astype(np.uint8), scale)
    y = linear.linear_exact(QLinear(weight, INT8_ASYMMETRIC), np.array([[-1, 0, 1.9, 3]], np.float32))
    np.testing.assert_allclose(y, [[0.10478432, -0.29176472]], rtol=1e-6)


def test_fp8_in_blocks():
    def bits(values):
        import ml_dtypes

        return np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    codes = bits([[1, 2, -3, 0.5], [4, -1, 2, 1.5]])
    spec = floats(4, 3, (2, 2), "float32")
    weight = QWeight(spec, (2, 4), codes, np.array([[0.5, 0.25]], np.float32))
    y = linear.linear_exact(QLinear(weight, fp8_group(2)), np.array([[1, -2, 0.5, 4]], np.float32))
    np.testing.assert_allclose(y, [[-1.375, 4.75]], rtol=1e-6)


def test_asymmetric_int4_weight_only():
    codes = pack_nibbles(np.array([[0, 2, 9, 15]], np.uint8))
    spec = WeightSpec("uint", 4, (1, 4), "float32", zero_point="integer")
    scale, zero = np.array([[0.1]], np.float32), np.array([[2]], np.uint8)
    y = linear.linear_exact(
        QLinear(QWeight(spec, (1, 4), codes, scale, zero), bias=np.array([0.5], np.float32)),
        np.eye(4, dtype=np.float32),
    )
    np.testing.assert_allclose(y, np.array([[-0.2], [0], [0.7], [1.3]]) + 0.5, rtol=1e-6, atol=1e-9)


ACTS = [None, INT8, INT8_ASYMMETRIC, INT8_STATIC_ASYMMETRIC, FP8, FP8_STATIC, fp8_group(16), NVFP4, MXFP4]


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_runner_is_the_definition_within_float32(name, act):
    layer = random_linear(WEIGHTS[name], (24, 72), act, bias=True)
    x = random_input(3, 72)
    assert linear.accepts(QuantSpec(WEIGHTS[name], act), (24, 72)) is None
    packed = linear.pack(layer)
    assert packed.nbytes == linear.nbytes(layer.spec, (24, 72))
    (y,) = linear.bind([packed])(x)
    exact, bound = exact_and_bound(linear, layer, x)
    np.testing.assert_allclose(exact, linear.linear_exact(layer, x), rtol=1e-12, atol=1e-14)
    assert y.dtype == np.float32
    assert (np.abs(y - exact) <= bound).all()


def test_rows_have_the_same_bits_in_any_company():
    layer = random_linear(WEIGHTS["uint4-g32"], (130, 96), INT8)
    run = linear.bind([linear.pack(layer)])
    x = random_input(70, 96)
    (whole,) = run(x)
    for M in (1, 2, 5, 16, 33):
        (part,) = run(x[3 : 3 + M])
        np.testing.assert_array_equal(part, whole[3 : 3 + M])


def test_weights_that_share_x_keep_their_own_input_scales():
    first = random_linear(WEIGHTS["int8-channel"], (8, 32), FP8_STATIC)
    second = QLinear(first.weight, FP8_STATIC, input_scale=0.5)
    third = QLinear(first.weight)
    x = random_input(4, 32)
    fused = linear.bind([linear.pack(one) for one in (first, second, third)])(x)
    for one, y in zip((first, second, third), fused, strict=True):
        np.testing.assert_array_equal(linear.bind([linear.pack(one)])(x)[0], y)
    assert not np.array_equal(fused[0], fused[1]) and not np.array_equal(fused[1], fused[2])


def test_add_to_adds_in_place():
    layer = random_linear(WEIGHTS["float32"], (8, 16), bias=True)
    run = linear.bind([linear.pack(layer)])
    x, residual = random_input(2, 16), random_input(2, 8, seed=5)
    expected = residual + run(x)[0]
    (result,) = run(x, residual)
    assert result is residual
    np.testing.assert_array_equal(residual, expected)


def test_a_large_weight_is_dequantized_in_pieces(monkeypatch):
    monkeypatch.setattr(linear, "_CHUNK", 100)
    for name in ("fp8-block", "uint4-g32", "uint8-tensor", "bfloat16", "int4-act-order"):
        layer = random_linear(WEIGHTS[name], (50, 64))
        np.testing.assert_array_equal(linear.pack(layer).weight, layer.weight.dequantize().astype(np.float32))


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (QuantSpec(WeightSpec("int", 12, CHANNEL, "float32")), "integer codes of 1 to 8 bits"),
        (QuantSpec(floats(3, 4, CHANNEL, "float32")), "no definition"),
        (QuantSpec(integers(4, CHANNEL), ActSpec("int", 4, "token", True)), "no definition"),
    ],
)
def test_what_it_does_not_define(spec, sentence):
    assert sentence in linear.accepts(spec, (8, 8))
