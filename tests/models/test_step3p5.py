"""Step-3.5-Flash: the release planned from its headers, and a small one against an implementation of the tests' own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from make import Raw, block, write
from step3p5_checkpoint import RELEASE, SMALL, is_experts, is_quantized, random_tensors, shapes
from step3p5_reference import Step

import fewbits
from fewbits.checkpoint.config import HARMLESS, Config
from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import CheckpointError, PlanError
from fewbits.kernels.ops import Activation, Ops, Routing
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.load import load
from fewbits.models import FAMILIES
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import MlpConfig, MoeConfig
from fewbits.verify import verify

IDS = np.random.default_rng(7).integers(0, 38, 24).tolist()


def unstacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts one by one, as quantizers write them."""
    result = {}
    for name, tensor in tensors.items():
        if not is_experts(name):
            result[name] = tensor
            continue
        parent, projection = name.split(".moe.")
        result |= {f"{parent}.moe.experts.{e}.{projection}": one for e, one in enumerate(tensor)}
    return result


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gate and up of all experts in one tensor."""
    result = {name: tensor for name, tensor in tensors.items() if not is_experts(name)}
    for name in tensors:
        if name.endswith("moe.gate_proj.weight"):
            block_name = name.removesuffix(".gate_proj.weight")
            both = [tensors[f"{block_name}.{part}_proj.weight"] for part in ("gate", "up")]
            result[f"{block_name}.experts.gate_up_proj"] = np.concatenate(both, axis=1)
            result[f"{block_name}.experts.down_proj"] = tensors[f"{block_name}.down_proj.weight"]
    return result


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(SMALL)


@pytest.fixture(scope="module")
def expected(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return Step(SMALL, tensors).logits(IDS)


def logits(folder: Path, ops: Ops | None, chunks: list[int]) -> np.ndarray:
    loaded = load(folder, ops=ops)
    cache = KVCache(loaded.cache_layers, max_pages=8)
    rows, begin = [], 0
    for size in chunks:
        part = Part(0, IDS[begin : begin + size], size)
        rows.append(loaded.decoder.forward(cache.batch([part]), cache).logits)
        begin += size
    return np.concatenate(rows)


@pytest.mark.parametrize("ops", [ReferenceOps(), None], ids=["reference", "native"])
@pytest.mark.parametrize("layout", [dict, unstacked, fused], ids=["stacked", "one by one", "fused"])
def test_logits_are_those_of_the_facts(
    tmp_path: Path, tensors: dict[str, np.ndarray], expected: np.ndarray, layout: Any, ops: Ops | None
) -> None:
    folder = write(tmp_path, layout(tensors), SMALL)
    found = logits(folder, ops, [24])
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 3e-6
    np.testing.assert_array_equal(logits(folder, ops, [1] * 24), found)
    np.testing.assert_array_equal(logits(folder, ops, [7, 1, 16]), found)


@pytest.mark.parametrize(
    "change",
    [
        {"zero_centered": False},
        {"moe_router_scaling_factor": 1.0},
        {"norm_expert_weight": False},
        {"use_moe_router_bias": False},
        {"moe_router_activation": "softmax"},
        {"swiglu_limits": 0.0},
        {"swiglu_limits_shared": 0.0},
        {"yarn_only_types": ["sliding_attention"]},
        {"rope_theta": 5e3},
        {"partial_rotary_factors": 0.5},
        {"sliding_window": 6},
        {"use_rope_layers": [True] * 5 + [False]},
        {"use_head_wise_attn_gate": False},
        {"moe_top_k": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_shows(
    tmp_path: Path, tensors: dict[str, np.ndarray], expected: np.ndarray, change: dict[str, Any]
) -> None:
    """The comparison is worth something: each of these alone is far from it."""
    found = logits(write(tmp_path, tensors, SMALL | change), ReferenceOps(), [24])
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) > 3e-3


def test_generated_tokens_are_those_of_the_facts(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    model, ids = Step(SMALL, tensors), IDS[:8]
    for _ in range(16):
        ids = [*ids, int(model.logits(ids)[-1].argmax())]
    llm = fewbits.LLM(write(tmp_path, tensors, SMALL))
    [result] = llm.generate([IDS[:8]], fewbits.SamplingParams(max_tokens=16, ignore_eos=True))
    assert result.token_ids == ids[8:]


def test_verify_covers_experts_router_and_gates(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    found = verify(write(tmp_path / "fine", tensors, SMALL))
    assert found.ok, found.first_problem
    names = {one.name for one in found.modules}
    assert {f"model.layers.2.moe[{e}].down_proj" for e in range(8)} <= names
    rest = ("moe.gate", "self_attn.g_proj", "share_expert.up_proj")
    assert {f"model.layers.2.{name}" for name in rest} <= names
    assert not {name for name in names if name.startswith("model.layers.6")} and len(found.not_checked) > 0
    zeros = tensors["model.layers.3.moe.down_proj.weight"].copy()
    zeros[5] = 0
    broken = verify(write(tmp_path / "broken", tensors | {"model.layers.3.moe.down_proj.weight": zeros}, SMALL))
    assert broken.first_problem == "model.layers.3.moe[5].down_proj: all of its weights are zero"
    bias = tensors["model.layers.3.moe.router_bias"].copy()
    bias[2] = np.nan
    nan = verify(write(tmp_path / "nan", tensors | {"model.layers.3.moe.router_bias": bias}, SMALL))
    assert nan.first_problem is not None and nan.first_problem.startswith("model.layers.3.moe.gate: holds nan at [2]")


# ---- the release ---------------------------------------------------------------------------------------------------


def header_only(folder: Path, entries: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]) -> Path:
    sizes = {"BF16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1}
    raw = {
        name: Raw(dtype, shape, nbytes=sizes[dtype] * int(np.prod(shape, dtype=np.int64)))
        for name, (dtype, shape) in entries.items()
    }
    return write(folder, raw, config, header_only=True)


def bf16() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("F32" if "router_bias" in name else "BF16", shape) for name, shape in shapes(RELEASE)}


def int8() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Experts one by one, a scale a row."""
    entries = {}
    for name, (dtype, shape) in bf16().items():
        if not is_quantized(name) or int(name.split(".")[2]) > 44:
            entries[name] = (dtype, shape)
            continue
        parent, _, projection = name.partition(".moe.")
        modules = [f"{parent}.moe.experts.{e}.{projection}" for e in range(288)] if projection else [name]
        for module in modules:
            entries[module] = ("I8", shape[-2:])
            entries[module.replace(".weight", ".weight_scale")] = ("BF16", (shape[-2], 1))
    return entries


CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# What each must read: some 196 billion parameters, 11 billion of them for a token.
PARAMETERS = 196.9e9


def test_the_release_is_planned_from_its_headers(tmp_path: Path) -> None:
    folder = header_only(tmp_path, bf16(), RELEASE)
    began = time.thread_time()
    planned = fewbits.inspect(folder)
    assert time.thread_time() - began < 3
    assert planned.errors == [] and planned.warnings == [] and planned.leftover_tensors == []
    mtp = [row for row in planned.rows if row.executed_as == "not_run"]
    assert len(mtp) == 3 * 17 and {row.name.split(".")[2] for row in mtp} == {"45", "46", "47"}
    assert all("multi-token prediction" in row.reason for row in mtp)
    assert {row.executed_as for row in planned.rows if row not in mtp} == {"native"}
    parameters = sum(int(np.prod(row.shape)) for row in planned.rows if row.runs)
    assert abs(parameters / PARAMETERS - 1) < 0.01
    routers = 42 * 288 * 4096 * 2  # are float32 in memory
    norms = sum(row.shape[0] for row in planned.rows if row.kind == "norm" and row.runs)
    assert 0 <= planned.weight_bytes() - (2 * parameters + routers + 2 * norms) < 1e-3 * planned.weight_bytes()
    assert planned.kv_bytes_per_token() == 45 * 4096
    expert = next(row for row in planned.rows if row.name == "model.layers.44.moe[287].down_proj")
    assert expert.shape == (4096, 1280) and expert.tensors == ("model.layers.44.moe.down_proj.weight",)
    router = next(row for row in planned.rows if row.name == "model.layers.44.moe.gate")
    assert router.kind == "router" and router.tensors[-1] == "model.layers.44.moe.router_bias"


def test_an_int8_release_is_planned_from_its_headers(tmp_path: Path) -> None:
    ignore = ["lm_head", r"re:.*moe\.gate$", "re:.*g_proj$", r"re:.*layers\.4[5-7]\..*"]
    quantized = RELEASE | {"quantization_config": block(CHANNEL, inputs=TOKEN, ignore=ignore)}
    folder = header_only(tmp_path, int8(), quantized)
    began = time.thread_time()
    planned = fewbits.inspect(folder)
    assert time.thread_time() - began < 4
    assert planned.errors == [] and planned.warnings == []
    experts = [row for row in planned.rows if row.kind == "expert"]
    assert len(experts) == 42 * 288 * 3
    assert {str(row.spec) for row in experts} == {"int8 channel × int8 token dynamic"}
    assert {row.kernel.name for row in experts if row.kernel} == {"cpu.dot_int8"}
    assert planned.weight_bytes() == pytest.approx(PARAMETERS, rel=0.02)


# ---- its configuration ---------------------------------------------------------------------------------------------


def configure(**changes: Any) -> tuple[DecoderConfig, Config]:
    config = Config(RELEASE | changes, "config.json")
    return next(family for family in FAMILIES if family.name == "step3p5").configure(config), config


def test_what_the_releases_config_makes() -> None:
    decoder, config = configure()
    assert list(config.leftovers(HARMLESS)) == []
    full, sliding = decoder.layers[44].attention, decoder.layers[43].attention
    assert (full.heads, full.kv_heads, full.window) == (64, 8, 0)
    assert (sliding.heads, sliding.kv_heads, sliding.window) == (96, 8, 512)
    assert (full.rope.rotary_dim, sliding.rope.rotary_dim) == (64, 128)
    for i, frequency in ((10, 8.064397e-3), (16, 2.836864e-4), (18, 9.230576e-5), (20, 3.289137e-5), (31, 1.619358e-7)):
        assert full.rope.inv_freq[i] == pytest.approx(frequency, rel=1e-6)
    assert sliding.rope.inv_freq[1] == 1e4 ** (-2 / 128)
    assert decoder.norm_offset == 1 and full.qk_norm and full.head_gate
    blocks = [layer.feed_forward for layer in decoder.layers]
    assert [isinstance(one, MlpConfig) for one in blocks] == [True] * 3 + [False] * 42
    moe = blocks[43]
    assert isinstance(moe, MoeConfig) and moe.shared is not None
    assert moe.routing == Routing(8, "sigmoid", True, 1e-20, 3.0) and moe.selection_bias
    limits = [(one.activation.limit, one.shared.mlp.activation.limit) for one in blocks if isinstance(one, MoeConfig)]  # type: ignore[union-attr]
    assert limits == [(0, 0)] * 40 + [(7, 0), (7, 16)]
    assert blocks[0].activation == Activation()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sink": True}, "sink"),
        ({"att_impl_type": "MFA"}, "att_impl_type"),
        ({"moe_router_activation": "tanh"}, "moe_router_activation"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_layers_enum": "3,four"}, "moe_layers_enum must list numbers"),
        ({"moe_layers_enum": 3}, "moe_layers_enum must list numbers"),
        ({"moe_top_k": 289}, "asks for 289 of 288 experts"),
        ({"moe_num_experts": 99_999}, "makes 4199958 experts in all"),
        ({"rope_theta": [1e4] * 44}, "has 44 entries for 45 layers"),
        ({"rope_theta": [True] * 45}, "must hold numbers"),
        ({"swiglu_limits": [-7.0] * 45}, "must not be negative"),
        ({"num_attention_groups": 7}, "isn't a multiple of 7"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers"),
        ({"use_rope_layers": [True]}, "has 1 entries"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        configure(**changes)


@pytest.mark.parametrize(
    "key",
    """moe_layers_enum moe_num_experts moe_top_k moe_intermediate_size share_expert_dim moe_router_activation
    use_moe_router_bias norm_expert_weight use_qk_norm zero_centered use_head_wise_attn_gate head_dim layer_types
    num_attention_groups sliding_window""".split(),
)
def test_what_programs_assume_differently_has_no_default(key: str) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        configure(**{key: None})


def test_a_layer_without_rotation(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    decoder, _ = configure(use_rope_layers=[True] * 44 + [False])
    assert decoder.layers[44].attention.rope.rotary_dim == 0 and decoder.layers[43].attention.rope.rotary_dim == 128
    folder = write(tmp_path, tensors, SMALL | {"use_rope_layers": [False] * 6})
    reference, native = logits(folder, ReferenceOps(), [24]), logits(folder, None, [24])
    np.testing.assert_allclose(native, reference, rtol=0, atol=2e-5)


def test_bf16_runs_as_it_is_stored(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    folder = write(tmp_path, narrow, SMALL | {"torch_dtype": "bfloat16"})
    assert verify(folder).ok
