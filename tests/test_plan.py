"""The plan: the cases that started this project, ties, unknown families, and every tensor accounted for."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import (
    BF16,
    HEAD,
    PROJECTIONS,
    Raw,
    Stored,
    block,
    dense,
    fp8,
    integers,
    llama,
    llama_tensors,
    mx,
    nvfp4,
    packed,
    write,
)

from fewbits import load_linear
from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.checkpoint.config import Config
from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import CheckpointError, FewbitsError, PlanError
from fewbits.formats import FORMATS
from fewbits.formats.compressed_tensors.layouts import LAYOUTS
from fewbits.load import decode, inspect
from fewbits.models import FAMILIES
from fewbits.plan import LoadPlan, Row, plan, require_runnable

FIXTURES = Path(__file__).parent / "fixtures"


def codes(notices: Any) -> list[str]:
    return [notice.code for notice in notices]


def row_of(planned: LoadPlan, name: str) -> Row:
    [row] = [row for row in planned.rows if row.name == name]
    return row


def accounts_for_every_tensor(planned: LoadPlan) -> None:
    """Rows and leftovers together: every tensor of the folder, each once; ties and stacks repeat their owner's."""
    assert planned.checkpoint is not None
    owners: dict[str, set[str]] = {}
    for row in planned.rows:
        assert len(row.tensors) == len(set(row.tensors))
        for name in row.tensors:
            owners.setdefault(name, set()).add(row.stored)
    assert all(len(stored) == 1 for stored in owners.values()), "two modules claim one tensor"
    left = Counter(planned.leftover_tensors)
    assert set(left.values()) <= {1} and not left.keys() & owners.keys()
    assert left.keys() | owners.keys() == planned.checkpoint.tensors.keys()


# ---- lm_head -------------------------------------------------------------------------------------------------------
# Its three cases, for every way of storing that any format has: quantized on disk runs quantized; in `ignore` or
# matched by no target it runs as stored.

_BY_LAYOUT: dict[str, list[Callable[[], Stored]]] = {
    "pack-quantized": [
        lambda: integers(*HEAD, 4, 32, True, seed=5),
        lambda: integers(*HEAD, 4, None, seed=6),
        lambda: integers(*HEAD, 3, 32, seed=7),
        lambda: integers(*HEAD, 8, tensor=True, asymmetric=True, seed=8),
    ],
    "mxfp6-pack-quantized": [lambda: mx(*HEAD, 6)],
    "fp4-pack-quantized": [lambda: nvfp4(*HEAD), lambda: mx(*HEAD, 4)],
    "naive-quantized": [
        lambda: integers(*HEAD, 8, plain=True),
        lambda: integers(*HEAD, 8, 32, True, plain=True),
        lambda: fp8(*HEAD),
        lambda: mx(*HEAD, 8),
    ],
    "dense": [lambda: dense(*HEAD, seed=9), lambda: dense(*HEAD, np.float32, seed=9)],
}
# Format → layout → heads stored so. A format added to the table needs its line here: with every layout that it
# decodes, and the part of config.json by which its producer would target or spare the head.
HEADS: dict[str, dict[str, list[Callable[[], Stored]]]] = {
    "compressed-tensors": _BY_LAYOUT,
    # Without a word from the config 16 words a row may be 64 codes of 8 bits or of 7, padded: not the last one.
    "dense": _BY_LAYOUT | {"pack-quantized": _BY_LAYOUT["pack-quantized"][:3]},
    "quark": {
        "int8": [
            lambda: as_quark(integers(*HEAD, 8, plain=True)),
            lambda: as_quark(integers(*HEAD, 8, plain=True, tensor=True)),
        ],
        "fp8_e4m3": [lambda: as_quark(fp8(*HEAD)), lambda: as_quark(mx(*HEAD, 8))],
        "fp6_e2m3": [lambda: as_quark(mx(*HEAD, 6))],
        "fp4": [lambda: as_quark(mx(*HEAD, 4)), lambda: as_quark(nvfp4(*HEAD))],
        "dense": _BY_LAYOUT["dense"],
    },
    "mxfp4": {"dense": _BY_LAYOUT["dense"]},  # only experts are ever packed
}
_LAYOUTS_OF = dict.fromkeys(("compressed-tensors", "dense"), [layout.name for layout in LAYOUTS])
_LAYOUTS_OF["mxfp4"] = ["dense"]
_LAYOUTS_OF["quark"] = list(HEADS["quark"])  # those that the tensors alone tell; tests/formats/test_quark.py has all
OTHERS = integers(8, 64, 4, 32).weights  # of the group where it is the head's neighbours that are meant


def as_quark(stored: Stored) -> Stored:
    """The same weight with Quark's names: scales are multipliers, one a row has one dimension."""
    tensors = {suffix.replace("weight_packed", "weight"): tensor for suffix, tensor in stored.tensors.items()}
    scale = tensors["weight_scale"]
    tensors["weight_scale"] = scale.reshape(-1) if scale.shape[1] == 1 else scale
    divisor = tensors.pop("weight_global_scale", None)
    if divisor is not None:
        tensors["weight_scale_2"] = (1 / divisor.astype(np.float64)).astype(np.float32).reshape(())
        values = stored.values * float(divisor[0]) * float(tensors["weight_scale_2"])
        return Stored(tensors, stored.weights, values)
    return Stored(tensors, stored.weights, stored.values)


def quark_spec(weights: dict[str, Any]) -> Any:
    """compressed-tensors' words for a weight in Quark's."""
    floats = {4: "fp4", 6: "fp6_e2m3", 8: "fp8_e4m3"}
    number = floats[weights["num_bits"]] if weights["type"] == "float" else f"int{weights['num_bits']}"
    strategy = weights["strategy"]
    spec = {"dtype": number, "qscheme": "per_group" if "group" in strategy else f"per_{strategy}", "is_dynamic": False}
    spec["group_size"] = weights.get("group_size")
    if weights.get("scale_dtype") == "torch.uint8":
        spec["scale_format"] = "e8m0"
    second = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "is_scale_quant": True}
    return [spec, second] if strategy == "tensor_group" else spec


def quantization(format_name: str, case: str, stored: Stored) -> dict[str, Any] | None:
    if format_name == "dense":
        return None  # nothing in the config speaks of any module
    if format_name == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"] if case == "ignored" else []}
    if format_name == "quark":
        name = {"targeted": "lm_head", "ignored": "*head", "unmatched": "*q_proj"}[case]
        exclude = ["lm_head"] if case == "ignored" else []
        scheme = {"weight": quark_spec(stored.weights or OTHERS)}
        return {"quant_method": "quark", "layer_quant_config": {name: scheme}, "exclude": exclude}
    weights = stored.weights or OTHERS
    if case == "targeted":
        return block(weights, ["lm_head"])
    return block(weights, ["re:.*head"], ignore=["lm_head"]) if case == "ignored" else block(weights, ["re:.*q_proj"])


def head_cases() -> list[Any]:
    cases = []
    for row in FORMATS:
        for layout in _LAYOUTS_OF.get(row.name, ["?"]):
            builders = HEADS.get(row.name, {}).get(layout, [None])
            for number, builder in enumerate(builders):
                for case in ("targeted", "ignored", "unmatched"):
                    name = f"{row.name}-{layout}-{number}-{case}"
                    cases.append(pytest.param(row.name, layout, builder, case, id=name))
    return cases


@pytest.mark.parametrize(("format_name", "layout", "builder", "case"), head_cases())
def test_the_head_runs_as_it_is_stored(tmp_path, format_name, layout, builder, case):
    assert builder is not None, f"{format_name} × {layout} has no head in HEADS: say how its producer stores one"
    stored = builder()
    config = llama(quantization(format_name, case, stored))
    folder = write(tmp_path, llama_tensors(lm_head=stored), config)
    planned = inspect(folder)
    row = row_of(planned, "lm_head")
    assert planned.errors == [] and planned.leftover_tensors == []
    assert row.kind == "head" and row.executed_as in ("native", "reference")
    assert row.resolved.layout == layout and row.tensors == tuple(
        f"lm_head.{suffix}" for suffix in row.resolved.claimed
    )
    assert row.spec.weight.quantized == (layout != "dense") and row.spec.act is None

    # The plan says what it did against the config's word, naming the module.
    expected = {
        ("targeted", True): None,
        ("ignored", True): "ignored-but-quantized",
        ("unmatched", True): "unmatched-but-quantized",
        ("targeted", False): "targeted-but-dense",
        ("ignored", False): None,
        ("unmatched", False): None,
    }[case, layout != "dense"]
    if format_name == "dense":
        expected = "unmatched-but-quantized" if layout != "dense" else None
    if format_name == "mxfp4":
        expected = None  # its config only says what not to quantize
    about_head = [warning.code for warning in planned.warnings if warning.module == "lm_head"]
    assert about_head == ([expected] if expected else [])

    # Codes of bfloat16 precision times inputs of the same: only the order of float32 sums is free.
    x = np.random.default_rng(1).integers(-64, 65, (3, HEAD[1])).astype(np.float32) / 32
    y = load_linear(folder, "lm_head", allow_reference=True)(x)
    exact = x.astype(np.float64) @ stored.values.T
    bound = np.abs(x) @ np.abs(stored.values).T
    assert y.shape == exact.shape and y.dtype == np.float32
    assert (np.abs(y - exact) <= 1e-5 * bound + 1e-9).all()
    assert np.abs(exact).max() > 0.1


def test_an_ignored_head_keeps_the_activations_of_its_group(tmp_path):
    """Packed though ignored: the spec of the group that would match without the entry, whole."""
    stored = integers(*HEAD, 8, plain=True)
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    config = block(stored.weights, inputs=inputs, ignore=["lm_head"])
    folder = write(tmp_path, llama_tensors(lm_head=stored), llama(config))
    assert str(row_of(inspect(folder), "lm_head").spec) == "int8 channel × int8 token dynamic"


def test_an_ignored_head_that_its_group_doesnt_fit_is_weight_only(tmp_path):
    stored = integers(*HEAD, 4, 32)
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    config = block({"num_bits": 8, "strategy": "channel"}, inputs=inputs, ignore=["re:.*lm_head"])
    planned = inspect(write(tmp_path, llama_tensors(lm_head=stored), llama(config)))
    row = row_of(planned, "lm_head")
    assert (str(row.spec), row.decided_by) == ("int4 g32 × a16", "its tensors")
    assert "ignored-but-quantized" in codes(planned.warnings)


def test_an_ignored_head_of_a_broken_group_runs_as_its_tensors_say(tmp_path):
    stored = integers(*HEAD, 4, 32)
    config = block({"num_bits": 4, "type": "nf"}, ignore=["lm_head"])
    planned = inspect(write(tmp_path, llama_tensors(lm_head=stored), llama(config)))
    assert str(row_of(planned, "lm_head").spec) == "int4 g32 × a16"


@pytest.mark.parametrize(
    ("name", "head", "warns"),
    [
        ("tiny-w4a16-asym-g16-head", "uint4 g16 asym × a16", []),
        ("tiny-w8a8-dynamic-head", "int8 channel × int8 token dynamic", []),
        ("head-packed-though-ignored", "uint4 g16 asym × a16", ["ignored-but-quantized"]),
        ("head-packed-no-target", "uint4 g16 asym × a16", ["unmatched-but-quantized"]),
        ("tiny-w4a16-sym-g16", "bfloat16", []),
        ("head-dense-no-target", "bfloat16", []),
        ("head-dense-though-targeted", "bfloat16", ["targeted-but-dense"]),
    ],
)
def test_heads_of_the_real_tool(name, head, warns):
    planned = inspect(FIXTURES / name)
    row = row_of(planned, "lm_head")
    assert str(row.spec) == head and row.executed_as in ("native", "reference")
    assert codes(planned.warnings) == warns and planned.errors == []


# ---- asymmetric W4A16 ----------------------------------------------------------------------------------------------

ASYMMETRIC = [
    "w4a16-asym-g32-head-f32",
    "w4a16-asym-channel-head",
    "w4a16-asym-g16-padded-head",
    "w4a16-asym-g128-head",
    "tiny-w4a16-asym-g16-head",
    "tiny-w4a16-asym-channel-head",
    "old-unpacked-zero-points",
    "old-unpacked-zero-points-channel",
]


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_weights_multiply_as_the_owner_decodes_them(name):
    """Zero points packed along N or not, groups or channels; heights that end inside a word."""
    folder = FIXTURES / name
    expected = open_fixture_weights(folder)
    planned = inspect(folder)
    rows = [row for row in planned.rows if row.spec.weight.zero_point == "integer" and row.name in expected]
    assert rows
    random = np.random.default_rng(2)
    for row in rows[-2:]:
        assert row.spec.act is None and row.executed_as == "native"
        values = expected[row.name].astype(np.float64)
        x = random.integers(-64, 65, (2, row.shape[1])).astype(np.float32) / 32
        y = load_linear(folder, row.name)(x)
        # The owner rounds each product to the dtype of its scale; nothing else may differ.
        epsilon = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 1e-5}[expected[row.name].dtype.name]
        assert (np.abs(y - x @ values.T) <= epsilon * (np.abs(x) @ np.abs(values).T)).all(), row.name


def open_fixture_weights(folder: Path) -> dict[str, np.ndarray]:
    from fewbits.checkpoint.files import TensorReader, read_header

    path = folder / "expected.safetensors"
    tensors, _ = read_header(path, 0)
    with TensorReader([path], tensors) as reader:
        return {name.removesuffix(".weight"): reader.read(name) for name in tensors if name.endswith(".weight")}


# ---- config and tensors that disagree ------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def disagreeing(folder: Path, stored: Stored, changes: dict[str, Any] | None = None, **config: Any) -> LoadPlan:
    planned = inspect(write(folder, llama_tensors(q_proj=stored) | (changes or {}), llama(**config)))
    accounts_for_every_tensor(planned)
    return planned


@pytest.mark.parametrize(
    ("edited", "says"),
    [
        ({"group_size": 16}, "weight_packed is 8 words wide, 32 columns of 4 bits take 4"),
        ({"num_bits": 8}, "weight_packed is 8 words wide, 64 columns of 8 bits take 16"),
        (
            {"strategy": "channel", "group_size": None},
            "weight_scale has shape [64, 2], int4 channel of [64, 64] needs [64, 1]",
        ),
        ({"type": "float"}, "holds integers, not fp4"),
    ],
)
def test_an_edited_group(tmp_path, edited, says):
    stored = integers(64, 64, 4, 32)
    planned = disagreeing(tmp_path, stored, quantization_config=block(stored.weights | edited, ["re:.*q_proj"]))
    [error] = planned.errors
    assert (error.code, error.module) == ("tensors-disagree", Q) and says in error.text
    row = row_of(planned, Q)
    assert row.executed_as == "refused" and row.reason == error.text
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path, Q, allow_reference=True)
    assert (caught.value.code, caught.value.module) == ("tensors-disagree", Q)
    with pytest.raises(PlanError) as caught:
        require_runnable(planned, True)
    assert caught.value.code == "tensors-disagree"


def test_several_faults_are_named_together(tmp_path):
    stored = integers(64, 64, 4, 32)
    changes = {"model.norm.weight": np.ones(63, BF16), "lm_head.bias": np.ones(40, np.int32)}
    planned = disagreeing(
        tmp_path, stored, changes, quantization_config=block(stored.weights | {"num_bits": 8}, ["re:.*q_proj"])
    )
    assert sorted(codes(planned.errors)) == ["shape-mismatch", "tensors-disagree", "tensors-disagree"]
    with pytest.raises(PlanError) as caught:
        require_runnable(planned, True)
    assert len([line for line in caught.value.details if line.startswith("also: ")]) == 2


def test_a_stored_shape_that_the_config_doesnt_make(tmp_path):
    stored = integers(64, 64, 4, 32)
    planned = disagreeing(
        tmp_path, stored, quantization_config=block(stored.weights, ["re:.*q_proj"]), intermediate_size=97
    )
    assert codes(planned.errors) == ["shape-mismatch"] * 2  # gate and up as one, down
    assert "(and 1 more modules)" in planned.errors[0].text
    assert "[97, 64]" in planned.errors[0].text and "[96, 64]" in planned.errors[0].text
    refused = {row.name.rpartition(".")[2] for row in planned.rows if row.executed_as == "refused"}
    assert refused == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path, "model.layers.0.mlp.gate_proj")
    assert caught.value.code == "shape-mismatch"


@pytest.mark.parametrize("missing", [Q, "model.norm", "model.embed_tokens", "model.layers.0.input_layernorm"])
def test_a_missing_module(tmp_path, missing):
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != f"{missing}.weight"}
    planned = inspect(write(tmp_path, tensors, llama()))
    assert [(error.code, error.module) for error in planned.errors] == [("module-missing", missing)]
    with pytest.raises(PlanError):
        require_runnable(planned, True)


def test_extra_tensors(tmp_path):
    """What the family has no place for isn't run; what has no module is left over."""
    extra = dense(8, 8).under("mtp.layers.0.mlp.gate_proj") | integers(8, 32, 4, 16).under("vision_tower.q_proj")
    extra |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "step": np.ones(1)}
    quantized = block(integers(8, 32, 4, 16).weights, ["re:vision.*"])
    planned = inspect(write(tmp_path, llama_tensors() | extra, llama(quantized)))
    accounts_for_every_tensor(planned)
    for name in ("mtp.layers.0.mlp.gate_proj", "vision_tower.q_proj"):
        row = row_of(planned, name)
        assert row.executed_as == "not_run" and row.reason == "not part of the llama decoder"
    assert str(row_of(planned, "vision_tower.q_proj").spec) == "int4 g16 × a16"
    assert planned.leftover_tensors == ["model.layers.0.self_attn.rotary_emb.inv_freq", "step"]
    assert codes(planned.warnings) == ["tensors-unclaimed"] and planned.errors == []


def test_a_fault_outside_of_the_model_is_a_warning(tmp_path):
    broken = integers(8, 32, 4, 16).under("mtp.q_proj")
    del broken["mtp.q_proj.weight_scale"]
    planned = inspect(write(tmp_path, llama_tensors() | broken, llama(block(None))))
    accounts_for_every_tensor(planned)
    assert planned.errors == [] and codes(planned.warnings) == ["module-incomplete"]
    assert row_of(planned, "mtp.q_proj").executed_as == "not_run"
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path, "mtp.q_proj", allow_reference=True)
    assert caught.value.code == "module-incomplete"


def test_a_module_of_the_model_after_one_like_it_that_is_no_part_of_it(tmp_path):
    strangers = {"mtp.norm.weight": np.ones(64, BF16), "mtp.up_proj.weight": np.ones((96, 64), BF16)}
    planned = inspect(write(tmp_path, strangers | llama_tensors(), llama()))
    assert planned.errors == []
    assert {row.name for row in planned.rows if not row.runs} == {"mtp.norm", "mtp.up_proj"}


def test_a_warning_about_many_modules_is_one(tmp_path):
    planned = inspect(write(tmp_path, llama_tensors(), llama(block(OTHERS))))
    [warning] = planned.warnings
    assert warning.code == "targeted-but-dense" and warning.text.endswith("(and 7 more modules)")


# ---- biases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "code"),
    [
        (np.ones(63, BF16), "shape-mismatch"),
        (np.ones((64, 1), BF16), "shape-mismatch"),
        (np.ones(64, np.int8), "tensors-disagree"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_bias_that_doesnt_fit(tmp_path, bias, code, known):
    config = llama() if known else {}
    planned = inspect(write(tmp_path, llama_tensors() | {f"{Q}.bias": bias}, config))
    accounts_for_every_tensor(planned)
    assert [(error.code, error.module) for error in planned.errors] == [(code, Q)]
    with pytest.raises(PlanError):
        load_linear(tmp_path, Q, allow_reference=True)


def test_an_unexpected_bias_is_added(tmp_path):
    bias = np.arange(64).astype(BF16)
    folder = write(tmp_path, llama_tensors() | {f"{Q}.bias": bias}, llama())
    planned = inspect(folder)
    assert codes(planned.warnings) == ["bias-unexpected"] and planned.errors == []
    assert row_of(planned, Q).tensors == (f"{Q}.weight", f"{Q}.bias")
    y = load_linear(folder, Q)(np.zeros((1, 64), np.float32))
    np.testing.assert_array_equal(y[0], bias.astype(np.float32))


def test_a_bias_that_the_family_always_has(tmp_path):
    config = llama(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    planned = inspect(write(tmp_path, llama_tensors(), config))
    assert codes(planned.errors) == ["bias-missing"] * len(planned.errors) and planned.errors


# ---- ties ----------------------------------------------------------------------------------------------------------

EMBEDDING = integers(*HEAD, 4, 32, True, seed=20)


def tie_plan(folder: Path, tied: bool | None, embedding: Stored, head: Stored | None, **quantized: Any) -> LoadPlan:
    tensors = {name: tensor for name, tensor in llama_tensors(lm_head=head).items() if "embed_tokens" not in name}
    tensors |= embedding.under("model.embed_tokens")
    config = llama(**quantized)
    config.pop("tie_word_embeddings")
    if tied is not None:
        config["tie_word_embeddings"] = tied
    planned = inspect(write(folder, tensors, config))
    accounts_for_every_tensor(planned)
    assert planned.errors == []
    return planned


def head_values(planned: LoadPlan) -> np.ndarray:
    with planned.checkpoint.reader() as reader:
        linear, _ = decode(planned, row_of(planned, "lm_head"), reader)
    return linear.weight.dequantize()


def test_a_tied_dense_embedding_is_the_head(tmp_path):
    table = dense(*HEAD, seed=21)
    planned = tie_plan(tmp_path, True, table, None)
    row = row_of(planned, "lm_head")
    assert row.tied and row.kind == "head" and row.decided_by == "tied to model.embed_tokens"
    assert row.tensors == ("model.embed_tokens.weight",) and planned.warnings == []
    np.testing.assert_array_equal(head_values(planned), table.values)


def test_a_tied_packed_embedding_is_the_head(tmp_path):
    quantized = block(EMBEDDING.weights, ["Embedding"])
    planned = tie_plan(tmp_path, True, EMBEDDING, None, quantization_config=quantized)
    row, owner = row_of(planned, "lm_head"), row_of(planned, "model.embed_tokens")
    assert row.spec == owner.spec and str(row.spec) == "uint4 g32 asym × a16" and row.tensors == owner.tensors
    assert (row.kernel.op, owner.kernel.op) == ("linear", "embedding")
    np.testing.assert_array_equal(head_values(planned), EMBEDDING.values)


def test_a_stored_head_wins_over_the_flag(tmp_path):
    head = integers(*HEAD, 8, seed=22)
    quantized = block(head.weights, ["lm_head"])
    planned = tie_plan(tmp_path, True, dense(*HEAD, seed=21), head, quantization_config=quantized)
    row = row_of(planned, "lm_head")
    assert not row.tied and str(row.spec) == "int8 channel × a16"
    assert str(row_of(planned, "model.embed_tokens").spec) == "bfloat16"
    np.testing.assert_array_equal(head_values(planned), head.values)


@pytest.mark.parametrize("flag", [False, None])
def test_no_head_at_all_though_not_tied(tmp_path, flag):
    table = dense(*HEAD, seed=21)
    planned = tie_plan(tmp_path, flag, table, None)
    assert codes(planned.warnings) == ["head-missing"]
    np.testing.assert_array_equal(head_values(planned), table.values)


def test_parameters_and_memory_of_a_tie(tmp_path):
    """Stored once, packed twice: once to gather rows of, once to multiply with."""
    tied = tie_plan(tmp_path / "tied", True, dense(*HEAD), None)
    untied = tie_plan(tmp_path / "untied", False, dense(*HEAD), dense(*HEAD))
    assert untied.parameters - tied.parameters == HEAD[0] * HEAD[1]
    assert untied.weight_bytes() == tied.weight_bytes()
    assert untied.nbytes - tied.nbytes == 2 * HEAD[0] * HEAD[1]


# ---- families that nobody knows ------------------------------------------------------------------------------------

MIXTURE = {
    "model.embed_tokens.weight": ("BF16", (32, 16)),
    "model.layers.0.mlp.gate.weight": ("BF16", (4, 16)),
    "model.layers.0.mlp.gate.bias": ("BF16", (4,)),
    "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (4,)),
    "model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", (8, 16)),
    "model.layers.0.mlp.experts.3.w2.weight": ("BF16", (16, 8)),
    "model.layers.0.mlp.shared_expert.up_proj.weight": ("BF16", (8, 16)),
    "model.layers.0.mlp.shared_expert_gate.weight": ("BF16", (1, 16)),
    "model.layers.1.mlp.experts.gate_up_proj": ("BF16", (2, 16, 16)),
    "model.layers.1.mlp.experts.down_proj.weight": ("BF16", (2, 16, 8)),
    "model.layers.1.mlp.router.weight": ("BF16", (2, 16)),
    "model.layers.2.mlp.gate.weight": ("BF16", (8, 16)),
    "model.layers.2.mamba.A_log": ("F32", (4, 2)),
    "model.layers.2.mamba.conv1d.weight": ("BF16", (16, 1, 4)),
    "model.layers.2.mamba.conv1d.bias": ("BF16", (16,)),
    "model.layers.2.self_attn.sinks": ("BF16", (4,)),
    "model.layers.2.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
    "model.layers.2.lone.bias": ("BF16", (16,)),
    "model.norm.weight": ("BF16", (16,)),
    "output.weight": ("BF16", (32, 16)),
}
KINDS = {
    "model.embed_tokens": ("embedding", (32, 16)),
    "model.layers.0.mlp.gate": ("router", (4, 16)),
    "model.layers.0.mlp.gate.e_score_correction_bias": ("other", (4,)),
    "model.layers.0.mlp.experts.0.up_proj": ("expert", (8, 16)),
    "model.layers.0.mlp.experts.3.w2": ("expert", (16, 8)),
    "model.layers.0.mlp.shared_expert.up_proj": ("linear", (8, 16)),
    "model.layers.0.mlp.shared_expert_gate": ("linear", (1, 16)),
    "model.layers.1.mlp.experts[0].gate_up_proj": ("expert", (16, 16)),
    "model.layers.1.mlp.experts[1].gate_up_proj": ("expert", (16, 16)),
    "model.layers.1.mlp.experts[0].down_proj": ("expert", (16, 8)),
    "model.layers.1.mlp.experts[1].down_proj": ("expert", (16, 8)),
    "model.layers.1.mlp.router": ("router", (2, 16)),
    "model.layers.2.mlp.gate": ("linear", (8, 16)),
    "model.layers.2.mamba.A_log": ("other", (4, 2)),
    "model.layers.2.mamba.conv1d": ("conv", (16, 1, 4)),
    "model.layers.2.self_attn.sinks": ("other", (4,)),
    "model.layers.2.lone.bias": ("other", (16,)),
    "model.norm": ("norm", (16,)),
    "output": ("head", (32, 16)),
}


@pytest.mark.parametrize("header_only", [True, False])
def test_kinds_in_an_unknown_family(tmp_path, header_only):
    tensors = {}
    for name, (dtype, shape) in MIXTURE.items():
        size = int(np.prod(shape)) * (DTYPES[dtype][0] // 8)
        tensors[name] = Raw(dtype, shape, bytes(size))
    config = {"architectures": ["NobodyKnowsForCausalLM"], "torch_dtype": "bfloat16"}
    planned = inspect(write(tmp_path, tensors, config, header_only=header_only))
    accounts_for_every_tensor(planned)
    assert planned.family is None and planned.errors == []
    assert {row.name: (row.kind, tuple(row.shape)) for row in planned.rows} == KINDS
    assert planned.leftover_tensors == ["model.layers.2.self_attn.rotary_emb.inv_freq"]
    assert row_of(planned, "model.layers.0.mlp.gate").tensors[-1].endswith("gate.bias")
    [unknown] = [warning for warning in planned.warnings if warning.code == "family-unknown"]
    assert "NobodyKnowsForCausalLM" in unknown.text
    with pytest.raises(PlanError) as caught:
        require_runnable(planned, True)
    assert caught.value.code == "family-unknown"


def test_headers_alone_make_the_same_plan(tmp_path):
    stored = {"q_proj": integers(64, 64, 4, 32), "lm_head": EMBEDDING}
    config = llama(
        block(None)
        | {
            "config_groups": {
                "a": {"targets": ["re:.*q_proj"], "weights": stored["q_proj"].weights},
                "b": {"targets": ["lm_head"], "weights": EMBEDDING.weights},
            }
        }
    )
    whole = inspect(write(tmp_path / "whole", llama_tensors(**stored), config))
    headers = inspect(write(tmp_path / "headers", llama_tensors(**stored), config, header_only=True))
    assert headers.rows == whole.rows and headers.errors == [] and headers.warnings == whole.warnings
    assert (headers.parameters, headers.nbytes) == (whole.parameters, whole.nbytes)
    require_runnable(whole, False)
    with pytest.raises(PlanError) as caught:
        require_runnable(headers, True)
    assert caught.value.code == "header-only"
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path / "headers", Q)
    assert caught.value.code == "header-only"


def test_experts_each_with_their_own_spec(tmp_path):
    tensors, groups = {}, {}
    for number, bits in enumerate((2, 4, 8)):
        stored = integers(16, 32, bits, 16, seed=number)
        tensors |= stored.under(f"model.layers.0.mlp.experts.{number}.up_proj")
        groups[f"g{number}"] = {"targets": [f"re:.*experts.{number}.*"], "weights": stored.weights}
    planned = inspect(write(tmp_path, tensors, {"quantization_config": block(None) | {"config_groups": groups}}))
    assert [str(row.spec) for row in planned.rows] == ["int2 g16 × a16", "int4 g16 × a16", "int8 g16 × a16"]
    assert {row.kind for row in planned.rows} == {"expert"} and planned.errors == []


@pytest.mark.parametrize(
    "stored",
    [
        integers(16, 64, 4, 32),
        integers(16, 64, 4, 32, asymmetric=True),
        integers(16, 64, 3, None),
        fp8(16, 64),
        nvfp4(16, 64),
        mx(16, 64, 4),
    ],
    ids=["int4", "uint4", "int3 channel", "fp8", "nvfp4", "mxfp4"],
)
def test_stacked_experts_are_rows_of_what_one_expert_is(tmp_path, stored):
    """weight_packed [E, N, …] with scales [E, N, …] says of each expert what an unstacked one's tensors would."""
    name = "model.layers.0.mlp.experts.up_proj"
    stack = {
        suffix: array if suffix == "weight_shape" else np.stack([array] * 3) for suffix, array in stored.tensors.items()
    }
    config = {"quantization_config": block(stored.weights)}
    planned = inspect(write(tmp_path / "stack", {f"{name}.{suffix}": array for suffix, array in stack.items()}, config))
    single = inspect(write(tmp_path / "one", stored.under("model.layers.0.mlp.experts.0.up_proj"), config))
    assert planned.errors == [] and single.errors == []
    assert [row.name for row in planned.rows] == [f"model.layers.0.mlp.experts[{e}].up_proj" for e in range(3)]
    for row in planned.rows:
        assert (row.kind, row.shape, row.spec) == ("expert", (16, 64), single.rows[0].spec)
        assert row.executed_as == single.rows[0].executed_as
        assert sorted(row.tensors) == sorted(f"{name}.{suffix}" for suffix in stack)
    accounts_for_every_tensor(planned)


def test_a_stack_beside_a_tensor_of_its_name(tmp_path):
    tensors = {name: Raw("BF16", (2, 8, 8), bytes(256)) for name in ("a.experts.up_proj", "a.experts.up_proj.weight")}
    planned = inspect(write(tmp_path, tensors, {}))
    assert sorted(tensor for row in planned.rows for tensor in row.tensors) == sorted(2 * [*tensors])
    accounts_for_every_tensor(planned)


def test_a_stack_without_its_scales_is_refused(tmp_path):
    tensors = {"a.experts.up_proj.weight_packed": Raw("I32", (3, 16, 8), bytes(3 * 16 * 8 * 4))}
    planned = inspect(write(tmp_path, tensors, {"quantization_config": block(integers(16, 64, 4, 32).weights)}))
    assert codes(planned.errors) == ["module-incomplete"]
    assert {row.executed_as for row in planned.rows} == {"refused"} and len(planned.rows) == 3


def test_a_stack_of_endless_experts(tmp_path):
    """A hundred bytes of header may claim any number of them."""
    tensors = {"a.experts.up": Raw("U8", (1 << 40, 0, 0)), "a.experts.down.weight": Raw("BF16", (1 << 30, 1, 0))}
    began = time.thread_time()
    planned = inspect(write(tmp_path, tensors, {}))
    assert time.thread_time() - began < 2 and len(planned.rows) == 2
    accounts_for_every_tensor(planned)
    assert codes(planned.errors) == ["tensors-disagree"] * 2


def test_an_unknown_method_is_planned_and_refused(tmp_path):
    config = llama({"quant_method": "brand-new", "bits": 4})
    planned = inspect(write(tmp_path, llama_tensors(), config))
    assert codes(planned.errors) == ["format-unknown"] and planned.format.name == "brand-new"
    assert len(planned.rows) > 10
    accounts_for_every_tensor(planned)
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path, Q)
    assert caught.value.code == "format-unknown"


@pytest.mark.parametrize(("location", "refused"), [("input", True), ("weight_input", False)])
def test_transforms(tmp_path, location, refused):
    stored = integers(64, 64, 4, 32)
    groups = {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}}
    config = block(stored.weights, ["re:.*q_proj"], transform_config={"config_groups": groups})
    folder = write(tmp_path, llama_tensors(q_proj=stored), llama(config))
    planned = inspect(folder)
    assert codes(planned.errors) == (["transform-online"] if refused else [])
    if refused:
        with pytest.raises(PlanError) as caught:
            load_linear(folder, Q, allow_reference=True)
        assert caught.value.code == "transform-online" and "v at input" in caught.value.what
    else:
        assert planned.warnings == []
        load_linear(folder, Q)


# ---- load_linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "nothing", "", "lm_head.weight"])
def test_what_is_no_linear_module(tmp_path, name):
    write(tmp_path, llama_tensors(), llama())
    with pytest.raises(PlanError) as caught:
        load_linear(tmp_path, name)
    assert (caught.value.code, caught.value.module) == ("module-missing", name)


def test_a_slow_path_only_when_asked_for(tmp_path):
    stored = dense(64, 64, np.float64)
    write(tmp_path, llama_tensors(q_proj=stored), llama())
    planned = inspect(tmp_path)
    row = row_of(planned, Q)
    assert row.executed_as == "reference" and row.kernel.name == "reference.linear" and "cpu.dot_bf16" in row.reason
    for refuse in (lambda: load_linear(tmp_path, Q), lambda: require_runnable(planned, False)):
        with pytest.raises(PlanError, match="float64 has no native kernel") as caught:
            refuse()
        assert caught.value.code == "kernel-none" and "--allow-reference" in caught.value.hint
        assert "cpu.dot_bf16" in caught.value.details[0] and caught.value.module == Q
    x = np.eye(64, dtype=np.float32)
    np.testing.assert_allclose(load_linear(tmp_path, Q, allow_reference=True)(x), stored.values.T, rtol=1e-6)


def test_a_zero_point_that_only_the_data_shows(tmp_path):
    """The headers say symmetric; the numbers are those of the zero points all the same."""
    stored = integers(64, 64, 4, 32, True, plain=False)
    weights = stored.weights | {"symmetric": True}
    folder = write(tmp_path, llama_tensors(q_proj=stored), llama(block(weights, ["re:.*q_proj"])))
    y = load_linear(folder, Q)(np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(y, stored.values.T, rtol=1e-5, atol=1e-7)


# ---- every tensor, whatever it is ----------------------------------------------------------------------------------

_PARTS = st.sampled_from(
    """model layers 0 1 self_attn q_proj k_proj qkv_proj mlp experts experts.0 gate router down_proj lm_head output
    embed_tokens norm attn mixer k_cache q weight mtp x""".split()
)
_LAST = st.sampled_from(
    """weight bias weight_packed weight_scale weight_zero_point weight_shape weight_g_idx weight_global_scale
    input_scale input_zero_point input_global_scale output_scale output_zero_point bitmask compressed row_offsets
    shape meta scale_packed k_scale v_scale q_scale kv_scale k_zero_point scale A_log gate_up_proj weight.bitmask
    weight.compressed weight.shape inv_freq""".split()
)
_TENSOR_NAMES = st.one_of(
    st.lists(_PARTS, max_size=4).flatmap(lambda parts: _LAST.map(lambda last: ".".join([*parts, last]))),
    st.sampled_from([f"{name}.weight" for name in PROJECTIONS] + ["lm_head.weight", "model.embed_tokens.weight"]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=6),
    st.sampled_from([".", "..", ".weight", "weight", "a..weight", "experts.", ".experts.", "a.experts..weight"]),
)
_SHAPES = st.one_of(
    st.sampled_from(
        [(), (1,), (64,), (64, 64), (32, 64), (40, 64), (64, 8), (64, 2), (64, 1), (2,), (8, 2), (2, 64, 64)]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 64]), max_size=4).map(tuple),
)
_STORED = st.dictionaries(_TENSOR_NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), _SHAPES), max_size=12)
_ARGS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([1, 3, 4, 6, 8, 16, None]),
        "type": st.sampled_from(["int", "float", "x"]),
        "strategy": st.sampled_from(["tensor", "channel", "group", "block", "token", "tensor_group", None]),
        "group_size": st.sampled_from([None, -1, 16, 32, 0]),
        "block_structure": st.sampled_from([None, [8, 8], "16x16", [0]]),
        "dynamic": st.sampled_from([False, True, "local"]),
        "symmetric": st.booleans(),
        "actorder": st.sampled_from([None, "group", "weight"]),
        "scale_dtype": st.sampled_from([None, "torch.uint8"]),
    },
)
_GROUP = st.fixed_dictionaries(
    {
        "targets": st.lists(
            st.sampled_from(["Linear", "Embedding", "re:.*", "re:.*q_proj", "lm_head", "x"]), max_size=2
        ),
        "weights": _ARGS | st.none(),
    },
    optional={"input_activations": _ARGS | st.none(), "format": st.sampled_from(["pack-quantized", "odd"])},
)
_BLOCK = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["compressed-tensors", "other"])},
    optional={
        "config_groups": st.dictionaries(st.sampled_from(["a", "W4A16"]), _GROUP | st.just(["Linear"]), max_size=2),
        "ignore": st.lists(st.sampled_from(["lm_head", "re:.*k_proj", "Linear", "y"]), max_size=2),
        "kv_cache_scheme": st.none() | _ARGS,
        "version": st.sampled_from(["0.10.0", "0.19.0"]),
    },
)


def checkpoint_of(folder: Path, stored: dict[str, Any], config: dict[str, Any], header_only: bool) -> Checkpoint:
    infos = {}
    data = folder / "data"
    for name, (dtype, shape) in stored.items():
        bits = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype][0]
        infos[name] = TensorInfo(dtype, shape, 0, 0, -(-bits // 8))
    if not data.exists():
        data.write_bytes(np.random.default_rng(0).bytes(1 << 22))
    return Checkpoint(folder, Config(config, "config.json"), infos, [data], header_only)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(stored=_STORED, quantized=st.none() | _BLOCK, known=st.booleans(), header_only=st.booleans())
def test_any_tensors_make_a_plan(tmp_path_factory, stored, quantized, known, header_only):
    """Whatever names, dtypes and shapes: a plan that accounts for each tensor, or an explanation; and no row that
    claims to run decodes into anything but a weight or an explanation."""
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    checkpoint = checkpoint_of(folder, stored, llama(quantized), header_only)
    try:
        planned = plan(checkpoint, FAMILIES[0] if known else None)
    except FewbitsError:
        return
    accounts_for_every_tensor(planned)
    for row in planned.rows:
        assert all(size >= 0 for size in row.shape)
        assert (row.kernel is not None) == (row.executed_as in ("native", "reference") and row.kind != "norm")
        if row.executed_as == "refused":
            assert row.reason and planned.errors
    assert planned.weight_bytes() >= 0 and planned.parameters >= 0
    to_json_is_json(planned)
    if header_only:
        return
    with checkpoint.reader() as reader:
        for row in planned.rows:
            if row.kernel is None:
                continue
            with np.errstate(all="ignore"):  # the data are random bytes
                try:
                    linear, _ = decode(planned, row, reader)
                except CheckpointError:
                    continue
                assert linear.weight.dequantize().shape == tuple(row.shape)


_WHOLE: dict[str, tuple[Stored, Any]] = {
    "int4 g16": (integers(8, 32, 4, 16, True), None),
    "int3": (integers(8, 32, 3), None),
    "int4 tensor": (integers(8, 32, 4, tensor=True, asymmetric=True), None),
    "plain int4": (integers(8, 32, 4, 16, True, plain=True), None),
    "int8 static": (integers(8, 32, 8, plain=True), {"num_bits": 8, "symmetric": False}),
    "fp8": (fp8(8, 32), None),
    "fp8 blocks": (fp8(8, 32, (3, 16)), None),
    "nvfp4": (nvfp4(8, 32), "local"),
    "mxfp4": (mx(8, 32, 4), None),
    "mxfp6": (mx(8, 32, 6), None),
    "dense": (dense(8, 32), None),
}
_EXTRA = {
    "input_scale": np.ones(1, np.float32),
    "input_zero_point": np.zeros(1, np.int8),
    "input_global_scale": np.ones(1, np.float32),
    "bias": np.ones(8, BF16),
    "weight_g_idx": np.repeat(np.arange(2, dtype=np.int32), 16),
}
_DAMAGES: dict[str, Callable[[Any], Any]] = {
    "missing": lambda array: None,
    "flat": lambda array: array.reshape(-1),
    "transposed": lambda array: array.T.copy(),
    "an axis more": lambda array: array[None],
    "empty": lambda array: array[:0],
    "one row": lambda array: array[:1],
    "one column": lambda array: array[..., :1].copy(),
    "twice as high": lambda array: np.repeat(array, 2, axis=0) if array.ndim else array,
    "zeros": lambda array: np.zeros_like(array),
    "ones as bytes": lambda array: np.full(array.shape, 0xFF, np.uint8),
    "minus one": lambda array: np.full(array.shape, -1, np.int64),
    "not a number": lambda array: np.full(array.shape, np.nan, np.float32),
    "float64": lambda array: array.astype(np.float64),
    "booleans": lambda array: np.ones(array.shape, bool),
    "bytes": lambda array: np.frombuffer(array.tobytes(), np.uint8),
}


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(_WHOLE)),
    st.lists(st.sampled_from(sorted(_EXTRA)), unique=True),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(list(_DAMAGES))), min_size=1, max_size=2),
    st.booleans(),
)
def test_a_damaged_module_is_explained_or_runs(tmp_path_factory, whole, extra, damages, covered):
    """One or two tensors changed, dropped or bent: an explanation or finite numbers, nothing else."""
    stored, inputs = _WHOLE[whole]
    tensors: dict[str, Any] = stored.tensors | {suffix: _EXTRA[suffix] for suffix in extra}
    for place, damage in damages:
        suffix = sorted(tensors)[place % len(tensors)]
        with np.errstate(all="ignore"):
            changed = _DAMAGES[damage](tensors[suffix])
        tensors = {name: array for name, array in tensors.items() if name != suffix or changed is not None}
        if changed is not None:
            tensors[suffix] = changed
        if not tensors:
            return
    inputs = stored.weights | {"dynamic": inputs} if isinstance(inputs, str) else inputs
    config = block(stored.weights, ["Linear" if covered else "none"], inputs=inputs)
    named = {f"x.y.{suffix}": array for suffix, array in tensors.items()}
    folder = write(tmp_path_factory.getbasetemp() / "damaged", named, {"quantization_config": config})
    accounts_for_every_tensor(inspect(folder))
    try:
        with np.errstate(all="ignore"):
            run = load_linear(folder, "x.y", allow_reference=True)
            columns = row_of(inspect(folder), "x.y").shape[1]
            y = run(np.ones((2, columns), np.float32))
    except FewbitsError as error:
        assert len(str(error)) < 1500
        return
    row = row_of(inspect(folder), "x.y")
    assert y.shape == (2, row.shape[0])
    if row.spec.weight.quantized:
        assert np.isfinite(y).all()


def to_json_is_json(planned: LoadPlan) -> None:
    from fewbits.report import to_json

    json.loads(json.dumps(to_json(planned), allow_nan=False))


def test_two_hundred_thousand_tensors_take_seconds(tmp_path):
    """The plan is cheap: a tenth of that here, so that a busy machine doesn't matter."""
    shapes = {"weight_packed": ("I32", (64, 8)), "weight_scale": ("BF16", (64, 2)), "weight_shape": ("I64", (2,))}
    stored = {
        f"model.layers.{layer}.mlp.experts.{expert}.{last}.{suffix}": entry
        for layer in range(8)
        for expert in range(256)
        for last in ("gate_proj", "up_proj", "down_proj")
        for suffix, entry in shapes.items()
    }
    ignore = [f"model.layers.{layer}.mlp.gate" for layer in range(500)] + ["re:.*self_attn.*", "lm_head", "re:visual.*"]
    config = {"quantization_config": block(integers(8, 64, 4, 32).weights, ignore=ignore)}
    checkpoint = checkpoint_of(tmp_path, stored, config, True)
    began = time.thread_time()
    planned = plan(checkpoint)
    assert len(stored) > 18_000 and len(planned.rows) == len(stored) // 3
    assert time.thread_time() - began < 3


def test_codes_packed_by_the_helper_are_the_producers():
    """The helper's files are as good as the real tool's: its packer gives the bytes of a fixture back."""
    folder = FIXTURES / "tiny-w4a16-asym-g16-head"
    planned = inspect(folder)
    with open_checkpoint(folder).reader() as reader:
        words = reader.read("lm_head.weight_packed")
        linear, _ = decode(planned, row_of(planned, "lm_head"), reader)
        zero_words = reader.read("lm_head.weight_zero_point")
    np.testing.assert_array_equal(packed(linear.weight.unpacked(), 4), words)
    np.testing.assert_array_equal(packed(linear.weight.zero.T, 4).T, zero_words)
