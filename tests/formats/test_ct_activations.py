"""One weight spec with or without an activation spec, and static scales of inputs: each projection its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import BF16, E4M3, PROJECTIONS, Stored, block, fp8, integers, llama, llama_tensors, mx, nvfp4, write

from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import Notice, PlanError
from fewbits.kernels import KERNELS
from fewbits.kernels.reference import linear as reference_linear
from fewbits.kernels.reference.activations import Statics, quantize
from fewbits.kernels.reference.linear import linear_exact
from fewbits.load import decode, inspect, load, load_linear
from fewbits.nn.linear import Linear
from fewbits.qweight import QLinear

TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
FP8_TOKEN = TOKEN | {"type": "float"}
LOCAL = nvfp4(8, 32).weights | {"dynamic": "local"}
REFERENCE = next(kernel for kernel in KERNELS if kernel.name == "reference.linear")


def decoded(folder: Path, modules: Mapping[str, Mapping[str, Any]], weights: Any, inputs: Any) -> dict[str, QLinear]:
    """Modules as stored → as decoded."""
    stored = {f"{name}.{suffix}": tensor for name, tensors in modules.items() for suffix, tensor in tensors.items()}
    planned = inspect(write(folder, stored, {"quantization_config": block(weights, inputs=inputs)}))
    assert planned.errors == [] and planned.leftover_tensors == []
    with planned.checkpoint.reader() as reader:
        return {row.name: decode(planned, row, reader)[0] for row in planned.rows}


def number(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array([value], dtype)


# ---- one spec with or without ----------------------------------------------------------------------------------------

SCHEMES: dict[str, tuple[Stored, Any, dict[str, Any]]] = {
    "int8 channel × int8 token dynamic": (integers(8, 64, 8, plain=True), TOKEN, {}),
    "int8 channel × int8 token dynamic asym": (integers(8, 64, 8, plain=True), TOKEN | {"symmetric": False}, {}),
    "int8 channel × int8 tensor static": (integers(8, 64, 8, plain=True), STATIC, {"input_scale": number(0.05)}),
    "int8 channel × int8 tensor static asym": (
        integers(8, 64, 8, plain=True),
        STATIC | {"symmetric": False},
        {"input_scale": number(0.05), "input_zero_point": np.array([-10], np.int8)},
    ),
    "uint8 g16 asym × int8 token dynamic": (integers(8, 64, 8, 16, True, plain=True), TOKEN, {}),
    "int4 g16 × int8 token dynamic": (integers(8, 64, 4, 16), TOKEN, {}),
    "int4 g16 × fp8 token dynamic": (integers(8, 64, 4, 16), FP8_TOKEN, {}),
    "fp8 channel × fp8 token dynamic": (fp8(8, 64), FP8_TOKEN, {}),
    "fp8 channel × fp8 tensor dynamic": (fp8(8, 64), FP8_TOKEN | {"strategy": "tensor"}, {}),
    "fp8 channel × fp8 tensor static": (fp8(8, 64), STATIC | {"type": "float"}, {"input_scale": number(0.05)}),
    "fp8 4x32 × fp8 g32 dynamic": (
        fp8(8, 64, (4, 32)),
        {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
        {},
    ),
    "fp4 g16+global × fp4 local": (nvfp4(8, 64), LOCAL, {"input_global_scale": number(672)}),
    "fp4 g32 e8m0 × fp4 g32 e8m0 dynamic": (mx(8, 64, 4), mx(8, 64, 4).weights | {"dynamic": True}, {}),
    "fp4 g32 e8m0 × fp8 token dynamic": (mx(8, 64, 4), FP8_TOKEN, {}),
    "fp6 g32 e8m0 × fp8 g32 e8m0 dynamic": (mx(8, 64, 6), mx(8, 64, 8).weights | {"dynamic": True}, {}),
    "fp8 g32 e8m0 × fp8 g32 e8m0 dynamic": (mx(8, 64, 8), mx(8, 64, 8).weights | {"dynamic": True}, {}),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_weight_is_the_same_with_activations_and_without(tmp_path, name):
    """The spec is the weight's × the activations'; codes and scales don't know of the latter, the result does."""
    stored, inputs, scales = SCHEMES[name]
    quantized = decoded(tmp_path / "with", {"x.y": stored.tensors | scales}, stored.weights, inputs)["x.y"]
    plain = decoded(tmp_path / "without", {"x.y": stored.tensors}, stored.weights, None)["x.y"]
    assert str(quantized.spec) == name and str(plain.spec) == f"{name.split(' × ')[0]} × a16"
    assert quantized.spec.weight == plain.spec.weight
    np.testing.assert_array_equal(quantized.weight.dequantize(), plain.weight.dequantize())

    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    statics = Statics(quantized.input_scale, quantized.input_zero, quantized.input_global_scale)
    assert quantized.act is not None
    expected = quantize(x, quantized.act, statics).values() @ plain.weight.dequantize().T
    np.testing.assert_allclose(linear_exact(quantized, x), expected, rtol=1e-12)
    assert np.abs(linear_exact(quantized, x) - linear_exact(plain, x)).max() > 1e-5
    ours = load_linear(tmp_path / "with", "x.y", allow_reference=True)(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def warnings_of(folder: Path, stored: Stored, extra: dict[str, Any], inputs: Any = None) -> list[Notice]:
    tensors = {f"x.y.{suffix}": tensor for suffix, tensor in (stored.tensors | extra).items()}
    planned = inspect(write(folder, tensors, {"quantization_config": block(stored.weights, inputs=inputs)}))
    assert planned.errors == [] and planned.leftover_tensors == []
    return [warning for warning in planned.warnings if warning.module == "x.y"]


@pytest.mark.parametrize(
    ("stored", "inputs", "suffix"),
    [
        (nvfp4(8, 32), None, "input_global_scale"),
        (fp8(8, 32), None, "input_scale"),
        (fp8(8, 32), FP8_TOKEN, "input_scale"),
        (integers(8, 32, 8, plain=True), TOKEN, "input_zero_point"),
        (integers(8, 32, 8, plain=True), STATIC, "input_global_scale"),
    ],
)
def test_a_scale_that_is_left_over_is_named(tmp_path, stored, inputs, suffix):
    extra = {"input_scale": number(1)} if inputs is STATIC else {}
    [warning] = warnings_of(tmp_path, stored, extra | {suffix: number(0 if "zero" in suffix else 1)}, inputs)
    assert warning.code == "act-scale-unused" and suffix in warning.text


@pytest.mark.parametrize("zero", [0, -7])
def test_an_input_zero_point_under_symmetric(tmp_path, zero):
    """As with weights: zero is dropped, any other is applied, with a warning."""
    stored = integers(8, 32, 8, plain=True)
    tensors = stored.tensors | {"input_scale": number(0.05), "input_zero_point": np.array([zero], np.int8)}
    planned = inspect(
        write(
            tmp_path,
            {f"x.y.{suffix}": tensor for suffix, tensor in tensors.items()},
            {"quantization_config": block(stored.weights, inputs=STATIC)},
        )
    )
    [row] = planned.rows
    with planned.checkpoint.reader() as reader:
        linear, notices = decode(planned, row, reader)
    assert [notice.code for notice in notices] == (["zero-point-kept"] if zero else [])
    assert (linear.input_zero, linear.spec == row.spec) == ((-7, False) if zero else (None, True))
    x = np.ones((1, 32), np.float32)
    expected = quantize(x, linear.act, Statics(linear.input_scale, linear.input_zero)).values() @ stored.values.T
    np.testing.assert_allclose(load_linear(tmp_path, "x.y", allow_reference=True)(x), expected, rtol=1e-5)


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusal(folder: Path, stored: Stored, inputs: Any, extra: Mapping[str, Any] | None = None) -> PlanError:
    tensors = {f"x.y.{suffix}": tensor for suffix, tensor in (stored.tensors | dict(extra or {})).items()}
    folder = write(folder, tensors, {"quantization_config": block(stored.weights, inputs=inputs)})
    planned = inspect(folder)
    [row], [error] = planned.rows, planned.errors
    assert row.executed_as == "refused" and error.module == "x.y"
    with pytest.raises(PlanError) as caught:
        load_linear(folder, "x.y", allow_reference=True)
    assert caught.value.code == error.code
    return caught.value


@pytest.mark.parametrize(
    ("inputs", "spec"),
    [
        (TOKEN, "int8 token dynamic"),
        (FP8_TOKEN, "fp8 token dynamic"),
        (STATIC | {"type": "float"}, "fp8 tensor static"),
        (mx(8, 32, 4).weights | {"dynamic": True}, "fp4 g32 e8m0 dynamic"),
    ],
)
def test_nvfp4_weights_with_other_activations(tmp_path, inputs, spec):
    error = refusal(tmp_path, nvfp4(8, 32), inputs, {"input_scale": number(1)})
    assert error.code == "scheme-contradiction"
    assert "fp4 g16+global" in error.what and spec in error.what


@pytest.mark.parametrize("stored", [mx(8, 32, 4), fp8(8, 32), integers(8, 32, 4, 16)])
def test_nvfp4_activations_with_other_weights(tmp_path, stored):
    error = refusal(tmp_path, stored, LOCAL, {"input_global_scale": number(672)})
    assert error.code == "scheme-contradiction" and "fp4 local" in error.what
    assert stored.weights is not None and str(stored.weights["num_bits"]) in error.what


def test_nvfp4_in_plain_groups(tmp_path):
    """A group that says `group` where the file has a global scale: the owner's library applies it, so do we."""
    stored = nvfp4(8, 32)
    plain = Stored(stored.tensors, stored.weights | {"strategy": "group"}, stored.values)
    linear = decoded(tmp_path / "a16", {"x.y": plain.tensors}, plain.weights, None)["x.y"]
    assert str(linear.spec) == "fp4 g16+global × a16"
    np.testing.assert_allclose(linear.weight.dequantize(), stored.values, rtol=4e-16)
    tensors = plain.tensors | {"input_global_scale": number(672)}
    assert str(decoded(tmp_path / "a4", {"x.y": tensors}, plain.weights, LOCAL)["x.y"].spec).endswith("× fp4 local")
    # Without a global scale they are plain groups indeed, which NVFP4's activations don't go with.
    tensors = {name: tensor for name, tensor in plain.tensors.items() if name != "weight_global_scale"}
    without = Stored(tensors, plain.weights, stored.values)
    assert str(decoded(tmp_path / "plain", {"x.y": tensors}, plain.weights, None)["x.y"].spec) == "fp4 g16 × a16"
    error = refusal(tmp_path / "refused", without, LOCAL, {"input_global_scale": number(672)})
    assert error.code == "scheme-contradiction" and "fp4 g16 weights with fp4 local" in error.what


@pytest.mark.parametrize(("stored", "inputs", "needed"), [
    (nvfp4(8, 32), LOCAL, "input_global_scale"),
    (fp8(8, 32), STATIC | {"type": "float"}, "input_scale"),
    (integers(8, 32, 8, plain=True), STATIC, "input_scale"),
])  # fmt: skip
def test_activations_whose_scale_isnt_stored(tmp_path, stored, inputs, needed):
    error = refusal(tmp_path, stored, inputs)
    assert error.code == "scale-missing" and needed in error.what


def test_activations_that_nothing_computes(tmp_path):
    error = refusal(tmp_path, integers(8, 32, 4, 16), TOKEN | {"num_bits": 4})
    assert error.code == "kernel-none" and "int4 token dynamic" in error.what


# ---- each its own ----------------------------------------------------------------------------------------------------


def fused(linears: list[QLinear], x: np.ndarray) -> tuple[np.ndarray, ...]:
    """One call over several projections that share x, as q/k/v and gate/up are."""
    results: tuple[np.ndarray, ...] = Linear(*[(REFERENCE, REFERENCE.pack(linear)) for linear in linears])(x)
    return results


def test_fused_shards_keep_their_own_global_scales_by_hand(tmp_path):
    """Code 7 under the scale 448: a divisor of 896 makes 3, one of 448 makes 6; the larger for both would make 3."""
    shard = {
        "weight_packed": np.full((1, 8), 0x77, np.uint8),
        "weight_scale": np.array([[448]]).astype(E4M3),
    }
    shards = {
        "a.q_proj": shard | {"weight_global_scale": number(896)},
        "a.k_proj": shard | {"weight_global_scale": number(448)},
    }
    linears = decoded(tmp_path, shards, nvfp4(8, 32).weights, None)
    assert np.unique(linears["a.q_proj"].weight.dequantize()).tolist() == [3.0]
    assert np.unique(linears["a.k_proj"].weight.dequantize()).tolist() == [6.0]
    q, k = fused([linears["a.q_proj"], linears["a.k_proj"]], np.ones((1, 16), np.float32))
    assert (q.tolist(), k.tolist()) == ([[48.0]], [[96.0]])


def nvfp4_shard(seed: int, divisor: float) -> Stored:
    stored = nvfp4(8, 32, seed=seed)
    values = stored.values * float(stored.tensors["weight_global_scale"][0]) / np.float32(divisor)
    return Stored(stored.tensors | {"weight_global_scale": number(divisor)}, stored.weights, values)


def test_fused_shards_keep_unequal_global_scales_exactly(tmp_path):
    shards = {f"a.{name}_proj": nvfp4_shard(seed, divisor) for seed, (name, divisor) in enumerate(
        {"q": 895.99994, "k": 123.456, "v": 4e4}.items())}  # fmt: skip
    linears = decoded(
        tmp_path, {name: stored.tensors for name, stored in shards.items()}, LOCAL | {"dynamic": False}, None
    )
    for name, stored in shards.items():
        assert linears[name].weight.global_scale == 1 / float(stored.tensors["weight_global_scale"][0])
        np.testing.assert_allclose(linears[name].weight.dequantize(), stored.values, rtol=4e-16)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    for name, y in zip(shards, fused([linears[name] for name in shards], x), strict=True):
        np.testing.assert_allclose(y, x @ shards[name].values.T, rtol=1e-4, atol=1e-4)


# Scales that differ by factors: under the largest of them most inputs of the others would be codes of a few steps.
UNEQUAL = {"q": 0.004, "k": 0.05, "v": 0.9}


def static_shard(kind: str, seed: int, scale: float) -> tuple[Stored, dict[str, Any], Any]:
    if kind == "int8":
        return integers(8, 32, 8, plain=True, seed=seed), {"input_scale": number(scale)}, STATIC
    if kind == "int8 asym":
        zero = {"input_zero_point": np.array([int(-scale * 100)], np.int8)}
        return (
            integers(8, 32, 8, plain=True, seed=seed),
            {"input_scale": number(scale)} | zero,
            STATIC | {"symmetric": False},
        )
    if kind == "fp8":
        return fp8(8, 32, seed=seed), {"input_scale": number(scale)}, STATIC | {"type": "float"}
    return nvfp4(8, 32, seed=seed), {"input_global_scale": number(1 / scale)}, LOCAL


@pytest.mark.parametrize("kind", ["int8", "int8 asym", "fp8", "nvfp4"])
@pytest.mark.parametrize("names", [
    [f"model.layers.0.self_attn.{name}_proj" for name in UNEQUAL],
    [f"model.layers.0.mlp.experts.{expert}.gate_proj" for expert in range(3)],
    [f"model.layers.0.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")],
], ids=["shards", "experts", "of one expert"])  # fmt: skip
def test_static_scales_of_inputs_are_each_its_own(tmp_path, kind, names):
    parts = {name: static_shard(kind, seed, scale) for seed, (name, scale) in enumerate(
        zip(names, UNEQUAL.values(), strict=True))}  # fmt: skip
    modules = {name: stored.tensors | extra for name, (stored, extra, _) in parts.items()}
    stored, _, inputs = parts[names[0]]
    linears = decoded(tmp_path, modules, stored.weights, inputs)
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    together = fused([linears[name] for name in names], x)
    largest = max(linears[name].input_scale or linears[name].input_global_scale or 0 for name in names)
    for name, y in zip(names, together, strict=True):
        stored, extra, _ = parts[name]
        linear = linears[name]
        if kind == "nvfp4":
            assert linear.input_global_scale == 1 / float(extra["input_global_scale"][0])
        else:
            assert linear.input_scale == float(extra["input_scale"][0])
            assert linear.input_zero == (int(extra["input_zero_point"][0]) if "asym" in kind else None)
        own = Statics(linear.input_scale, linear.input_zero, linear.input_global_scale)
        expected = quantize(x, linear.act, own).values() @ stored.values.T
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(load_linear(tmp_path, name, allow_reference=True)(x), expected, rtol=1e-4, atol=1e-4)
        if name != names[2]:  # the largest scale would be told from its own
            merged = Statics(linear.input_scale and largest, linear.input_zero, linear.input_global_scale and largest)
            difference = np.abs(quantize(x, linear.act, merged).values() @ stored.values.T - expected).max()
            assert difference > 100 * np.abs(y - expected).max()


def test_inputs_are_quantized_once_for_each_distinct_scale(tmp_path, monkeypatch):
    modules = {}
    for seed, scale in enumerate((0.05, 0.01, 0.05)):
        modules[f"a.{seed}"] = integers(8, 32, 8, plain=True, seed=seed).tensors | {"input_scale": number(scale)}
    linears = decoded(tmp_path, modules, integers(8, 32, 8).weights, STATIC)
    scales = []

    def counted(x: Any, act: Any, statics: Statics) -> Any:
        scales.append(statics.scale)
        return quantize(x, act, statics)

    monkeypatch.setattr(reference_linear, "quantize", counted)
    fused(list(linears.values()), np.ones((2, 32), np.float32))
    assert scales == [float(np.float32(0.05)), float(np.float32(0.01))]


def test_a_model_runs_with_the_scales_of_each_shard(tmp_path):
    """Its logits are those of its own scales: the largest of q, k and v for all three makes others."""
    random = np.random.default_rng(5)

    def logits(name: str, scales: dict[str, float]) -> np.ndarray:
        stored = {
            last.rpartition(".")[2]: integers(*shape, 8, plain=True, seed=seed)
            for seed, (last, shape) in enumerate(PROJECTIONS.items())
        }
        tensors = llama_tensors(**stored)
        for projection in PROJECTIONS:
            tensors[f"{projection}.input_scale"] = number(scales.get(projection[-6:-5], 0.02), BF16)
        config = llama(block(integers(8, 32, 8).weights, ["re:.*_proj$"], inputs=STATIC))
        loaded = load(write(tmp_path / name, tensors, config), allow_reference=True)
        cache = KVCache(loaded.cache_layers, max_pages=8)
        result: np.ndarray = loaded.decoder.forward(cache.batch([Part(0, ids, len(ids))]), cache).logits
        return result

    ids = random.integers(0, 40, 6).tolist()
    own = {"q": 0.01, "k": 0.03, "v": 0.5}
    first, again = logits("own", own), logits("again", own)
    np.testing.assert_array_equal(first, again)
    for shard in own:
        merged = logits(f"merged {shard}", own | {shard: max(own.values())})
        assert shard == "v" or np.abs(merged - first).max() > 1e-3
