"""Drafters for tests: those of tests/exports/drafters, and what is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from make import llama, llama_tensors, write
from safetensors.numpy import load_file, save_file

from fewbits.engine.kvcache import KVCache, Part
from fewbits.kernels.batch import CacheDtype
from fewbits.load import Loaded
from fewbits.load_drafter import LoadedDrafter
from fewbits.models.eagle3 import Draft

TESTS = Path(__file__).parent
DRAFTERS = TESTS / "exports" / "drafters"
TARGET = TESTS / "fixtures" / "w4a16-asym-g32-head-f32"
NAMES = sorted(path.parent.name for path in DRAFTERS.glob("*/expected.safetensors"))

NORMS = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")  # Eagle3's

Tensors = dict[str, np.ndarray]
Build = Callable[[Path], object]  # writes a folder


def expected(name: str) -> Tensors:
    return load_file(DRAFTERS / name / "expected.safetensors")


def changed(
    folder: Path,
    name: str = "bf16",
    change: Callable[[Tensors], Mapping[str, np.ndarray] | None] = lambda tensors: None,
    **config: Any,
) -> Path:
    """A copy of a drafter with other tensors, which `change` edits or returns, and other keys in its config; None takes
    a key out.
    """
    shutil.copytree(DRAFTERS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(change(tensors) or tensors), folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in written.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def watched(target: Loaded) -> tuple[Loaded, list[np.ndarray]]:
    """The target, for a drafter whose logits are kept: its operations run one by one."""
    seen: list[np.ndarray] = []

    class Watched(type(target.ops)):  # type: ignore[misc]
        def fused(self, block: Any, widths: Any, caches: int) -> None:
            return None

        def best_tokens(self, logits: Any, *others: Any) -> None:
            seen.append(np.array(logits))
            super().best_tokens(logits, *others)

    return replace(target, ops=Watched()), seen


def draft_of(
    loaded: LoadedDrafter, known: Tensors, rows: Sequence[int], least: float = 0.0, dtype: CacheDtype | None = "f32"
) -> Draft:
    """A draft behind the given tokens, of so many `rows` in each place. Without a `dtype` the cache is kept as the
    drafter's config says.
    """
    layers = [layer if dtype is None else replace(layer, dtype=dtype) for layer in loaded.cache_layers]
    cache = KVCache(layers, max_pages=8)
    states = [np.ascontiguousarray(part) for part in np.split(known["states"], 3, axis=1)]
    batch = cache.batch([Part(0, known["tokens"].tolist(), rows[0], ahead=len(rows) - 1)])
    return loaded.drafter.draft(batch, states, rows, cache, least)


def drafted(
    loaded: LoadedDrafter, known: Tensors, count: int = 1, rows: int = 1, dtype: CacheDtype | None = "f32"
) -> tuple[list[int], np.ndarray]:
    """Guesses behind each of the last `rows` of the given tokens, or `count` behind the last of these; and the states
    that they are made of.
    """
    draft = draft_of(loaded, known, [rows, *[1] * (count - 1)], dtype=dtype)
    return [*draft.tokens[0].tolist(), *draft.tokens[1:, 0].tolist()], draft.states[:rows]


def in_one_direction(layer_ids: tuple[int, ...] = (0, 1, 1)) -> tuple[Build, Build]:
    """A target whose layer puts one direction into every state, which its head takes for token 7; and a drafter that
    guesses the same where the last of the states that it reads is of that layer.
    """
    direction = np.where(np.arange(64) % 2, 1, -1).astype(np.float32)

    def build_target(folder: Path) -> object:
        tensors = {name: tensor.astype(np.float32) for name, tensor in llama_tensors().items()}
        tensors["lm_head.weight"][7] = direction
        tensors |= {f"model.layers.0.mlp.{name}_proj.bias": np.zeros(96, np.float32) for name in ("gate", "up")}
        tensors["model.layers.0.mlp.down_proj.bias"] = 50 * direction
        return write(folder, tensors, llama(mlp_bias=True, torch_dtype="float32"))

    def build_drafter(folder: Path) -> object:
        shapes = {"self_attn.q": (64, 128), "self_attn.k": (32, 128), "self_attn.v": (32, 128), "self_attn.o": (64, 64)}
        shapes |= {"mlp.gate": (96, 64), "mlp.up": (96, 64), "mlp.down": (64, 96)}
        tensors: dict[str, Any] = {f"midlayer.{name}_proj.weight": np.zeros(shape) for name, shape in shapes.items()}
        tensors |= {f"{name}.weight": np.ones(64) for name in NORMS}
        tensors["fc.weight"] = np.concatenate((np.zeros((64, 128)), np.eye(64)), axis=1)
        config = llama(architectures=["LlamaForCausalLMEagle3"], torch_dtype="float32")
        config["eagle_aux_hidden_state_layer_ids"] = list(layer_ids)
        return write(folder, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, config)

    return build_target, build_drafter
