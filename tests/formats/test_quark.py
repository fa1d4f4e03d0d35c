"""AMD Quark's own exports: every scheme that it writes, held to what Quark itself reads back from its files; and the
cases that went wrong in engines that fuse modules and guess shapes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from make import llama, llama_tensors, write
from safetensors.numpy import load_file
from step3p5_reference import Step

import fewbits
from fewbits import _native
from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import FewbitsError
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.load import decode, inspect, load

EXPORTS = Path(__file__).parents[1] / "exports" / "quark"
DESCRIBED = {path.parent.name: json.loads(path.read_text()) for path in sorted(EXPORTS.glob("*/expected.json"))}
REFUSED = {
    "files-floats": {"scale-missing"},  # the file-to-file exporter gives inputs no scale to calibrate
    "files-step": {"config-missing"},  # a config of one key
}
NOTICED = {
    "fake-quantized": {"fake-quantized"},
    "files-gpt-oss": {"unmatched-but-quantized"},  # experts that Quark left as they were published
    "custom-fp8-kv": {"act-scale-unused"},  # k_proj and v_proj were calibrated, the config says dynamic for all
}
RUN = [name for name in DESCRIBED if name not in REFUSED]
# What expected.json says of it isn't what Quark wrote: the scale in the file isn't the one that it was made with.
NOT_AS_DESCRIBED = {"files-floats": {"model.layers.0.self_attn.v_proj"}}


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()


def as_quark_multiplies(weight: Any) -> np.ndarray:
    """In float32: of NVFP4 the scales by each other first, of two stages of codes the later one first."""
    if weight.global_scale is None:
        return weight.dequantize().astype(np.float32)
    scale, whole = weight.scale.astype(np.float32), np.float32(weight.global_scale)
    ones = replace(weight, scale=np.ones_like(scale), global_scale=None).dequantize().astype(np.float32)
    if weight.spec.kind == "float":
        return ones * weight.spread(scale * whole)
    return ones * weight.spread(scale) * whole


def in_turn(rows: np.ndarray) -> np.ndarray:
    """Rows of gate and, behind them, of up in the order of the file."""
    gate, up = np.split(rows, 2)
    return np.stack([gate, up], 1).reshape(rows.shape)


@pytest.mark.parametrize("name", DESCRIBED)
def test_weights_are_those_that_quark_holds(name: str) -> None:
    plan = inspect(EXPORTS / name)
    assert plan.checkpoint is not None
    refused = {row.name for row in plan.rows if row.resolved is not None and row.resolved.error}
    refused |= NOT_AS_DESCRIBED.get(name, set())
    expected = {module: one["sha256"] for module, one in DESCRIBED[name]["decoded"].items() if module not in refused}
    found = {}
    with plan.checkpoint.reader() as reader:
        for row in plan.rows:
            if row.name in expected:
                linear, notices = decode(plan, row, reader)
                assert notices == []
                values = as_quark_multiplies(linear.weight)
                found[row.name] = digest(in_turn(values) if row.in_turn else values)
    assert found == expected


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_runs_and_what_is_refused(name: str) -> None:
    plan = inspect(EXPORTS / name)
    codes = {error.code for error in plan.errors}
    assert codes == REFUSED.get(name, set())
    assert plan.leftover_tensors == []
    assert {one.code for one in plan.warnings} <= NOTICED.get(name, set())
    if name in RUN:
        quantized = {row.name for row in plan.rows if row.spec.weight.quantized}
        assert quantized == set(DESCRIBED[name]["decoded"])
        assert all(row.executed_as == "native" for row in plan.rows if row.kind == "linear" and row.name in quantized)


@pytest.mark.parametrize("name", RUN)
def test_native_logits_are_the_references(name: str) -> None:
    ids = [3, 7, 11, 30, 5]
    native = fewbits.LLM(EXPORTS / name).logits(ids)
    loaded = load(EXPORTS / name, allow_reference=True, ops=ReferenceOps())
    expected = reference_logits(loaded, ids)
    # An input's code may fall on the other side of a border: of 4 bits that is a large step, and one of FP8 an eighth
    # of the number. Attention that rounds to bfloat16 moves a code in 30; the other tiers are at 2e-7 with FP8.
    acts = [row.spec.act for row in loaded.plan.rows if row.spec.act is not None]
    allowed = 0.05
    if any(act.bits == 4 for act in acts):
        allowed = 0.2
    elif any(act.kind == "float" and act.bits == 8 for act in acts):
        allowed = 0.1 if _native.tier() == "avx512_bf16" else 1e-3
    assert np.linalg.norm(native - expected) < allowed * np.linalg.norm(expected)


def reference_logits(loaded: Any, ids: list[int]) -> np.ndarray:
    cache = KVCache(loaded.cache_layers, max_pages=4)
    output = loaded.decoder.forward(cache.batch([Part(0, ids, logits=len(ids))]), cache)
    return np.asarray(output.logits)


# Quark's model is in bfloat16, and its inputs are codes of another rounding now and then; zero points that are floats
# in its memory are written as whole numbers. gpt-oss-fp8-kv (0.119) has FP8 wherever there can be one; with a float
# cache, its weights and input scales in transformers' float32 give fewbits' logits to 2e-7.
FAR = {"nvfp4-head": 0.25, "integers-narrow": 0.2, "gpt-oss-fp8-kv": 0.2}


@pytest.mark.parametrize("name", [name for name in RUN if "logits" in DESCRIBED[name]])
def test_logits_are_those_of_quarks_own_model(name: str) -> None:
    expected = np.array(DESCRIBED[name]["logits"])
    found = fewbits.LLM(EXPORTS / name, allow_reference=True).logits(DESCRIBED[name]["prompt"])
    assert np.linalg.norm(found - expected) < FAR.get(name, 0.12) * np.linalg.norm(expected)


# ---- the cases that began it ------------------------------------------------------------------------------------


def quantization(weight: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    whole = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    return {"quant_method": "quark", "global_quant_config": whole, "export": {"pack_method": "reorder"}, **more}


def int8(scheme: str = "per_channel", axis: int | None = 0, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    spec = {"dtype": "int8", "qscheme": scheme, "ch_axis": axis, "is_dynamic": dynamic, "symmetric": True}
    return spec | more


PER_TOKEN = quantization(int8(), int8(axis=1, dynamic=True))


def copied(name: str, folder: Path, **changes: Any) -> Path:
    """A fixture with keys of its quantization block changed."""
    shutil.copytree(EXPORTS / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(name: str, folder: Path, change: Any) -> Path:
    """A fixture with other tensors: `change` is given them, and gives them back."""
    shutil.copytree(EXPORTS / name, folder)
    tensors = change(load_file(EXPORTS / name / "model.safetensors"))
    return write(folder, tensors, (folder / "config.json").read_bytes())


def test_the_same_int8_weights_from_compressed_tensors_give_the_same_logits(tmp_path: Path) -> None:
    name = "int8-per-token-head"
    ids = [3, 7, 11, 30, 5]
    tensors = {}
    for key, value in load_file(EXPORTS / name / "model.safetensors").items():
        if key.endswith("weight_scale"):
            value = value.reshape(-1, 1)
        if not key.endswith("weight_zero_point"):
            tensors[key] = value
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads((EXPORTS / name / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    other = write(tmp_path / "ct", tensors, config)
    found, expected = fewbits.LLM(EXPORTS / name).logits(ids), fewbits.LLM(other).logits(ids)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all() and found.std() > 0


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)])
def test_a_scale_for_each_row_is_one_whatever_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ends = ("weight_scale", "weight_zero_point")
        return {key: value.reshape(shape) if key.endswith(ends) else value for key, value in tensors.items()}

    folder = rewritten("int8-per-token-head", tmp_path / "made", change)
    ids = [3, 7, 11]
    expected = fewbits.LLM(EXPORTS / "int8-per-token-head").logits(ids)
    np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), expected)


def test_a_static_scale_for_the_tensor_may_have_one_dimension(tmp_path: Path) -> None:
    """As older exports have it."""
    ends = ("_scale", "_zero_point")
    folder = rewritten(
        "int8-static",
        tmp_path / "made",
        lambda tensors: {key: value.reshape(1) if key.endswith(ends) else value for key, value in tensors.items()},
    )
    ids = [3, 7, 11]
    np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), fewbits.LLM(EXPORTS / "int8-static").logits(ids))


def test_zero_points_that_arent_zero_are_applied(tmp_path: Path) -> None:
    """`symmetric` and a zero point contradict each other: the stored number counts, and the plan's reader is told."""

    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["lm_head.weight_zero_point"] = np.full_like(tensors["lm_head.weight_zero_point"], 3)
        return tensors

    folder = rewritten("int8-per-token-head", tmp_path / "made", change)
    plan = inspect(folder)
    assert plan.checkpoint is not None
    row = next(row for row in plan.rows if row.name == "lm_head")
    with plan.checkpoint.reader() as reader:
        linear, notices = decode(plan, row, reader)
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["lm_head.weight_scale"].astype(np.float64)[:, np.newaxis]
    expected = (tensors["lm_head.weight"].astype(np.float64) - 3) * scale
    np.testing.assert_array_equal(linear.weight.dequantize(), expected)
    assert [one.code for one in notices] == ["zero-point-kept"]


def test_exclude_names_the_unfused_modules() -> None:
    """Those of a shared expert and of attention that are excluded, and no others, are left as they are."""
    plan = inspect(EXPORTS / "files-step")
    stored = {row.name.removeprefix("model.layers.3."): row.spec.weight.quantized for row in plan.rows}
    dense = {"self_attn.q_proj", "share_expert.gate_proj", "moe.gate"}
    quantized = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    quantized |= {"share_expert.up_proj", "share_expert.down_proj"}
    assert {name for name in dense if stored[name]} == set()
    assert {name for name in quantized if not stored[name]} == set()
    decided = {row.name: row.decided_by for row in plan.rows}
    assert decided["model.layers.3.share_expert.gate_proj"].startswith("exclude entry")
    assert decided["model.layers.3.share_expert.up_proj"] == "global_quant_config"


@pytest.mark.parametrize("entry", ["lm_head", "*head", "lm_?ead", "re:lm_.*"])
def test_excluded_but_quantized_runs_as_it_is_stored(tmp_path: Path, entry: str) -> None:
    folder = copied("int8-per-token-head", tmp_path / "made", exclude=[entry])
    plan = inspect(folder)
    [warning] = plan.warnings
    assert (warning.code, warning.module) == ("ignored-but-quantized", "lm_head")
    ids = [3, 7, 11]
    expected = fewbits.LLM(EXPORTS / "int8-per-token-head").logits(ids)
    np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), expected)


def test_every_expert_of_a_stack_has_its_own_rows_of_a_scale(tmp_path: Path) -> None:
    """Scales [E, N] where E is N too, as a stack's only confusion could be."""
    name = "moe-int8"
    config = json.loads((EXPORTS / name / "config.json").read_text())
    experts = config["num_local_experts"]
    tensors = load_file(EXPORTS / name / "model.safetensors")
    stacked = {key: value for key, value in tensors.items() if ".experts." not in key}
    for part in ("gate_proj", "up_proj", "down_proj"):
        for suffix in ("weight", "weight_scale", "weight_zero_point"):
            ones = [tensors[f"model.layers.0.mlp.experts.{e}.{part}.{suffix}"] for e in range(experts)]
            stacked[f"model.layers.0.mlp.experts.{part}.{suffix}"] = np.stack(ones)
    folder = write(tmp_path / "made", stacked, config)
    plan = inspect(folder)
    assert plan.errors == [] and plan.leftover_tensors == []
    ids = [3, 7, 11, 30]
    np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), fewbits.LLM(EXPORTS / name).logits(ids))


# ---- configs that contradict the tensors, or mean nothing ------------------------------------------------------------


def plan_of(folder: Path, config: dict[str, Any], **tensors: Any) -> Any:
    """The plan of a small Llama whose o_proj has these tensors."""
    stored = llama_tensors()
    name = "model.layers.0.self_attn.o_proj"
    del stored[f"{name}.weight"]
    stored |= {f"{name}.{suffix}": value for suffix, value in tensors.items()}
    return inspect(write(folder, stored, llama(config)))


O_PROJ = (64, 64)
CODES = np.ones(O_PROJ, np.int8)
SCALE = np.ones(O_PROJ[0], np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "code"),
    [
        (PER_TOKEN, {"weight": CODES}, "module-incomplete"),
        (PER_TOKEN, {"weight": CODES, "weight_scale": np.ones(3, np.float32)}, "tensors-disagree"),
        (PER_TOKEN, {"weight": CODES.view(np.uint8), "weight_scale": SCALE}, "tensors-disagree"),
        (quantization(int8(), int8("per_tensor", None)), {"weight": CODES, "weight_scale": SCALE}, "scale-missing"),
        (quantization(int8(axis=1), None), {"weight": CODES, "weight_scale": SCALE}, "scheme-unknown"),
        (quantization(int8("per_group", -1), None), {"weight": CODES, "weight_scale": SCALE}, "config-missing"),
        (quantization(int8(dynamic=True), None), {"weight": CODES, "weight_scale": SCALE}, "scheme-contradiction"),
        (quantization(int8() | {"dtype": "mx6"}, None), {"weight": CODES, "weight_scale": SCALE}, "scheme-unknown"),
        (quantization(int8() | {"dtype": 5}, None), {"weight": CODES, "weight_scale": SCALE}, "config-type"),
        (quantization([int8(), int8()], None), {"weight": CODES, "weight_scale": SCALE}, "scheme-unknown"),  # type: ignore[arg-type]
        (
            PER_TOKEN | {"global_quant_config": None},
            {"weight": np.ones((64, 8), np.int32), "weight_scale": SCALE},
            "tensors-open",
        ),
        (
            PER_TOKEN,
            {"weight": CODES, "weight_scale": SCALE, "input_rotation": np.ones((64, 64), np.int8)},
            "transform-online",
        ),
    ],
)
def test_what_cant_be_run_is_refused_with_its_reason(tmp_path: Path, config: Any, tensors: Any, code: str) -> None:
    plan = plan_of(tmp_path / "made", config, **tensors)
    assert code in {error.code for error in plan.errors if error.module == "model.layers.0.self_attn.o_proj"}
    with pytest.raises(FewbitsError):
        load(tmp_path / "made")


def test_online_rotations_of_the_config_are_refused_by_name(tmp_path: Path) -> None:
    rotation = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": True, "online_r1_rotation": False}
    folder = copied("int8-per-token-head", tmp_path / "made", algo_config=[rotation])
    [error] = inspect(folder).errors
    assert error.code == "transform-online" and "r4" in error.text and "r1" not in error.text
    rotation["r4"] = False
    shutil.rmtree(folder)
    assert inspect(copied("int8-per-token-head", folder, algo_config=[rotation])).errors == []


def test_layers_go_before_types_and_these_before_the_rest(tmp_path: Path) -> None:
    """The first entry in the file's order counts; null stands for nothing."""
    wide = quantization(int8("per_tensor", None), None)["global_quant_config"]
    folder = copied(
        "int8-per-token-head",
        tmp_path / "made",
        layer_quant_config={"*.q_proj": wide, "model.layers.0.self_attn.*": None},
        layer_type_quant_config=None,
        exclude=None,
    )
    plan = inspect(folder)
    decided = {row.name.rpartition(".")[2]: row.decided_by for row in plan.rows}
    assert decided["k_proj"] == "its tensors"  # quantized, though its entry says that it isn't
    assert {one.code for one in plan.warnings} == {"unmatched-but-quantized"}
    [error] = plan.errors
    assert error.module == "model.layers.0.self_attn.q_proj" and "layer_quant_config.*.q_proj" in error.text
    assert decided["up_proj"] == "global_quant_config"


def test_a_cache_of_another_kind_stays_float(tmp_path: Path) -> None:
    name = "fp8-static-kv"
    assert str(inspect(EXPORTS / name).kv_cache) == "fp8 tensor static"
    config = json.loads((EXPORTS / name / "config.json").read_text())["quantization_config"]
    layers = config["layer_quant_config"]
    layers["*k_proj"]["output_tensors"]["dtype"] = "int8"
    plan = inspect(copied(name, tmp_path / "made", layer_quant_config=layers))
    assert plan.kv_cache is None and "kv-scheme-unsupported" in {one.code for one in plan.warnings}


@pytest.mark.parametrize("name", [name for name in DESCRIBED if name.endswith("-kv") and not name.startswith("custom")])
def test_the_cache_is_fp8_wherever_its_entries_stand(name: str) -> None:
    """In layer_quant_config, or, of projections that are excluded, in kv_cache_quant_config alone."""
    assert {layer.dtype for layer in load(EXPORTS / name).cache_layers} == {"fp8"}


def test_rows_of_a_packed_weight_are_those_of_its_scale(tmp_path: Path) -> None:
    """40 rows are 5 words, as 36 to 39 would be; no family says which, and K / g is 36."""
    spec = {"dtype": "int4", "qscheme": "per_group", "group_size": 8, "symmetric": True, "is_dynamic": False}
    tensors = {"weight": np.ones((288, 5), np.int32), "weight_scale": np.ones((36, 40), np.float32)}
    tensors["weight_zero_point"] = np.zeros((36, 5), np.int32)
    stored = {f"x.y.{suffix}": tensor for suffix, tensor in tensors.items()}
    config = {"quantization_config": quantization(spec, None)}
    [row] = inspect(write(tmp_path, stored, config)).rows
    assert row.shape == (40, 288) and row.runs


def test_scales_that_are_no_scales_are_found(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["lm_head.weight_scale"] = np.full_like(tensors["lm_head.weight_scale"], ml_dtypes.bfloat16("nan"))
        return tensors

    with pytest.raises(FewbitsError, match="lm_head.weight_scale"):
        fewbits.LLM(rewritten("int8-per-token-head", tmp_path / "made", change))


def test_a_step_3_5_in_int8_runs_as_an_implementation_of_the_tests_own() -> None:
    """Stacks [E, N, K] with scales [E, N], a shared expert excluded in part: the model that went wrong elsewhere."""
    folder = EXPORTS / "files-step-model"
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.2.moe.up_proj.weight_scale"].shape == (6, 16)
    ones = np.ones(1)
    values = {
        name: tensor.astype(float) * tensors.get(f"{name}_scale", ones).astype(float)[..., None]
        if tensor.ndim > 1
        else tensor.astype(float)
        for name, tensor in tensors.items()
    }
    ids = [3, 7, 11, 30, 5, 9, 22, 40, 1, 17, 35, 2, 8]
    expected = Step(json.loads((folder / "config.json").read_text()), values).logits(ids)
    found = fewbits.LLM(folder).logits(ids)
    # Inputs of 8 bits are what remains between them.
    assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected)


def test_zero_points_that_were_floats_run_natively_where_they_are_small(tmp_path: Path) -> None:
    """Quark writes them as int32, whatever their size; modules with one that kernels can't keep run in NumPy."""
    module = "model.layers.0.mlp.up_proj"

    def below(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        zero = tensors[f"{module}.weight_zero_point"].copy()
        zero[0, 0] = -3
        return tensors | {f"{module}.weight_zero_point": zero}

    def of(folder: Path) -> Any:
        plan = inspect(folder)
        row = next(row for row in plan.rows if row.name == module)
        assert plan.checkpoint is not None
        with plan.checkpoint.reader() as reader:
            return row, decode(plan, row, reader)[0].weight

    row, weight = of(EXPORTS / "integers-narrow")
    assert (str(row.spec), row.executed_as) == ("uint4 g16 asym × a16", "native")
    changed, other = of(rewritten("integers-narrow", tmp_path / "below", below))
    assert (str(changed.spec), changed.executed_as) == ("uint4 g16 float-zero × a16", "reference")
    before, after = weight.dequantize(), other.dequantize()
    zero, scale = weight.zero[0, 0], float(weight.scale[0, 0])
    np.testing.assert_allclose(after[0, :16] - before[0, :16], (int(zero) + 3) * scale)
    np.testing.assert_array_equal(after[1:], before[1:])


# ---- custom modes ------------------------------------------------------------------------------------------------


def test_a_custom_mode_goes_by_either_name_of_its_tensors(tmp_path: Path) -> None:
    """transformers 5.6 and later may write qscales and qqzeros; earlier ones leave unquantized weights their name."""
    quantized = set(DESCRIBED["custom-awq"]["decoded"])

    def newer(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ends = {"scales": "qscales", "qzeros": "qqzeros"}
        return {
            f"{module}.{ends.get(end, end)}": tensor
            for (module, _, end), tensor in ((name.rpartition("."), tensor) for name, tensor in tensors.items())
        }

    def older(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name if name.removesuffix(".qweight") in quantized else name.replace(".qweight", ".weight"): tensor
            for name, tensor in tensors.items()
        }

    ids = [3, 7, 11, 30, 5]
    expected = fewbits.LLM(EXPORTS / "custom-awq").logits(ids)
    for label, change in (("newer", newer), ("older", older)):
        folder = rewritten("custom-awq", tmp_path / label, change)
        plan = inspect(folder)
        assert (plan.errors, plan.warnings, plan.leftover_tensors) == ([], [], [])
        np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), expected)


def test_a_tensor_under_two_names_is_left_over(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"

    def twice(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {f"{module}.qscales": tensors[f"{module}.scales"] * 2}

    plan = inspect(rewritten("custom-awq", tmp_path / "twice", twice))
    assert plan.leftover_tensors in ([f"{module}.qscales"], [f"{module}.scales"])
    assert {one.code for one in plan.warnings} == {"tensors-unclaimed"}


@pytest.mark.parametrize("name", ["custom-awq", "custom-fp8"])
def test_a_custom_mode_is_told_by_its_export(name: str, tmp_path: Path) -> None:
    plan = inspect(copied(name, tmp_path / name, export=None))
    assert "format-unknown" in {error.code for error in plan.errors}


@pytest.mark.parametrize(
    ("name", "changes", "code"),
    [
        ("custom-awq", {"bits": 3}, "config-unsupported"),
        ("custom-awq", {"version": "gemv"}, "config-unsupported"),
        ("custom-awq", {"zero_point": None}, "config-missing"),
        ("custom-awq", {"group_size": 0}, "scheme-contradiction"),
        ("custom-awq", {"group_size": 24}, "tensors-disagree"),
        ("custom-fp8", {"activation_scheme": "sometimes"}, "config-unsupported"),
    ],
)
def test_what_a_custom_mode_cannot_mean_is_refused(
    name: str, changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    plan = inspect(copied(name, tmp_path / name, **changes))
    assert {error.code for error in plan.errors} == {code}


def test_the_cache_of_a_custom_mode_is_fp8() -> None:
    plan = inspect(EXPORTS / "custom-fp8-kv")
    assert str(plan.kv_cache) == "fp8 tensor static"
    assert plan.kv_scales == {0: ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")}
