"""Scales of every kind in every format: zero, negative, infinite or no number is named with its tensor, and a zero over
zeros is a group of zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from make import (
    BF16,
    E4M3,
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
    sextets,
    write,
)

from fewbits.errors import CheckpointError
from fewbits.formats import scales, values
from fewbits.load import decode, inspect, load
from fewbits.qweight import QLinear


def read(folder: Path, stored: Stored, changed: dict[str, Any], **more: Any) -> QLinear:
    tensors = {f"x.y.{suffix}": tensor for suffix, tensor in (stored.tensors | changed).items()}
    planned = inspect(write(folder, tensors, {"quantization_config": block(stored.weights, **more)}))
    assert planned.errors == []
    [row] = planned.rows
    with planned.checkpoint.reader() as reader:
        return decode(planned, row, reader)[0]


def fails(folder: Path, stored: Stored, changed: dict[str, Any], **more: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(folder, stored, changed, **more)
    return caught.value


# Every storage format, each granularity of scale and each dtype that scales are stored in.
FORMATS: dict[str, Stored] = {
    "packed int4 g16 bfloat16": integers(8, 64, 4, 16),
    "packed int3 channel float16": integers(8, 64, 3, dtype=np.float16),
    "packed int8 tensor float32": integers(8, 64, 8, tensor=True, dtype=np.float32),
    "packed uint4 g32 asym": integers(8, 64, 4, 32, True),
    "plain int8 channel": integers(8, 64, 8, plain=True),
    "plain int4 g16": integers(8, 64, 4, 16, plain=True),
    "plain int8 channel float64": integers(8, 64, 8, plain=True, dtype=np.float64),
    "fp8 channel": fp8(8, 64),
    "fp8 blocks": fp8(8, 64, (3, 24)),
    "nvfp4": nvfp4(8, 64),
}
WRONG = [float("nan"), float("inf"), -0.01, 0.0]


def last(array: np.ndarray, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[-1, -1] = value
    return changed


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_scale(tmp_path, name, value):
    stored = FORMATS[name]
    scale = stored.tensors["weight_scale"]
    if np.isinf(value) and scale.dtype == E4M3:
        value = 0xFF  # E4M3 has no infinity; that is its other NaN
        scale = last(scale.view(np.uint8), value).view(E4M3)
    else:
        scale = last(scale, value)
    error = fails(tmp_path, stored, {"weight_scale": scale})
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_scale")
    assert f"block [{scale.shape[0] - 1}, {scale.shape[1] - 1}]" in error.what and error.hint


MX = {"mxfp4": mx(8, 64, 4), "mxfp6": mx(8, 64, 6), "mxfp8": mx(8, 64, 8)}


@pytest.mark.parametrize("name", MX)
def test_an_exponent_of_255_is_no_number(tmp_path, name):
    error = fails(tmp_path, MX[name], {"weight_scale": last(MX[name].tensors["weight_scale"], 255)})
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_scale")
    assert "block [7, 1] is nan" in error.what


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("exponent", [0, 1, 254])
def test_any_other_exponent_is_a_scale(tmp_path, name, exponent):
    stored = MX[name]
    scale = np.full_like(stored.tensors["weight_scale"], exponent)
    weight = read(tmp_path, stored, {"weight_scale": scale}).weight
    before = np.repeat(2.0 ** (stored.tensors["weight_scale"] - 127.0), 32, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), stored.values / before * 2.0 ** (exponent - 127))


# Formats with a row of groups whose every value is zero, at a zero point or with the sign of −0.
def zeros_of(name: str) -> tuple[Stored, dict[str, Any]]:
    codes = np.random.default_rng(0).integers(1, 8, (8, 64))
    codes[3] = 0
    match name:
        case "packed":
            return integers(8, 64, 4, 16), {"weight_packed": packed(codes + 8, 4)}
        case "packed asym":
            zero = np.zeros((8, 4), np.int8)
            zero[3] = -5
            codes[3] = -5
            return integers(8, 64, 4, 16, True), {"weight_packed": packed(codes + 8, 4), "weight_zero_point": zero}
        case "plain":
            return integers(8, 64, 8, 16, plain=True), {"weight": codes.astype(np.int8)}
        case "channel":
            return integers(8, 64, 8, plain=True), {"weight": codes.astype(np.int8)}
        case "fp8":
            weight = codes.astype(E4M3)
            weight[3, ::2] = -0.0
            return fp8(8, 64), {"weight": weight}
        case "fp8 blocks":
            return fp8(8, 64, (1, 32)), {"weight": codes.astype(E4M3)}
        case "nvfp4":
            codes[3, ::2] = 8  # −0
            return nvfp4(8, 64), {"weight_packed": nibbles(codes)}
    raise AssertionError(name)


@pytest.mark.parametrize("sign", [0.0, -0.0])
@pytest.mark.parametrize("name", ["packed", "packed asym", "plain", "channel", "fp8", "fp8 blocks", "nvfp4"])
def test_groups_of_zeros_under_scales_of_zero(tmp_path, name, sign):
    stored, changed = zeros_of(name)
    scale = stored.tensors["weight_scale"].copy()
    scale[3] = sign
    values = read(tmp_path, stored, changed | {"weight_scale": scale}).weight.dequantize()
    assert (values[3] == 0).all() and (values[2] != 0).all() and np.isfinite(values).all()
    scale[2] = 0
    error = fails(tmp_path, stored, changed | {"weight_scale": scale})
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_scale") and "block [2, 0]" in error.what


def test_a_whole_tensor_of_zeros(tmp_path):
    for stored in (integers(8, 64, 8, tensor=True), integers(8, 64, 8, tensor=True, plain=True)):
        codes = {"weight_packed": packed(np.full((8, 64), 128), 8)}
        if "weight" in stored.tensors:
            codes = {"weight": np.zeros((8, 64), np.int8)}
        weight = read(tmp_path, stored, codes | {"weight_scale": np.zeros(1, BF16)}).weight
        assert not weight.dequantize().any()


def test_zeros_of_large_weights_are_looked_for_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "_CODES_AT_ONCE", 100)
    for name in ("packed", "fp8 blocks", "nvfp4"):
        stored, changed = zeros_of(name)
        scale = stored.tensors["weight_scale"].copy()
        scale[3] = 0
        assert not read(tmp_path, stored, changed | {"weight_scale": scale}).weight.dequantize()[3].any()
        scale[6] = 0
        assert "block [6, 0]" in fails(tmp_path, stored, changed | {"weight_scale": scale}).what
    stored = fp8(24, 64, (5, 24))
    scale = stored.tensors["weight_scale"].copy()
    scale[4, 2] = 0
    assert "block [4, 2]" in fails(tmp_path, stored, {"weight_scale": scale}).what


# 1e-45 is float32's smallest number: its reciprocal overflows. So does 1e300 itself.
NO_SCALE = [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-45, 1e300, 1e-300]


@pytest.mark.parametrize("divisor", NO_SCALE)
def test_a_global_scale(tmp_path, divisor):
    error = fails(tmp_path, nvfp4(8, 32), {"weight_global_scale": np.array([divisor])})
    assert (error.code, error.module) == ("scale-invalid", "x.y.weight_global_scale")


STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("scale", NO_SCALE)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_an_input_scale(tmp_path, kind, scale):
    stored = fp8(8, 32) if kind == "float" else integers(8, 32, 8, plain=True)
    error = fails(tmp_path, stored, {"input_scale": np.array([scale])}, inputs=STATIC | {"type": kind})
    assert (error.code, error.module) == ("scale-invalid", "x.y.input_scale")


@pytest.mark.parametrize("divisor", NO_SCALE)
def test_a_global_input_scale(tmp_path, divisor):
    stored = nvfp4(8, 32)
    inputs = stored.weights | {"dynamic": "local"}
    error = fails(tmp_path, stored, {"input_global_scale": np.array([divisor])}, inputs=inputs)
    assert (error.code, error.module) == ("scale-invalid", "x.y.input_global_scale")


@pytest.mark.parametrize("stored", [np.ones(2, np.float32), np.ones(0, np.float32), np.ones((2, 1), BF16)])
def test_scales_of_inputs_that_are_not_one_number(tmp_path, stored):
    weight = nvfp4(8, 32)
    for suffix, inputs in (("input_scale", STATIC), ("input_global_scale", weight.weights | {"dynamic": "local"})):
        base = weight if suffix == "input_global_scale" else fp8(8, 32)
        error = fails(tmp_path, base, {suffix: stored}, inputs=inputs)
        assert (error.code, error.module) == ("scale-invalid", f"x.y.{suffix}")


# ---- weights that are no numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64])
def test_dense_weights_that_are_not_finite(tmp_path, dtype, value):
    stored = dense(8, 64, dtype)
    error = fails(tmp_path, stored, {"weight": last(stored.tensors["weight"], value)})
    assert (error.code, error.module) == ("weight-nan", "x.y.weight") and "[7, 63]" in error.what


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64])
def test_the_largest_numbers_are_finite(tmp_path, dtype):
    stored = dense(8, 64, dtype)
    info = ml_dtypes.finfo(dtype) if dtype is BF16 else np.finfo(dtype)
    extremes = stored.tensors["weight"].copy()
    extremes[0, :4] = [info.max, info.min, info.tiny, -0.0]
    assert read(tmp_path, stored, {"weight": extremes}).weight.dequantize()[0, 0] == float(info.max)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("make", [lambda: fp8(8, 64), lambda: fp8(8, 64, (4, 32)), lambda: mx(8, 64, 8)])
def test_fp8_codes_that_are_no_number(tmp_path, make: Callable[[], Stored], code):
    stored = make()
    weight = last(stored.tensors["weight"].view(np.uint8), code).view(E4M3)
    error = fails(tmp_path, stored, {"weight": weight})
    assert (error.code, error.module) == ("weight-nan", "x.y.weight") and "[7, 63]" in error.what


def test_every_code_of_fp4_and_fp6_is_a_number(tmp_path):
    every4 = np.tile(np.arange(16), (8, 4))
    assert np.isfinite(read(tmp_path, nvfp4(8, 64), {"weight_packed": nibbles(every4)}).weight.dequantize()).all()
    every6 = np.tile(np.arange(64), (8, 1))
    values = read(tmp_path, MX["mxfp6"], {"weight_packed": sextets(every6)}).weight.dequantize()
    assert np.isfinite(values).all() and len(np.unique(np.abs(values[0]))) > 31


def test_large_weights_are_looked_through_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "_CHECKED_AT_ONCE", 100)
    stored = dense(8, 64)
    for place in ((0, 0), (1, 35), (1, 36), (7, 63)):
        weight = stored.tensors["weight"].copy()
        weight[place] = np.nan
        assert str(list(place)) in fails(tmp_path, stored, {"weight": weight}).what
    for bits, stored in ((6, MX["mxfp6"]), (4, MX["mxfp4"])):
        np.testing.assert_array_equal(read(tmp_path / str(bits), stored, {}).weight.dequantize(), stored.values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite(tmp_path, value):
    bias = np.zeros(8, BF16)
    bias[5] = value
    error = fails(tmp_path, integers(8, 64, 4, 16), {"bias": bias})
    assert (error.code, error.module) == ("weight-nan", "x.y.bias") and "[5]" in error.what


@pytest.mark.parametrize("module", ["model.norm", "model.layers.0.input_layernorm", "model.embed_tokens", "lm_head"])
def test_every_module_of_a_model_is_looked_through(tmp_path, module):
    tensors = llama_tensors()
    weight = tensors[f"{module}.weight"].copy()
    weight.reshape(-1)[-1] = np.nan
    folder = write(tmp_path, tensors | {f"{module}.weight": weight}, llama())
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert (caught.value.code, caught.value.module) == ("weight-nan", f"{module}.weight")
