"""gpt-oss as AMD Quark writes it; test_quark.py holds its exports to the numbers that Quark itself has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import write
from safetensors.numpy import load_file

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import FewbitsError
from fewbits.load import decode, inspect, load

TESTS = Path(__file__).parents[1]
EXPORTS = TESTS / "exports" / "quark"
PUBLISHED = TESTS / "fixtures" / "gpt-oss-mxfp4"
EXPERT = "model.layers.0.mlp.experts.1"
Tensors = dict[str, np.ndarray]
MXFP4 = "fp4 g32 e8m0"


@pytest.mark.parametrize(
    ("name", "experts", "attention", "cache"),
    [
        ("gpt-oss-mxfp4-fp8", f"{MXFP4} × fp8 tensor static", "bfloat16", ""),
        ("gpt-oss-mxfp4-fp8-kv", f"{MXFP4} × fp8 tensor static", "bfloat16", "fp8 tensor static"),
        ("gpt-oss-mxfp4-fp8-dynamic-kv", f"{MXFP4} × fp8 tensor dynamic", "bfloat16", "fp8 tensor static"),
        ("gpt-oss-fp8-kv", "fp8 tensor × fp8 tensor static", "fp8 tensor × fp8 tensor static", "fp8 tensor static"),
        ("gpt-oss-mxfp4", f"{MXFP4} × {MXFP4} dynamic", f"{MXFP4} × {MXFP4} dynamic", ""),
        ("gpt-oss-mxfp4-kept", f"{MXFP4} × a16", "fp8 channel × fp8 token dynamic", ""),
        ("files-gpt-oss", f"{MXFP4} × a16", "fp8 channel × fp8 token dynamic", ""),
    ],
)
def test_each_part_has_its_scheme(name: str, experts: str, attention: str, cache: str) -> None:
    plan = inspect(EXPORTS / name)
    stored = {part: {str(row.spec) for row in plan.rows if part in row.name} for part in ("experts", "_proj", "router")}
    assert stored["experts"] == {experts}
    assert stored["_proj"] == {experts, attention}
    assert stored["router"] == {"bfloat16"}
    assert str(plan.kv_cache or "") == cache
    assert set(plan.kv_scales) == (set(range(2)) if cache else set())


def weights(folder: Path) -> Tensors:
    """Of experts, by one name whether they are stacked or not."""
    plan = inspect(folder)
    assert plan.checkpoint is not None
    found = {}
    with plan.checkpoint.reader() as reader:
        for row in plan.rows:
            if "experts" in row.name:
                linear = decode(plan, row, reader)[0]
                assert linear.bias is not None
                name = row.name.replace("[", ".").replace("]", "")
                found[name] = np.column_stack((linear.weight.dequantize(), linear.bias))
    return found


@pytest.mark.parametrize("name", ["gpt-oss-mxfp4-kept", "files-gpt-oss"])
def test_experts_that_quark_keeps_are_the_published_ones(name: str) -> None:
    """From file to file in their blocks; in memory one by one, quantized again, which changes no number."""
    expected, found = weights(PUBLISHED), weights(EXPORTS / name)
    assert len(expected) == 20 and found.keys() == expected.keys()
    for module, weight in expected.items():
        np.testing.assert_array_equal(found[module], weight)
    ids = load_file(PUBLISHED / "expected.safetensors")
    logits = fewbits.LLM(EXPORTS / name).logits(ids["input_ids"].reshape(-1).tolist())
    # Attention in FP8, its weights and its inputs, is what lies between them.
    assert np.linalg.norm(logits - ids["logits"]) < 0.25 * np.linalg.norm(ids["logits"])


def changed(folder: Path, name: str, change: Callable[[Tensors], None], **quantization: Any) -> Path:
    """An export with other tensors, or other keys of its quantization block."""
    checkpoint = open_checkpoint(EXPORTS / name)
    with checkpoint.reader() as reader:
        tensors = {tensor: np.array(reader.read(tensor)) for tensor in checkpoint.tensors}
    change(tensors)
    config = json.loads((EXPORTS / name / "config.json").read_text())
    config["quantization_config"] |= quantization
    return write(folder, tensors, config)


def untouched(tensors: Tensors) -> None:
    pass


def test_every_expert_has_its_own_input_scale(tmp_path: Path) -> None:
    def finer(tensors: Tensors) -> None:  # the largest inputs are cut off
        tensors[f"{EXPERT}.down_proj.input_scale"] /= np.float32(16)

    name = "gpt-oss-mxfp4-fp8"
    ids = [3, 7, 11, 30, 5]
    right = fewbits.LLM(EXPORTS / name).logits(ids)
    assert np.abs(fewbits.LLM(changed(tmp_path / "model", name, finer)).logits(ids) - right).max() > 1e-3


def test_excluded_blocks_run_as_stored(tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", "files-gpt-oss", untouched, exclude=["*experts*", "*router", "lm_head"])
    plan = inspect(folder)
    assert plan.errors == [] and {one.code for one in plan.warnings} == {"ignored-but-quantized"}
    ids = [3, 7, 11, 30, 5]
    np.testing.assert_array_equal(fewbits.LLM(folder).logits(ids), fewbits.LLM(EXPORTS / "files-gpt-oss").logits(ids))


def without_input_scale(tensors: Tensors) -> None:
    del tensors[f"{EXPERT}.gate_up_proj.input_scale"]


def without_bias(tensors: Tensors) -> None:
    del tensors[f"{EXPERT}.gate_up_proj.bias"]


def without_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


def one_row_less(tensors: Tensors) -> None:
    for suffix in ("weight", "weight_scale", "bias"):
        tensors[f"{EXPERT}.gate_up_proj.{suffix}"] = tensors[f"{EXPERT}.gate_up_proj.{suffix}"][1:].copy()


def shared_scales(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.gate_up_proj.weight_scale"] = np.ones((8, 1), np.float32)


def half_blocks(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    tensors[name] = np.ascontiguousarray(tensors[name][..., :8])


BLOCKS = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [16, 32], "is_dynamic": False, "symmetric": True}
SOFTMAX = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("name", "change", "quantization", "code", "text"),
    [
        ("gpt-oss-mxfp4-fp8", without_input_scale, {}, "scale-missing", "need input_scale"),
        ("gpt-oss-mxfp4-fp8", without_bias, {}, "bias-missing", "has a bias here"),
        ("gpt-oss-mxfp4-fp8", without_expert, {}, "module-missing", ""),
        ("gpt-oss-mxfp4-fp8", one_row_less, {}, "shape-mismatch", "[127, 32], the config makes it [128, 32]"),
        (
            "gpt-oss-fp8-kv",
            shared_scales,
            {"layer_quant_config": {f"{EXPERT}.gate_up_proj": {"weight": BLOCKS}}},
            "tensors-disagree",
            "come in turn, share scales",
        ),
        ("files-gpt-oss", half_blocks, {}, "tensors-disagree", "aren't uint8 [N, K / 32, 16]"),
        ("gpt-oss-fp8-kv", untouched, {"softmax_quant_spec": SOFTMAX}, "scheme-unknown", "attention weights stay"),
    ],
)
def test_what_cant_be_run_is_refused_with_its_reason(
    name: str, change: Callable[[Tensors], None], quantization: dict[str, Any], code: str, text: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "model", name, change, **quantization)
    plan = inspect(folder)
    assert any(error.code == code and text in error.text for error in plan.errors), plan.errors
    assert plan.config_keys == []
    with pytest.raises(FewbitsError):
        load(folder)
