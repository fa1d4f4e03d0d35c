"""From stored tensors to numbers: vectors worked out by hand, written files read back, and data that can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import (
    BF16,
    E4M3,
    Raw,
    Stored,
    block,
    dense,
    fp8,
    integers,
    llama,
    llama_tensors,
    mx,
    nibbles,
    nvfp4,
    packed,
    write,
)

from fewbits.errors import CheckpointError, Notice
from fewbits.load import decode, inspect
from fewbits.qweight import QLinear


def plan_one(folder: Path, tensors: dict[str, Any], weights: dict[str, Any] | None, **more: Any) -> Any:
    """The plan of one linear module "x.y" of an unknown family."""
    stored = {f"x.y.{suffix}": tensor for suffix, tensor in tensors.items()}
    return inspect(write(folder, stored, {"quantization_config": block(weights, **more)}))


def read(folder: Path, tensors: dict[str, Any], weights: dict[str, Any] | None, **more: Any) -> QLinear:
    linear, notices = read_with_notices(folder, tensors, weights, **more)
    assert notices == []
    return linear


def read_with_notices(folder: Path, tensors: Any, weights: Any, **more: Any) -> tuple[QLinear, list[Notice]]:
    planned = plan_one(folder, tensors, weights, **more)
    assert planned.errors == []
    [row] = planned.rows
    with planned.checkpoint.reader() as reader:
        return decode(planned, row, reader)


def fails(folder: Path, tensors: Any, weights: Any, **more: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_with_notices(folder, tensors, weights, **more)
    assert len(str(caught.value)) < 600
    return caught.value


def refused(folder: Path, tensors: Any, weights: Any, **more: Any) -> tuple[str, str]:
    """Code and text of the plan's one error."""
    planned = plan_one(folder, tensors, weights, **more)
    [error] = planned.errors
    assert error.module == "x.y"
    assert [row.executed_as for row in planned.rows] == ["refused"]
    return error.code, error.text


def i32(*words: int) -> np.ndarray:
    return np.array(words, np.uint32).view(np.int32)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_asymmetric_int4_by_hand(tmp_path):
    """s = 0.1, zero point -6, codes [-8, -6, 1, 7]: [-0.2, 0, 0.7, 1.3]."""
    tensors = {
        "weight_packed": i32(0xF920).reshape(1, 1),
        "weight_scale": np.array([[0.1]], np.float32),
        "weight_zero_point": i32(2).reshape(1, 1),
        "weight_shape": np.array([1, 4]),
    }
    linear = read(tmp_path, tensors, {"num_bits": 4, "strategy": "channel", "symmetric": False})
    np.testing.assert_allclose(linear.weight.dequantize(), [[-0.2, 0, 0.7, 1.3]], rtol=1e-7)
    assert linear.weight.codes.tolist() == [[0x20, 0xF9]] and linear.weight.zero.tolist() == [[2]]


@pytest.mark.parametrize(
    ("rows", "words", "zeros"),
    [
        (8, [[0x76543210, 0x88888888]], [[value, 0] for value in range(-8, 0)]),
        (3, [[0x00000F69]], [[1], [-2], [7]]),
        (12, [[0x76543210], [0x00007654]], [[value] for value in (*range(-8, 0), -4, -3, -2, -1)]),
    ],
)
def test_zero_points_along_the_rows(tmp_path, rows, words, zeros):
    groups = len(zeros[0])
    columns = 8 * groups
    tensors = {
        "weight_packed": np.zeros((rows, columns // 8), np.int32),  # every code is -8
        "weight_scale": np.ones((rows, groups), np.float32),
        "weight_zero_point": np.array(words, np.uint32).view(np.int32),
        "weight_shape": np.array([rows, columns]),
    }
    weights = {"num_bits": 4, "group_size": 8, "symmetric": False}
    linear = read(tmp_path, tensors, weights)
    assert linear.weight.zero.tolist() == [[zero + 8 for zero in row] for row in zeros]
    expected = [[-8 - row[column // 8] for column in range(columns)] for row in zeros]
    assert linear.weight.dequantize().tolist() == expected


def test_rounding_of_products_by_hand(tmp_path):
    """A bfloat16 scale of 0.0123: -7 is -0.0863037109375 exactly and -0.08642578125 to the producer."""
    tensors = {
        "weight_packed": packed(np.array([[1, 11, 0, 8, 8, 8, 8, 8]]), 4),
        "weight_scale": np.array([[0.0123]], BF16),
        "weight_shape": np.array([1, 8]),
    }
    weight = read(tmp_path, tensors, {"num_bits": 4, "strategy": "channel"}).weight
    assert weight.dequantize()[0, :4].tolist() == [-0.0863037109375, 0.0369873046875, -0.0986328125, 0]
    producer = weight.dequantize(rounding="producer")
    assert producer.dtype == BF16
    assert producer[0, :4].astype(float).tolist() == [-0.08642578125, 0.037109375, -0.0986328125, 0]


def test_nvfp4_by_hand(tmp_path):
    """Codes 1 15 3 5 8 4 (low nibble first) under the scale 128 and the divisor 896: a factor of a seventh."""
    tensors = {
        "weight_packed": np.array([[0xF1, 0x53, 0x48, 0, 0, 0, 0, 0]], np.uint8),
        "weight_scale": np.array([[0x70]], np.uint8).view(E4M3),
        "weight_global_scale": np.array([896], np.float32),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    values = read(tmp_path, tensors, weights).weight.dequantize()[0]
    np.testing.assert_allclose(values[:6], np.array([0.5, -6, 1.5, 3, -0.0, 2]) / 7, rtol=1e-15)
    assert np.signbit(values[4])


def test_nvfp4_groups_by_hand(tmp_path):
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    tensors = {
        "weight_packed": np.array([[0xD7, 3, *[0] * 6, 0xD7, 0x41, *[0] * 6]], np.uint8),
        "weight_scale": np.array([[0x7E, 0x67]], np.uint8).view(E4M3),
        "weight_global_scale": np.array([896], np.float32),
    }
    values = read(tmp_path, tensors, weights).weight.dequantize()[0]
    np.testing.assert_allclose(values[:4], [3, -1.5, 0.75, 0], rtol=1e-15)
    np.testing.assert_allclose(values[16:20], [0.4017857, -0.2008929, 0.0334821, 0.1339286], rtol=2e-6)


def test_fp6_by_hand(tmp_path):
    """0.125 -7.5 1.0 -0.5 are the codes 1 63 8 36, the bytes C1 8F 90."""
    tensors = {
        "weight_packed": np.array([[0xC1, 0x8F, 0x90] + [0] * 21], np.uint8),
        "weight_scale": np.array([[127]], np.uint8),
    }
    weights = {"num_bits": 6, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}
    weight = read(tmp_path, tensors, weights).weight
    assert weight.dequantize()[0, :5].tolist() == [0.125, -7.5, 1.0, -0.5, 0]
    assert weight.codes[0, :4].tolist() == [1, 63, 8, 36]


ORDER = np.array([0, 1, 0, 1, 1, 0, 1, 0], np.int32)


def act_ordered(codes: list[int], g_idx: Any) -> dict[str, Any]:
    return {
        "weight_packed": packed(np.array([codes]) + 8, 4),
        "weight_scale": np.array([[0.5, 2]], np.float32),
        "weight_shape": np.array([1, 8]),
        "weight_g_idx": np.asarray(g_idx, np.int32),
    }


FOUR_BY_FOUR = {"num_bits": 4, "group_size": 4}


def test_act_order_by_hand(tmp_path):
    codes = [1, 1, 2, 2, 3, 3, -1, -1]
    weights = FOUR_BY_FOUR | {"actorder": "group"}
    weight = read(tmp_path, act_ordered(codes, ORDER), weights).weight
    assert weight.dequantize().tolist() == [[0.5, 2, 1, 4, 6, 1.5, -2, -0.5]]
    assert weight.perm.tolist() == [0, 2, 5, 7, 1, 3, 4, 6] and weight.spec.act_order


@pytest.mark.parametrize("g_idx", [[0, 0, 0, 0, 1, 1, 1, 1], [-1] * 8, [0, 1, 0, -1, 1, 0, 1, 0]])
def test_an_unset_or_plain_order_is_none(tmp_path, g_idx):
    weight = read(tmp_path, act_ordered([1, 1, 2, 2, 3, 3, -1, -1], g_idx), FOUR_BY_FOUR).weight
    assert weight.dequantize().tolist() == [[0.5, 0.5, 1, 1, 6, 6, -2, -2]]
    assert weight.perm is None and not weight.spec.act_order


@pytest.mark.parametrize("g_idx", [[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0, 1, -7]])
def test_an_order_that_fills_groups_unevenly(tmp_path, g_idx):
    error = fails(tmp_path, act_ordered([0] * 8, g_idx), FOUR_BY_FOUR)
    assert (error.code, error.module) == ("act-order-invalid", "x.y.weight_g_idx")


def test_an_order_that_is_promised_and_absent(tmp_path):
    tensors = act_ordered([0] * 8, ORDER)
    del tensors["weight_g_idx"]
    folder_weights = FOUR_BY_FOUR | {"actorder": "group"}
    weight = read(tmp_path, tensors, folder_weights).weight
    assert weight.perm is None and not weight.spec.act_order
    planned = plan_one(tmp_path, tensors, folder_weights)
    assert [notice.code for notice in planned.warnings if notice.module == "x.y"] == ["act-order-absent"]


@pytest.mark.parametrize("g_idx", [np.zeros(7, np.int32), np.zeros(8, np.float32), np.zeros((2, 4), np.int32)])
@pytest.mark.parametrize("plain", [True, False])
def test_an_order_of_the_wrong_shape(tmp_path, g_idx, plain):
    stored = integers(1, 8, 4, 4, plain=plain)
    code, text = refused(tmp_path, stored.tensors | {"weight_g_idx": g_idx}, stored.weights)
    assert code == "tensors-disagree" and "weight_g_idx" in text


@pytest.mark.parametrize(("exponent", "value"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127)])
def test_e8m0_by_hand(tmp_path, exponent, value):
    weight = np.zeros((1, 32), E4M3)
    weight[0, 0] = 1
    tensors = {"weight": weight, "weight_scale": np.array([[exponent]], np.uint8)}
    weights = {"type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}
    assert read(tmp_path, tensors, weights).weight.dequantize()[0, 0] == value


def test_e8m0_255_is_no_number(tmp_path):
    tensors = {"weight": np.ones((1, 32), E4M3), "weight_scale": np.array([[255]], np.uint8)}
    error = fails(tmp_path, tensors, {"type": "float", "group_size": 32, "scale_dtype": "torch.uint8"})
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_scale")


@given(
    bits=st.sampled_from([2, 3, 4, 5, 7, 8]), columns=st.integers(1, 80), padded=st.booleans(), rows=st.integers(1, 9)
)
def test_any_width_of_a_row(tmp_path_factory, bits, columns, padded, rows):
    """K that ends inside a word: `weight_shape` and the writer's version tell."""
    stored = integers(rows, columns, bits, None, True, padded=padded, seed=columns)
    folder = tmp_path_factory.mktemp("row")
    weight = read(folder, stored.tensors, stored.weights, version="0.15.0" if padded else "0.19.0").weight
    np.testing.assert_array_equal(weight.dequantize(), stored.values)


def test_modules_alike_but_for_their_weight_shape(tmp_path):
    """Both are four words wide; only the data of weight_shape tells 31 columns from 32."""
    wide, narrow = integers(4, 32, 4, seed=1), integers(4, 31, 4, seed=2)
    tensors = wide.under("a.wide") | narrow.under("a.narrow")
    planned = inspect(write(tmp_path, tensors, {"quantization_config": block(wide.weights)}))
    assert planned.errors == []
    with planned.checkpoint.reader() as reader:
        for row, stored in zip(planned.rows, (wide, narrow), strict=True):
            linear, _ = decode(planned, row, reader)
            np.testing.assert_array_equal(linear.weight.dequantize(), stored.values)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (1, 8)])
def test_scales_a_row_in_any_shape(tmp_path, shape):
    stored = integers(8, 32, 4)
    tensors = stored.tensors | {"weight_scale": stored.tensors["weight_scale"].reshape(shape)}
    np.testing.assert_array_equal(read(tmp_path, tensors, stored.weights).weight.dequantize(), stored.values)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_for_the_tensor_in_any_shape(tmp_path, shape):
    stored = integers(8, 32, 4, tensor=True, asymmetric=True)
    tensors = stored.tensors | {"weight_scale": stored.tensors["weight_scale"].reshape(shape)}
    tensors["weight_zero_point"] = tensors["weight_zero_point"].reshape(shape)
    np.testing.assert_array_equal(read(tmp_path, tensors, stored.weights).weight.dequantize(), stored.values)


# ---- zero points -------------------------------------------------------------------------------------------------


def test_an_absent_zero_point_is_zero(tmp_path):
    stored = integers(8, 32, 4, 16)
    weight = read(tmp_path, stored.tensors, stored.weights | {"symmetric": False}).weight
    np.testing.assert_array_equal(weight.dequantize(), stored.values)
    assert weight.spec.zero_point == "integer" and (weight.zero == 8).all()


@pytest.mark.parametrize("plain", [True, False])
def test_zero_points_of_zero_under_symmetric_are_dropped(tmp_path, plain):
    stored = integers(8, 32, 4, 16, plain=plain)
    zero = np.zeros((8, 2), np.int8)
    weight = read(tmp_path, stored.tensors | {"weight_zero_point": zero}, stored.weights).weight
    assert weight.zero is None and weight.spec.kind == "int"
    np.testing.assert_array_equal(weight.dequantize(), stored.values)


@pytest.mark.parametrize("plain", [True, False])
def test_zero_points_that_differ_under_symmetric_are_applied(tmp_path, plain):
    stored = integers(8, 32, 4, 16, True, plain=plain)
    linear, notices = read_with_notices(tmp_path, stored.tensors, stored.weights | {"symmetric": True})
    np.testing.assert_array_equal(linear.weight.dequantize(), stored.values)
    assert [(notice.code, notice.module) for notice in notices] == [("zero-point-kept", "x.y")]
    assert linear.weight.spec.kind == "uint"


@pytest.mark.parametrize("value", [8, -9, 127, -128])
def test_unpacked_zero_points_outside_of_their_bits(tmp_path, value):
    stored = integers(8, 32, 4, 16)
    zero = np.zeros((8, 2), np.int8)
    zero[3, 1] = value
    error = fails(tmp_path, stored.tensors | {"weight_zero_point": zero}, stored.weights | {"symmetric": False})
    assert (error.code, error.module) == ("code-range", "x.y.weight_zero_point")


@pytest.mark.parametrize(
    "zero", [np.zeros((8, 2), np.float32), np.zeros((8, 2), np.uint8), np.zeros((8, 2), bool), np.zeros((8, 2), BF16)]
)
def test_zero_points_that_are_no_signed_integers(tmp_path, zero):
    stored = integers(8, 32, 4, 16)
    code, text = refused(tmp_path, stored.tensors | {"weight_zero_point": zero}, stored.weights | {"symmetric": False})
    assert code == "tensors-disagree" and "weight_zero_point" in text


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (8, 2), (2, 1), (1, 2, 1)])
def test_packed_zero_points_of_the_wrong_shape(tmp_path, shape):
    """The damaged files of 0.9.4 to 0.10 have extra columns."""
    stored = integers(8, 32, 4, 16, True)
    tensors = stored.tensors | {"weight_zero_point": np.zeros(shape, np.int32)}
    code, text = refused(tmp_path, tensors, stored.weights)
    assert code == "tensors-disagree" and str(list(shape)) in text


def test_float_weights_have_no_zero_point(tmp_path):
    stored = fp8(8, 32)
    nothing = {"weight_zero_point": np.zeros((8, 1), E4M3)}
    np.testing.assert_array_equal(
        read(tmp_path, stored.tensors | nothing, stored.weights).weight.dequantize(), stored.values
    )
    error = fails(tmp_path, stored.tensors | {"weight_zero_point": np.ones((8, 1), E4M3)}, stored.weights)
    assert (error.code, error.module) == ("tensors-disagree", "x.y.weight_zero_point")


# ---- scales --------------------------------------------------------------------------------------------------------


def with_scale(stored: Stored, value: float, place: tuple[int, int] = (3, 0)) -> dict[str, Any]:
    scale = stored.tensors["weight_scale"].copy()
    scale[place] = value
    return stored.tensors | {"weight_scale": scale}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 0.0])
@pytest.mark.parametrize(
    "make", [lambda: integers(8, 32, 4, 16), lambda: integers(8, 32, 8, plain=True), lambda: fp8(8, 32)]
)
def test_scales_that_are_none(tmp_path, make, value):
    stored = make()
    error = fails(tmp_path, with_scale(stored, value), stored.weights)
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_scale")
    assert "block [3, 0]" in error.what and error.hint


def test_a_zero_scale_over_zeros_decodes_to_zeros(tmp_path):
    stored = integers(4, 32, 4, 16)
    codes = np.random.default_rng(0).integers(0, 16, (4, 32))
    codes[2, 16:] = 8
    tensors = with_scale(stored, 0, (2, 1)) | {"weight_packed": packed(codes, 4)}
    values = read(tmp_path, tensors, stored.weights).weight.dequantize()
    assert (values[2, 16:] == 0).all() and (values[2, :16] != 0).any()


def test_a_zero_scale_over_codes_at_an_asymmetric_zero_point(tmp_path):
    stored = integers(4, 32, 4, 16, True)
    zero = np.zeros((4, 2), np.int8)
    zero[2, 1] = -3
    codes = np.random.default_rng(0).integers(0, 16, (4, 32))
    codes[2, 16:] = 5
    tensors = with_scale(stored, 0, (2, 1)) | {"weight_packed": packed(codes, 4), "weight_zero_point": zero}
    assert (read(tmp_path, tensors, stored.weights).weight.dequantize()[2, 16:] == 0).all()
    codes[2, 20] = 8
    assert fails(tmp_path, tensors | {"weight_packed": packed(codes, 4)}, stored.weights).code == "scale-invalid"


def test_float64_scales_above_float32_are_infinite(tmp_path):
    stored = integers(8, 32, 4, 16, dtype=np.float64)
    assert fails(tmp_path, with_scale(stored, 1e300), stored.weights).code == "scale-invalid"


@pytest.mark.parametrize(
    "scale",
    [np.ones((8, 2), np.int32), np.ones((8, 2), bool), np.ones((8, 2), np.complex64), np.ones((8, 2), np.uint8)],
)
def test_scales_of_a_dtype_that_no_scale_has(tmp_path, scale):
    stored = integers(8, 32, 4, 16)
    code, text = refused(tmp_path, stored.tensors | {"weight_scale": scale}, stored.weights)
    assert code == "tensors-disagree" and "weight_scale" in text


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_global_scale_that_is_none(tmp_path, divisor):
    stored = nvfp4(8, 32)
    error = fails(tmp_path, stored.tensors | {"weight_global_scale": np.array([divisor], np.float32)}, stored.weights)
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_global_scale")


@pytest.mark.parametrize("divisor", [np.ones(0, np.float32), np.ones(2, np.float32), np.ones(1, np.int32)])
def test_a_global_scale_that_is_not_one_number(tmp_path, divisor):
    stored = nvfp4(8, 32)
    code, text = refused(tmp_path, stored.tensors | {"weight_global_scale": divisor}, stored.weights)
    assert code == "tensors-disagree" and "weight_global_scale" in text


def test_fp8_codes_that_are_no_number(tmp_path):
    stored = fp8(8, 32)
    weight = stored.tensors["weight"].copy()
    weight.view(np.uint8)[2, 5] = 0xFF
    error = fails(tmp_path, stored.tensors | {"weight": weight}, stored.weights)
    assert (error.code, error.module) == ("weight-nan", "x.y.weight")


@pytest.mark.parametrize("value", [8, -9])
def test_codes_outside_of_their_bits(tmp_path, value):
    stored = integers(8, 32, 4, 16, plain=True)
    weight = stored.tensors["weight"].copy()
    weight[1, 1] = value
    error = fails(tmp_path, stored.tensors | {"weight": weight}, stored.weights)
    assert (error.code, error.module) == ("code-range", "x.y.weight")


# ---- activations ---------------------------------------------------------------------------------------------------

STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def test_static_inputs(tmp_path):
    stored = integers(8, 32, 8, plain=True)
    tensors = stored.tensors | {
        "input_scale": np.array([0.5], BF16),
        "input_zero_point": np.array([-7], np.int8),
        "bias": np.arange(8).astype(np.float16),
    }
    linear = read(tmp_path, tensors, stored.weights, inputs=STATIC | {"symmetric": False})
    assert (linear.input_scale, linear.input_zero, linear.bias.tolist()) == (0.5, -7, [*range(8)])
    assert str(linear.spec) == "int8 channel × int8 tensor static asym"


def test_an_absent_input_zero_point_is_zero(tmp_path):
    stored = integers(8, 32, 8, plain=True)
    tensors = stored.tensors | {"input_scale": np.array(0.5, np.float32)}
    assert read(tmp_path, tensors, stored.weights, inputs=STATIC | {"symmetric": False}).input_zero == 0


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [float("nan")], [1.0, 2.0], []])
def test_an_input_scale_that_is_not_one_positive_number(tmp_path, scale):
    stored = integers(8, 32, 8, plain=True)
    tensors = stored.tensors | {"input_scale": np.array(scale, np.float32)}
    error = fails(tmp_path, tensors, stored.weights, inputs=STATIC)
    assert (error.code, error.module) == ("scale-invalid", "x.y.input_scale")


@pytest.mark.parametrize(
    "zero", [np.zeros(0, np.int8), np.zeros(2, np.int8), np.array([300], np.int32), np.array([0.5])]
)
def test_an_input_zero_point_that_is_not_one_integer(tmp_path, zero):
    stored = integers(8, 32, 8, plain=True)
    tensors = stored.tensors | {"input_scale": np.ones(1, np.float32), "input_zero_point": zero}
    error = fails(tmp_path, tensors, stored.weights, inputs=STATIC | {"symmetric": False})
    assert (error.code, error.module) == ("code-range", "x.y.input_zero_point")


def test_a_static_input_scale_that_isnt_stored(tmp_path):
    stored = integers(8, 32, 8, plain=True)
    code, text = refused(tmp_path, stored.tensors, stored.weights, inputs=STATIC)
    assert code == "scale-missing" and "input_scale" in text


def test_the_global_input_scale_becomes_a_multiplier(tmp_path):
    stored = nvfp4(8, 32)
    inputs = stored.weights | {"dynamic": "local"}
    tensors = stored.tensors | {"input_global_scale": np.array([672], np.float32)}
    assert read(tmp_path, tensors, stored.weights, inputs=inputs).input_global_scale == 1 / 672
    code, text = refused(tmp_path, stored.tensors, stored.weights, inputs=inputs)
    assert code == "scale-missing" and "input_global_scale" in text


# ---- tensors against the config ---------------------------------------------------------------------------------


def without(tensors: dict[str, Any], suffix: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name != suffix}


BAD = {
    "group size edited": (integers(8, 64, 4, 32), {"group_size": 16}, {}),
    "bits edited": (integers(8, 64, 4, 32), {"num_bits": 8}, {}),
    "bits edited, a row": (integers(8, 64, 3), {"num_bits": 4}, {}),
    "strategy edited": (integers(8, 64, 4, 32), {"strategy": "channel", "group_size": None}, {}),
    "type edited": (integers(8, 64, 4, 32), {"type": "float"}, {}),
    "fp8 called int8": (fp8(8, 64), {"type": "int"}, {}),
    "int8 called fp8": (integers(8, 64, 8, plain=True), {"type": "float"}, {}),
    "block edited": (fp8(24, 64, (8, 32)), {"block_structure": [16, 32]}, {}),
    "fp4 called fp6": (mx(8, 64, 4), {"num_bits": 6}, {}),
    "nvfp4 called mxfp4": (nvfp4(8, 64), {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, {}),
    "float scales called e8m0": (integers(8, 64, 8, 32, plain=True), {"scale_dtype": "torch.uint8"}, {}),
    "scale with a row too few": (integers(8, 64, 4), {}, {"weight_scale": np.ones((7, 1), BF16)}),
    "scale transposed": (integers(8, 64, 4, 32), {}, {"weight_scale": np.ones((2, 8), BF16)}),
    "packed along rows": (integers(8, 64, 4, 32), {}, {"weight_packed": np.zeros((1, 64), np.int32)}),
    "weight_shape of floats": (integers(8, 64, 4), {}, {"weight_shape": np.array([8.0, float("nan")])}),
    "weight_shape of one number": (integers(8, 64, 4), {}, {"weight_shape": np.array([64])}),
    "weight_shape without a number": (integers(8, 64, 4), {}, {"weight_shape": np.zeros(0, np.int64)}),
    "a huge weight_shape": (integers(8, 64, 4), {}, {"weight_shape": np.zeros(1000, np.int64)}),
    "a negative weight_shape": (integers(8, 64, 4), {}, {"weight_shape": np.array([8, -64])}),
    "an endless weight_shape": (integers(8, 64, 4), {}, {"weight_shape": np.array([8, (1 << 63) - 1])}),
    "no global scale": (nvfp4(8, 64), {}, {"weight_global_scale": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_disagree_with_their_group(tmp_path, name):
    stored, edited, replaced = BAD[name]
    tensors = {key: value for key, value in (stored.tensors | replaced).items() if value is not None}
    weights = {key: value for key, value in (stored.weights | edited).items() if value is not None}
    code, text = refused(tmp_path, tensors, weights)
    assert code == "tensors-disagree" and text.startswith("config_groups.group_0: ")


# K, group size, and how many columns of scales a writer might have made of it.
UNEVEN = [(80, 32, 3), (80, 32, 2), (48, 32, 2), (100, 16, 7), (100, 128, 1), (24, 16, 2), (36, 8, 4)]


@pytest.mark.parametrize(("columns", "group", "scales"), UNEVEN)
@pytest.mark.parametrize("form", ["packed", "plain", "fp8", "nvfp4", "mxfp4"])
def test_columns_that_dont_divide_into_groups(tmp_path, columns, group, scales, form):
    """A named error with the two numbers, whatever the writer did with the rest."""
    random = np.random.default_rng(0)
    scale = random.uniform(0.01, 0.02, (8, scales)).astype(BF16)
    weights = {"num_bits": 4, "group_size": group}
    codes = random.integers(0, 16, (8, columns))
    if form == "packed":
        tensors = {"weight_packed": packed(codes, 4), "weight_shape": np.array([8, columns])}
    elif form == "plain":
        tensors = {"weight": (codes - 8).astype(np.int8)}
    elif form == "fp8":
        tensors, weights = {"weight": codes.astype(E4M3)}, {"type": "float", "group_size": group}
    else:
        tensors = {"weight_packed": nibbles(codes)}
        weights |= {"type": "float"}
        if form == "nvfp4":
            weights |= {"strategy": "tensor_group"}
            tensors["weight_global_scale"] = np.ones(1, np.float32)
            scale = scale.astype(E4M3)
        else:
            weights |= {"scale_dtype": "torch.uint8"}
            scale = np.full((8, scales), 120, np.uint8)
    code, text = refused(tmp_path, tensors | {"weight_scale": scale}, weights)
    assert code == "tensors-disagree" and f"{columns} columns don't divide into groups of {group}" in text


def test_columns_that_dont_divide_and_end_in_the_same_word(tmp_path):
    """62 codes of 4 bits take as many words as 64: the family knows K, else weight_shape's data says it at load."""
    codes = np.random.default_rng(0).integers(0, 16, (64, 62))
    tensors = {
        "weight_packed": packed(codes, 4),
        "weight_scale": np.full((64, 2), 0.01, BF16),
        "weight_shape": np.array([64, 62]),
    }
    weights = {"num_bits": 4, "group_size": 32}
    error = fails(tmp_path / "unknown", tensors, weights)
    assert error.code == "tensors-disagree" and "[64, 62]" in error.what and "groups of 32" in error.what
    stored = Stored(tensors, weights, codes)
    config = llama(block(weights, ["re:.*q_proj"]), hidden_size=62, intermediate_size=96, head_dim=32)
    planned = inspect(write(tmp_path / "known", llama_tensors(q_proj=stored), config))
    assert any("62 columns don't divide into groups of 32" in error.text for error in planned.errors)


def test_packed_weights_in_three_dimensions(tmp_path):
    stored = integers(8, 64, 4, 32)
    tensors = stored.tensors | {"weight_packed": np.zeros((1, 8, 8), np.int32)}
    code, text = refused(tmp_path, tensors, stored.weights)
    assert code == "tensors-disagree" and "weight_packed has 3 dimensions" in text


def test_a_weight_shape_that_contradicts_the_other_tensors(tmp_path):
    stored = integers(8, 64, 4, 32)
    for shape in ([8, 63], [7, 64], [64, 8]):
        error = fails(tmp_path, stored.tensors | {"weight_shape": np.array(shape)}, stored.weights)
        assert (error.code, error.module) == ("tensors-disagree", "x.y")


@pytest.mark.parametrize(
    "stored", [integers(8, 64, 4, 32), integers(8, 64, 8, plain=True), fp8(8, 64), nvfp4(8, 64), mx(8, 64, 6)]
)
@pytest.mark.parametrize("covered", [True, False])
def test_a_missing_scale(tmp_path, stored, covered):
    tensors = without(stored.tensors, "weight_scale")
    code, text = refused(tmp_path, tensors, stored.weights, targets=["Linear" if covered else "nothing"])
    assert code == "module-incomplete"
    assert all(suffix in text for suffix in tensors)


def test_a_missing_weight(tmp_path):
    stored = integers(8, 64, 4, 32)
    code, text = refused(tmp_path, without(stored.tensors, "weight_packed"), stored.weights)
    assert code == "module-incomplete" and "weight_scale" in text


def test_a_swapped_dtype(tmp_path):
    stored = integers(8, 64, 4, 32)
    as_bytes = stored.tensors["weight_packed"].view(np.uint8)
    code, _ = refused(tmp_path, stored.tensors | {"weight_packed": as_bytes}, stored.weights)
    assert code == "tensors-disagree"
    as_int64 = stored.tensors["weight_packed"].astype(np.int64)
    code, text = refused(tmp_path, stored.tensors | {"weight_packed": as_int64}, stored.weights)
    assert code == "module-incomplete" and "weight_packed I64" in text


def test_fake_quantized(tmp_path):
    """Dense weights beside scales: the weight as it is, with a warning; the scales are claimed and unused."""
    values = dense(8, 64)
    scale = {"weight_scale": np.ones((8, 2), BF16), "weight_zero_point": np.zeros((8, 2), np.int8)}
    planned = plan_one(tmp_path, values.tensors | scale, integers(8, 64, 4, 32).weights)
    assert {warning.code for warning in planned.warnings} == {"family-unknown", "fake-quantized"}
    [row] = planned.rows
    assert str(row.spec) == "bfloat16" and len(row.tensors) == 3 and planned.leftover_tensors == []
    with planned.checkpoint.reader() as reader:
        linear, _ = decode(planned, row, reader)
    np.testing.assert_array_equal(linear.weight.dequantize(), values.values)


def test_unused_input_scales_are_named(tmp_path):
    stored = integers(8, 64, 4, 32)
    tensors = stored.tensors | {"input_scale": np.ones(1, BF16)}
    planned = plan_one(tmp_path, tensors, stored.weights)
    assert "act-scale-unused" in {warning.code for warning in planned.warnings}
    assert planned.leftover_tensors == []


def test_marlin_24_is_refused_by_name(tmp_path):
    tensors = {"weight_packed": np.zeros((8, 8), np.int32), "scale_packed": np.ones(8, np.float16)}
    code, text = refused(tmp_path, tensors | {"meta": np.zeros((8, 1), np.int16)}, None, format="marlin-24")
    assert code == "format-refused" and "marlin-24" in text


# ---- without a group ---------------------------------------------------------------------------------------------

ALONE = {
    "int4 g32": (integers(8, 64, 4, 32), "int4 g32"),
    "uint4 g32": (integers(8, 64, 4, 32, True), "uint4 g32 asym"),
    "int3 channel": (integers(8, 64, 3), "int3 channel"),
    "int8 plain": (integers(8, 64, 8, plain=True), "int8 channel"),
    "fp8": (fp8(8, 64), "fp8 channel"),
    "nvfp4": (nvfp4(8, 64), "fp4 g16+global"),
    "mxfp4": (mx(8, 64, 4), "fp4 g32 e8m0"),
    "mxfp6": (mx(8, 64, 6), "fp6 g32 e8m0"),
    "mxfp8": (mx(8, 64, 8), "fp8 g32 e8m0"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_the_tensors_alone_say(tmp_path, name):
    stored, spec = ALONE[name]
    planned = plan_one(tmp_path, stored.tensors, None, targets=["nothing"])
    assert planned.errors == []
    [row] = planned.rows
    assert (str(row.spec), row.decided_by) == (f"{spec} × a16", "its tensors")
    assert "unmatched-but-quantized" in {warning.code for warning in planned.warnings}
    with planned.checkpoint.reader() as reader:
        linear, _ = decode(planned, row, reader)
    np.testing.assert_allclose(linear.weight.dequantize(), stored.values, rtol=4e-16)


def test_tensors_that_leave_their_bits_open(tmp_path):
    """Without weight_shape 8 words may be 64 codes of 4 bits or 32 of 8."""
    stored = integers(8, 64, 4)
    code, text = refused(tmp_path, without(stored.tensors, "weight_shape"), None, targets=["nothing"])
    assert code == "tensors-open" and "bits" in text


def test_a_group_that_fits_settles_what_is_open(tmp_path):
    stored = integers(8, 64, 4, 32)
    tensors = without(stored.tensors, "weight_shape")
    planned = plan_one(tmp_path, tensors, stored.weights, targets=["re:elsewhere"])
    [row] = planned.rows
    assert planned.errors == [] and str(row.spec) == "int4 g32 × a16"


def test_mx_scales_that_the_config_doesnt_name(tmp_path):
    stored = mx(8, 64, 4)
    weights = {key: value for key, value in stored.weights.items() if key != "scale_dtype"}
    np.testing.assert_array_equal(read(tmp_path, stored.tensors, weights).weight.dequantize(), stored.values)


def test_e8m0_under_its_own_dtype(tmp_path):
    stored = mx(8, 64, 4)
    scale = stored.tensors["weight_scale"].view(ml_dtypes.float8_e8m0fnu)
    weight = read(tmp_path, stored.tensors | {"weight_scale": scale}, stored.weights).weight
    np.testing.assert_array_equal(weight.dequantize(), stored.values)
    assert weight.spec.scale_dtype == "float8_e8m0fnu"


def test_sub_byte_dtypes_are_no_codes_here(tmp_path):
    tensors = {"weight_packed": Raw("F4", (8, 64), bytes(256)), "weight_scale": np.ones((8, 2), np.uint8)}
    code, _ = refused(tmp_path, tensors, mx(8, 64, 4).weights)
    assert code == "module-incomplete"
