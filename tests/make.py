"""Checkpoint folders for tests, from arrays and a config.

The safetensors bytes are put together here, since the library writes neither FP8 and FP4 from NumPy, nor headers
without data, nor anything hostile. Codes are packed bit by bit, with nothing of the code under test.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


class Raw(NamedTuple):
    """A tensor by its header's own words, of a dtype that NumPy hasn't, or in a header without data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = b""
    nbytes: int | None = None


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header (an object, written as the library does, or bytes), true or not; `length`
    overrides its length.
    """
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def safetensors_bytes(tensors: Mapping[str, Array | Raw], header_only: bool = False) -> bytes:
    header: dict[str, Any] = {}
    parts, position = [], 0
    for name, tensor in tensors.items():
        if isinstance(tensor, Raw):
            dtype, shape, data = tensor.dtype, tensor.shape, tensor.data
            size = len(data) if tensor.nbytes is None else tensor.nbytes
        else:
            dtype, shape, data = _NAMES[tensor.dtype.name], tensor.shape, tensor.tobytes()
            size = len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        parts.append(data)
        position += size
    return file_bytes(header, b"" if header_only else b"".join(parts))


def write(
    folder: Path,
    tensors: Mapping[str, Array | Raw],
    config: Mapping[str, Any] | bytes,
    *,
    header_only: bool = False,
    shards: Sequence[Iterable[str]] | None = None,
) -> Path:
    """A checkpoint folder: one file, or one a shard (names of tensors each) with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    if shards is None:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, header_only))
        return folder
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        part = {name: tensors[name] for name in shard}
        (folder / file).write_bytes(safetensors_bytes(part, header_only))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---- packing, one bit after the other ----------------------------------------------------------------------------


def packed_row(codes: Sequence[int], bits: int, padded: bool = False) -> list[int]:
    """Unsigned codes → unsigned 32-bit words, straddled or 32 // bits to a word."""
    words: list[int] = []
    if padded:
        per_word = 32 // bits
        for begin in range(0, len(codes), per_word):
            part = codes[begin : begin + per_word]
            words.append(sum(int(code) << (bits * place) for place, code in enumerate(part)))
        return words
    row = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    count = (len(codes) * bits + 31) // 32
    return [(row >> (32 * word)) & 0xFFFFFFFF for word in range(count)]


def packed(codes: Array, bits: int, padded: bool = False) -> Array:
    """Unsigned codes [R, K] → int32 [R, W]."""
    rows = [packed_row(row.tolist(), bits, padded) for row in codes]
    return np.array(rows, np.uint32).reshape(len(rows), -1).view(np.int32)


def nibbles(codes: Array) -> Array:
    """4-bit codes [R, K] → uint8 [R, K/2], low nibble first."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


def sextets(codes: Array) -> Array:
    """6-bit codes [R, K] → uint8 [R, 3K/4]: four codes in three bytes, low byte first."""
    rows = []
    for row in codes:
        row_bytes: list[int] = []
        for a, b, c, d in row.astype(int).reshape(-1, 4).tolist():
            row_bytes += (a | b << 6 | c << 12 | d << 18).to_bytes(3, "little")
        rows.append(row_bytes)
    return np.array(rows, np.uint8)


# ---- stored modules ------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A module as a producer stores it: tensors by suffix, the `weights` of its group, its float64 values."""

    tensors: dict[str, Array]
    weights: dict[str, Any] | None
    values: Array

    def under(self, module: str) -> dict[str, Array]:
        return {f"{module}.{suffix}": tensor for suffix, tensor in self.tensors.items()}


def spread(blocks: Array, rows: int, columns: int, block: tuple[int, int]) -> Array:
    """One value a block → one value a weight."""
    n, k = np.arange(rows) // block[0], np.arange(columns) // block[1]
    return blocks[np.ix_(n, k)]


def integers(
    rows: int,
    columns: int,
    bits: int,
    group: int | None = None,
    asymmetric: bool = False,
    *,
    tensor: bool = False,
    plain: bool = False,
    padded: bool = False,
    dtype: Any = BF16,
    seed: int = 0,
) -> Stored:
    """Integers in groups of `group` columns, a scale a row (None) or one for the `tensor`; `plain`: not packed."""
    random = np.random.default_rng(seed)
    low = -(1 << (bits - 1))
    codes = random.integers(low, -low, (rows, columns))
    block = (rows, columns) if tensor else (1, group or columns)
    counts = (-(-rows // block[0]), -(-columns // block[1]))
    scale = random.uniform(0.01, 0.02, counts).astype(dtype)
    zero = random.integers(low, -low, counts) if asymmetric else np.zeros(counts, np.int64)
    values = (codes - spread(zero, rows, columns, block)) * spread(scale.astype(np.float64), rows, columns, block)
    tensors: dict[str, Array] = {"weight_scale": scale}
    if plain:
        tensors["weight"] = codes.astype(np.int8)
    else:
        tensors["weight_packed"] = packed(codes - low, bits, padded)
        tensors["weight_shape"] = np.array([rows, columns])
    if asymmetric:
        along_rows = packed((zero - low).T, bits, padded).T.copy()
        tensors["weight_zero_point"] = zero.astype(np.int8) if plain or tensor else along_rows
    weights = {"num_bits": bits, "type": "int", "symmetric": not asymmetric}
    weights |= {"strategy": "tensor" if tensor else "channel" if group is None else "group"}
    return Stored(tensors, weights | ({"group_size": group} if group else {}), values)


def fp8(rows: int, columns: int, block: tuple[int, int] | None = None, *, seed: int = 0) -> Stored:
    """E4M3 with a float32 scale a row, or a block."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(E4M3)
    size = block or (1, columns)
    scale = random.uniform(0.01, 0.02, (-(-rows // size[0]), -(-columns // size[1]))).astype(np.float32)
    values = weight.astype(np.float64) * spread(scale.astype(np.float64), rows, columns, size)
    weights: dict[str, Any] = {"num_bits": 8, "type": "float"}
    weights |= {"strategy": "block", "block_structure": list(block)} if block else {"strategy": "channel"}
    return Stored({"weight": weight, "weight_scale": scale}, weights, values)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(rows: int, columns: int, *, seed: int = 0) -> Stored:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (rows, columns))
    scale = random.uniform(1, 400, (rows, columns // 16)).astype(E4M3)
    divisor = np.array([3e4], np.float32)
    values = FP4[codes] * spread(scale.astype(np.float64), rows, columns, (1, 16)) / float(divisor[0])
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    weights["scale_dtype"] = "torch.float8_e4m3fn"
    tensors = {"weight_packed": nibbles(codes), "weight_scale": scale, "weight_global_scale": divisor}
    return Stored(tensors, weights, values)


def mx(rows: int, columns: int, bits: int, *, seed: int = 0) -> Stored:
    """MXFP4, MXFP6 or MXFP8: groups of 32 under a power of two."""
    random = np.random.default_rng(seed)
    exponents = random.integers(118, 124, (rows, columns // 32)).astype(np.uint8)
    codes = random.integers(0, 1 << bits, (rows, columns))
    weights = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32}
    weights["scale_dtype"] = "torch.uint8"
    tensors: dict[str, Array] = {"weight_scale": exponents}
    if bits == 4:
        tensors["weight_packed"], numbers = nibbles(codes), FP4[codes]
    elif bits == 6:
        exponent, mantissa = codes >> 3 & 3, codes & 7
        magnitude = np.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * 2.0 ** (exponent - 1))
        tensors["weight_packed"], numbers = sextets(codes), np.where(codes >= 32, -magnitude, magnitude)
    else:
        weight = random.standard_normal((rows, columns)).astype(E4M3)
        tensors["weight"], numbers = weight, weight.astype(np.float64)
    values = numbers * spread(2.0 ** (exponents - 127.0), rows, columns, (1, 32))
    return Stored(tensors, weights, values)


def dense(rows: int, columns: int, dtype: Any = BF16, *, seed: int = 0) -> Stored:
    weight = (np.random.default_rng(seed).standard_normal((rows, columns)) / 8).astype(dtype)
    return Stored({"weight": weight}, None, weight.astype(np.float64))


# ---- a small Llama ---------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

PROJECTIONS: dict[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.0.self_attn.v_proj": (32, 64),
    "model.layers.0.self_attn.o_proj": (64, 64),
    "model.layers.0.mlp.gate_proj": (96, 64),
    "model.layers.0.mlp.up_proj": (96, 64),
    "model.layers.0.mlp.down_proj": (64, 96),
}
HEAD = (40, 64)


def llama(quantization: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The small Llama's config.json."""
    config = copy.deepcopy(LLAMA) | changes
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def block(weights: Mapping[str, Any] | None, targets: Sequence[str] = ("Linear",), **more: Any) -> dict[str, Any]:
    """A quantization_config of one group; `inputs` are its input_activations, the rest goes to the top level."""
    group = {"targets": list(targets), "weights": weights, "input_activations": more.pop("inputs", None)}
    return {"quant_method": "compressed-tensors", "version": "0.19.0", "config_groups": {"group_0": group}, **more}


def llama_tensors(**modules: Stored | None) -> dict[str, Array]:
    """Every tensor of the small Llama, dense bfloat16 but for `modules` by last name (None: not stored)."""
    ones = np.ones(64, BF16)
    tensors = {
        "model.embed_tokens.weight": dense(*HEAD, seed=1).tensors["weight"],
        "model.norm.weight": ones,
        "model.layers.0.input_layernorm.weight": ones,
        "model.layers.0.post_attention_layernorm.weight": ones,
    }
    for seed, (name, shape) in enumerate({**PROJECTIONS, "lm_head": HEAD}.items()):
        last = name.rpartition(".")[2]
        stored = modules[last] if last in modules else dense(*shape, seed=10 + seed)
        if stored is not None:
            tensors |= stored.under(name)
    return tensors
