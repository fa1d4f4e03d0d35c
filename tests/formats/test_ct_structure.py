"""Models whose modules don't share one scheme: each is resolved by itself, under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import PROJECTIONS, Stored, block, dense, fp8, integers, llama, llama_tensors, mx, nvfp4, write

from fewbits.load import decode, inspect, load_linear
from fewbits.plan import LoadPlan

EXPERTS = "model.layers.0.mlp.experts"


def groups(*parts: tuple[Stored, list[str]], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": {"targets": targets, "weights": stored.weights} for i, (stored, targets) in enumerate(parts)}
    return block(None) | {"config_groups": named} | more


def specs(planned: LoadPlan) -> dict[str, str]:
    return {row.name: str(row.spec.weight) for row in planned.rows}


def decodes_to(planned: LoadPlan, stored: dict[str, Stored]) -> None:
    assert planned.checkpoint is not None
    rows = {row.name: row for row in planned.rows}
    with planned.checkpoint.reader() as reader:
        for name, expected in stored.items():
            linear, _ = decode(planned, rows[name], reader)
            np.testing.assert_allclose(linear.weight.dequantize(), expected.values, rtol=4e-16)


def write_modules(folder: Path, stored: dict[str, Stored], quantization: dict[str, Any], **more: Any) -> LoadPlan:
    tensors = {suffix: tensor for name, module in stored.items() for suffix, tensor in module.under(name).items()}
    return inspect(write(folder, tensors, {"quantization_config": quantization} | more))


def test_every_format_in_one_model(tmp_path):
    """mixed-precision: a group for each projection, with formats of their own."""
    stored = {
        "q_proj": integers(64, 64, 4, 32, True, seed=1),
        "k_proj": integers(32, 64, 8, plain=True, seed=2),
        "v_proj": fp8(32, 64, seed=3),
        "o_proj": fp8(64, 64, (24, 40), seed=4),
        "gate_proj": nvfp4(96, 64, seed=5),
        "up_proj": mx(96, 64, 6, seed=6),
        "down_proj": mx(64, 96, 8, seed=7),
        "lm_head": integers(40, 64, 3, seed=8),
    }
    quantization = groups(*[(module, [f"re:.*{last}$"]) for last, module in stored.items()], format="mixed-precision")
    planned = inspect(write(tmp_path, llama_tensors(**stored), llama(quantization)))
    assert planned.errors == [] and planned.leftover_tensors == [] and planned.patterns_without_match == []
    full = {name: stored[name.rpartition(".")[2]] for name in (*PROJECTIONS, "lm_head")}
    decodes_to(planned, full)
    assert len({spec for name, spec in specs(planned).items() if name in full}) == 8


def test_shards_in_different_groups(tmp_path):
    """q in int4, k and v in int8: never the first one's scheme for all."""
    stored = {
        "a.q_proj": integers(64, 64, 4, 32, seed=1),
        "a.k_proj": integers(32, 64, 8, 32, seed=2),
        "a.v_proj": integers(32, 64, 8, 32, seed=3),
    }
    quantization = groups((stored["a.q_proj"], ["re:.*q_proj"]), (stored["a.k_proj"], ["re:.*[kv]_proj"]))
    planned = write_modules(tmp_path, stored, quantization)
    assert specs(planned) == {"a.q_proj": "int4 g32", "a.k_proj": "int8 g32", "a.v_proj": "int8 g32"}
    decodes_to(planned, stored)


def test_shards_of_which_some_are_ignored(tmp_path):
    stored = {"a.q_proj": dense(64, 64), "a.k_proj": dense(32, 64), "a.v_proj": integers(32, 64, 8, 32, seed=3)}
    quantization = groups((stored["a.v_proj"], ["Linear"]), ignore=["re:.*q_proj", "a.k_proj"])
    planned = write_modules(tmp_path, stored, quantization)
    assert specs(planned) == {"a.q_proj": "bfloat16", "a.k_proj": "bfloat16", "a.v_proj": "int8 g32"}
    assert planned.errors == [] and {warning.code for warning in planned.warnings} == {"family-unknown"}
    decodes_to(planned, stored)


def test_patterns_for_one_shard_dont_hit_the_fused_name(tmp_path):
    """re:.*v_proj matches qkv_proj as it is stored: then the fused module is one, with one scheme."""
    fused = integers(96, 64, 4, 32)
    planned = write_modules(tmp_path, {"a.qkv_proj": fused}, groups((fused, ["re:.*v_proj"])))
    [row] = planned.rows
    assert (row.name, str(row.spec.weight)) == ("a.qkv_proj", "int4 g32")
    decodes_to(planned, {"a.qkv_proj": fused})


def test_an_expert_that_is_ignored_and_one_of_another_scheme(tmp_path):
    """Expert 3 of 8 is dense, expert 5 int8: nothing is taken from expert 0."""
    stored: dict[str, Stored] = {}
    for expert in range(8):
        for seed, last in enumerate(("gate_proj", "up_proj", "down_proj")):
            name, seed = f"{EXPERTS}.{expert}.{last}", seed + 10 * expert
            stored[name] = integers(16, 64, 8 if expert == 5 else 4, 32, seed=seed)
            if expert == 3:
                stored[name] = dense(16, 64, seed=seed)
    quantization = groups(
        (stored[f"{EXPERTS}.0.up_proj"], ["Linear"]),
        (stored[f"{EXPERTS}.5.up_proj"], ["re:.*experts\\.5\\..*"]),
        ignore=["re:.*experts\\.3\\..*"],
    )
    planned = write_modules(tmp_path, stored, quantization)
    assert planned.errors == [] and {row.kind for row in planned.rows} == {"expert"}
    found = specs(planned)
    for name in stored:
        expert = int(name.split(".")[-2])
        assert found[name] == {3: "bfloat16", 5: "int8 g32"}.get(expert, "int4 g32")
    decodes_to(planned, stored)


@pytest.mark.parametrize("shape", [(192, 128), (192, 200), (576, 320), (64, 64)])
def test_blocks_that_end_outside_of_the_weight(tmp_path, shape):
    """N = 192 in blocks of 128 rows: two rows of scales."""
    stored = fp8(*shape, (128, 128))
    assert stored.tensors["weight_scale"].shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    planned = write_modules(tmp_path, {"a.y": stored}, groups((stored, ["Linear"])))
    decodes_to(planned, {"a.y": stored})


def test_an_ignore_list_with_other_prefixes_than_the_tensors(tmp_path):
    """Names of another version of the model hit nothing: a warning each, and the tensors decide."""
    stored = {"model.language_model.layers.0.q_proj": integers(64, 64, 4, 32), "model.visual.q_proj": dense(64, 64)}
    quantization = groups((next(iter(stored.values())), ["Linear"]), ignore=["visual.q_proj", "re:vision.*"])
    planned = write_modules(tmp_path, stored, quantization)
    assert planned.errors == [] and sorted(planned.patterns_without_match) == ["re:vision.*", "visual.q_proj"]
    assert {warning.code for warning in planned.warnings} == {
        "family-unknown",
        "pattern-no-match",
        "targeted-but-dense",
    }
    assert list(specs(planned).values()) == ["int4 g32", "bfloat16"]


def test_scales_for_a_tensor_of_two_shards_stay_apart(tmp_path):
    """Codes 13 and 208 under 0.01 are 0.13 and 2.08; requantized to the other's 0.03 they would be 0.135 and 2.16."""
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    codes = np.zeros((1, 16), np.float32)
    codes[0, :2] = [13, 208]
    tensors = fp8(1, 16).tensors
    stored = {
        name: Stored(
            {"weight": codes.astype(tensors["weight"].dtype), "weight_scale": np.array([scale], np.float32)},
            weights,
            codes,
        )
        for name, scale in (("a.gate_proj", 0.01), ("a.up_proj", 0.03))
    }
    planned = write_modules(tmp_path, stored, groups((stored["a.gate_proj"], ["Linear"])))
    assert planned.errors == []
    y = load_linear(tmp_path, "a.gate_proj", allow_reference=True)(np.eye(16, dtype=np.float32))[:2, 0]
    np.testing.assert_allclose(y, [0.13, 2.08], rtol=1e-6)
