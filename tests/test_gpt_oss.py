"""gpt-oss from files: what is stored in which order, and what is wrong with it. Logits are in test_logits.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fewbits.checkpoint.config import Config
from fewbits.engine.llm import LLM
from fewbits.errors import FewbitsError
from fewbits.load import inspect, load
from fewbits.models import gpt_oss

FIXTURES = Path(__file__).parent / "fixtures"
Tensors = dict[str, np.ndarray]
EXPERTS = "model.layers.0.mlp.experts"


def changed(folder: Path, name: str, change: Callable[[Tensors], None], **config: Any) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def logits(folder: Path) -> np.ndarray:
    ids = load_file(FIXTURES / "gpt-oss-f32" / "expected.safetensors")["input_ids"].reshape(-1)
    found: np.ndarray = LLM(folder).logits(ids.tolist())
    return found


@pytest.fixture(scope="module")
def right() -> np.ndarray:
    return logits(FIXTURES / "gpt-oss-f32")


def one_by_one(tensors: Tensors) -> None:
    """As llm-compressor writes experts: linear modules, gate and up apart."""
    for name in [name for name in tensors if ".experts." in name]:
        array = tensors.pop(name)
        parent, _, last = name.rpartition(".")
        for expert, one in enumerate(array):
            suffix = "bias" if last.endswith("_bias") else "weight"
            one = one if suffix == "bias" else one.T
            parts = {"down_proj": one}
            if last.startswith("gate_up"):
                parts = {"gate_proj": one[0::2], "up_proj": one[1::2]}
            for projection, part in parts.items():
                tensors[f"{parent}.{expert}.{projection}.{suffix}"] = np.ascontiguousarray(part)


def as_engines_call_them(tensors: Tensors) -> None:
    """w13_weight [E, 2 I, H], w13_bias, w2_weight, w2_bias."""
    for name in [name for name in tensors if ".experts." in name]:
        array = tensors.pop(name)
        parent, _, last = name.rpartition(".")
        stem = "w13" if last.startswith("gate_up") else "w2"
        if last.endswith("_bias"):
            tensors[f"{parent}.{stem}_bias"] = array
        else:
            tensors[f"{parent}.{stem}_weight"] = np.ascontiguousarray(array.swapaxes(1, 2))


@pytest.mark.parametrize("change", [one_by_one, as_engines_call_them])
def test_however_experts_are_stored(change: Callable[[Tensors], None], right: np.ndarray, tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", "gpt-oss-f32", change)
    planned = inspect(folder)
    assert planned.errors == [] and planned.warnings == [] and planned.leftover_tensors == []
    # gate and up in one product or in two: the sums are the same
    np.testing.assert_allclose(logits(folder), right, rtol=0, atol=2e-5 * float(np.abs(right).max()))


@pytest.mark.parametrize(
    "name", [f"{EXPERTS}.gate_up_proj_bias", f"{EXPERTS}.down_proj_bias", "model.layers.0.mlp.router.bias"]
)
def test_every_bias_counts(name: str, right: np.ndarray, tmp_path: Path) -> None:
    def zeroed(tensors: Tensors) -> None:
        tensors[name][:] = 0

    def gone(tensors: Tensors) -> None:
        del tensors[name]

    other = logits(changed(tmp_path / "zeroed", "gpt-oss-f32", zeroed))
    assert np.abs(other - right).max() > 1e-3 * np.abs(right).max()
    errors = inspect(changed(tmp_path / "gone", "gpt-oss-f32", gone)).errors
    assert {error.code for error in errors} == {"bias-missing"}


def test_sinks_count(right: np.ndarray, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.sinks"][:] = -1e9

    other = logits(changed(tmp_path / "model", "gpt-oss-f32", without))
    assert np.abs(other - right).max() > 1e-3 * np.abs(right).max()


def test_the_limit_is_the_configs() -> None:
    config = json.loads((FIXTURES / "gpt-oss-f32" / "config.json").read_text())
    for limit in (7.0, 3.5):
        model = gpt_oss.configure(Config(config | {"swiglu_limit": limit}, "config.json"))
        assert model.layers[0].feed_forward.activation.limit == limit
    with pytest.raises(FewbitsError, match="must not be negative"):
        gpt_oss.configure(Config(config | {"swiglu_limit": -1.0}, "config.json"))
    with pytest.raises(FewbitsError, match="swiglu_alpha"):
        gpt_oss.configure(Config(config | {"swiglu_alpha": 1.5}, "config.json"))


def test_rows_of_gate_and_up_that_share_scales_are_refused(tmp_path: Path) -> None:
    """A scale for 16 rows is one for 8 of gate and 8 of up: the rows can't be put apart."""

    def quantized(tensors: Tensors) -> None:
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            stack = tensors.pop(name).swapaxes(1, 2)
            tensors[f"{name}.weight"] = stack.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            tensors[f"{name}.weight_scale"] = np.ones((5, 8, 1), np.float32)
            tensors[f"{name}.bias"] = tensors.pop(f"{name}_bias")

    folder = changed(tmp_path / "model", "gpt-oss-f32", quantized)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, info in header.items():
        if name.endswith("gate_up_proj.weight"):
            info["dtype"] = "F8_E4M3"
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [16, 32]}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["re:.*gate_up_proj"]}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    errors = inspect(folder).errors
    assert errors and "come in turn, share scales" in errors[0].text


@pytest.mark.parametrize(
    ("suffix", "change", "code"),
    [
        ("_blocks", lambda array: array[..., :8], "tensors-disagree"),
        ("_scales", lambda array: array[..., np.newaxis], "tensors-disagree"),
        ("_scales", lambda array: array.view(np.int8), "tensors-disagree"),
        ("_blocks", lambda array: array[:4], "tensors-disagree"),
        ("_bias", lambda array: array[:, :3], "shape-mismatch"),
    ],
)
def test_broken_blocks_are_explained(
    suffix: str, change: Callable[[np.ndarray], np.ndarray], code: str, tmp_path: Path
) -> None:
    def broken(tensors: Tensors) -> None:
        name = f"{EXPERTS}.gate_up_proj{suffix}"
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    planned = inspect(changed(tmp_path / "model", "gpt-oss-mxfp4", broken))
    assert code in {error.code for error in planned.errors}
    with pytest.raises(FewbitsError):
        load(tmp_path / "model")


def test_an_exponent_that_is_no_number_is_named(tmp_path: Path) -> None:
    def broken(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}.down_proj_scales"][2, 5, 0] = 255

    with pytest.raises(FewbitsError) as caught:
        load(changed(tmp_path / "model", "gpt-oss-mxfp4", broken))
    assert caught.value.code == "scale-invalid" and "experts[2].down_proj" in caught.value.module


def test_excluded_and_packed_all_the_same(tmp_path: Path) -> None:
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.mlp", "nowhere"]}
    folder = changed(tmp_path / "model", "gpt-oss-mxfp4", lambda tensors: None, quantization_config=block)
    planned = inspect(folder)
    assert {warning.code for warning in planned.warnings} == {"ignored-but-quantized", "pattern-no-match"}
    assert planned.patterns_without_match == ["nowhere"] and planned.errors == []
