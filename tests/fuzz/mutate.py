"""A sound folder, changed at random: `Choices` is hypothesis in the tests and libFuzzer's bytes in tools/fuzz.py."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from make import HEAD, Array, Raw, Stored, fp8, integers, llama, llama_tensors, mx, nvfp4, safetensors_bytes

T = TypeVar("T")
MOST_BYTES = 1 << 16  # of a tensor that a mutation makes


class Choices(Protocol):
    def below(self, count: int) -> int:
        """A number from 0 to count - 1; 0 is the plainest."""


def pick(choices: Choices, values: Sequence[T]) -> T:
    return values[choices.below(len(values))]


@dataclass(slots=True)
class Folder:
    """`config` is any JSON value; `cut` bytes are missing at the end of the weights, `flips` are (place, byte)."""

    config: Any
    tensors: dict[str, Array | Raw]
    header_only: bool = False
    cut: int = 0
    flips: list[tuple[int, int]] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        data = bytearray(safetensors_bytes(self.tensors, self.header_only))
        for place, byte in self.flips:
            data[place % len(data)] = byte
        (folder / "model.safetensors").write_bytes(data[: len(data) - self.cut] if self.cut else data)
        return folder


# ---- the sound folder --------------------------------------------------------------------------------------------

_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
_ONE = np.ones(1, np.float32)

# Each projection is stored in another way.
MODULES: dict[str, tuple[Stored, dict[str, Any] | None, dict[str, Array]]] = {
    "q_proj": (integers(64, 64, 4, 32, asymmetric=True), None, {}),
    "k_proj": (integers(32, 64, 8, plain=True), _STATIC, {"input_scale": _ONE}),
    "v_proj": (nvfp4(32, 64), _LOCAL, {"input_global_scale": _ONE}),
    "o_proj": (fp8(64, 64, (32, 32)), None, {}),
    "gate_proj": (mx(96, 64, 4), None, {}),
    "up_proj": (integers(96, 64, 3, 32), None, {}),
    "down_proj": (integers(64, 96, 8, 32), None, {"weight_g_idx": np.arange(96, dtype=np.int32) // 32}),
    "lm_head": (integers(*HEAD, 4), None, {}),
}
ATTENTION = "model.layers.0.self_attn"


def sound() -> Folder:
    """A small Llama with a config group for each of its projections."""
    groups, stored = {}, {}
    for number, (name, (module, inputs, more)) in enumerate(MODULES.items()):
        stored[name] = module._replace(tensors=module.tensors | more)
        targets = ["lm_head" if name == "lm_head" else f"re:.*{name}$"]
        groups[f"group_{number}"] = {"targets": targets, "weights": module.weights, "input_activations": inputs}
    tensors: dict[str, Any] = llama_tensors(**stored)
    tensors |= {f"{ATTENTION}.k_scale": _ONE, f"{ATTENTION}.v_scale": _ONE}
    quantization = {"quant_method": "compressed-tensors", "version": "0.15.0", "ignore": ["re:.*norm"]}
    quantization |= {"format": "mixed-precision", "config_groups": groups, "kv_cache_scheme": _FP8}
    return Folder(copy.deepcopy(llama(quantization)), tensors)


# ---- values ------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 128, 1 << 31, 1 << 62, 1 << 64, 10**30, 0.5, -0.0,
    1e308, 5e-324, "", "x", "4", [], {}, [None], [[[]]], {"a": None}, [1, 2], "re:.*", "re:(a|a)*$", "re:(", "Linear",
    "lm_head", "re:.*q_proj$", "int", "float", "tensor", "channel", "group", "block", "token", "tensor_group",
    "attn_head", "local", "static", "torch.uint8", "torch.float8_e4m3fn", "bfloat16", "float32", "nvfp4-pack-quantized",
    "dense", "pack-quantized", "yarn", "llama3", "linear", "\u202e\x1b[2J",
)  # fmt: skip
KEYS = (
    "actorder", "block_structure", "group_size", "dynamic", "strategy", "symmetric", "num_bits", "type", "scale_dtype",
    "format", "output_activations", "ignore", "transform_config", "sparsity_config", "rope_scaling", "rope_parameters",
    "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "head_dim",
    "layer_types", "sliding_window", "text_config", "quantization_config", "attention_bias", "dtype", "W4A16", "FP8",
)  # fmt: skip
DTYPES = (
    "BOOL", "U8", "I8", "I16", "I32", "I64", "U32", "F16", "BF16", "F32", "F64", "C64", "F8_E4M3", "F8_E5M2",
    "F8_E8M0", "F4", "F6_E2M3",
)  # fmt: skip
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "I32": 32, "I64": 64, "U32": 32, "F16": 16, "BF16": 16, "F32": 32}
_BITS |= {"F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6}
SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "bias",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "bitmask",
    "compressed", "row_offsets", "shape", "meta", "scale_packed", "k_scale", "v_scale", "x",
)  # fmt: skip
MODULE_NAMES = (
    "lm_head", "model.embed_tokens", "model.norm", f"{ATTENTION}.q_proj", f"{ATTENTION}.qkv_proj", ATTENTION,
    f"{ATTENTION}.k_norm", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.up_proj",
    "model.layers.0.mlp.experts", "model.layers.0.mlp.gate", "model.layers.1.mlp.up_proj", "a", "",
)  # fmt: skip
SIZES = (1, 2, 32, 64, 96, 40, 3, 0, 8, 16, 5, 1 << 20, 1 << 40)
BYTES = (0, 255, 0x7F, 0x80, 1, 0x7C, 0x3F, 0x88)


def shape(choices: Choices) -> tuple[int, ...]:
    return tuple(pick(choices, SIZES) for _ in range(pick(choices, (2, 1, 0, 3, 4))))


def tensor(choices: Choices, dtype: str, size: tuple[int, ...]) -> Raw:
    """Of these words and, where that isn't too much, of data that is one byte over and over."""
    nbytes = _BITS[dtype] * math.prod(size) // 8
    data = bytes([pick(choices, BYTES)]) * (nbytes if nbytes <= MOST_BYTES else 0)
    return Raw(dtype, size, data, nbytes)


# ---- mutations -----------------------------------------------------------------------------------------------------


def places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside a JSON value."""
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    found = [(value, key) for key, _ in inner]
    for _, below in inner:
        found += places(below, depth + 1) if depth < 12 else []
    return found


def in_config(folder: Folder, choices: Choices) -> None:
    """A value replaced, removed, wrapped, moved from elsewhere, or a key more."""
    found = places(folder.config)
    if not found:
        return
    container, key = pick(choices, found)
    how = pick(choices, ("odd", "move", "remove", "wrap", "key"))
    if how == "odd":
        container[key] = copy.deepcopy(pick(choices, ODD))
    elif how == "move":
        other, its_key = pick(choices, found)
        container[key] = copy.deepcopy(other[its_key])
    elif how == "remove":
        del container[key]
    elif how == "wrap":
        container[key] = [container[key]] if choices.below(2) else {"a": container[key]}
    elif isinstance(container, dict):
        container[pick(choices, KEYS)] = copy.deepcopy(pick(choices, ODD))


def in_words(folder: Folder, choices: Choices) -> None:
    """A tensor of another dtype or shape, another name, or no tensor at all."""
    names = list(folder.tensors)
    if not names:
        return
    name = pick(choices, names)
    old = folder.tensors[name]
    how = pick(choices, ("reshape", "dtype", "shape", "rename", "swap", "remove", "more"))
    if how == "reshape" and not isinstance(old, Raw) and old.ndim:
        first = pick(choices, [size for size in (1, 2, 8, 32, old.size) if size and old.size % size == 0])
        folder.tensors[name] = old.reshape(first, -1) if choices.below(2) else old.reshape(-1)
    elif how == "dtype":
        folder.tensors[name] = tensor(choices, pick(choices, DTYPES), tuple(old.shape))
    elif how == "shape":
        folder.tensors[name] = tensor(choices, pick(choices, DTYPES), shape(choices))
    elif how == "rename":
        folder.tensors[f"{name.rpartition('.')[0]}.{pick(choices, SUFFIXES)}"] = folder.tensors.pop(name)
    elif how == "swap":
        other = pick(choices, names)
        folder.tensors[name], folder.tensors[other] = folder.tensors[other], old
    elif how == "remove":
        del folder.tensors[name]
    else:
        new = f"{pick(choices, MODULE_NAMES)}.{pick(choices, SUFFIXES)}"
        folder.tensors[new] = tensor(choices, pick(choices, DTYPES), shape(choices))


def in_data(folder: Folder, choices: Choices) -> None:
    """Some bytes of a tensor are others."""
    arrays = [name for name, array in folder.tensors.items() if not isinstance(array, Raw) and array.nbytes]
    if not arrays:
        return
    name = pick(choices, arrays)
    array = folder.tensors[name].copy()  # type: ignore[union-attr]
    flat = array.reshape(-1).view(np.uint8)
    begin = choices.below(flat.size)
    flat[begin : begin + pick(choices, (1, 2, 4, 8, flat.size))] = pick(choices, BYTES)
    folder.tensors[name] = array


def in_file(folder: Folder, choices: Choices) -> None:
    """Bytes of the file are others, most of them of its header; or its end is missing."""
    if choices.below(8) == 7:
        folder.cut = 1 + choices.below(64)
    elif choices.below(8) == 7:
        folder.header_only = True
    else:
        place = pick(choices, (8, 8, 8, 1 << 16, 0))
        text = b'0129-[]{}",:.eE \\uUFI4_Bx\x00\xff'
        folder.flips.append((choices.below(8000) + place if place else choices.below(8), pick(choices, text)))


MUTATIONS: dict[str, Callable[[Folder, Choices], None]] = {
    "config": in_config,
    "words": in_words,
    "data": in_data,
    "file": in_file,
}


def mutated(choices: Choices, kinds: Sequence[str]) -> Folder:
    """The sound folder after one to four changes of these kinds."""
    folder = sound()
    for _ in range(1 + choices.below(4)):
        MUTATIONS[pick(choices, kinds)](folder, choices)
    return folder


def made_up(choices: Choices) -> Folder:
    """Any valid header: tensors of any names, dtypes and shapes, of a known family or none, without data."""
    folder = Folder(sound().config if choices.below(2) else {}, {}, header_only=True)
    for _ in range(choices.below(12)):
        name = f"{pick(choices, MODULE_NAMES)}.{pick(choices, SUFFIXES)}"
        dtype, size = pick(choices, DTYPES), tuple(min(axis, 1 << 20) for axis in shape(choices)[:2])
        if _BITS[dtype] * math.prod(size) % 8:
            dtype = "U8"
        folder.tensors[name] = Raw(dtype, size, b"", _BITS[dtype] * math.prod(size) // 8)
    return folder
