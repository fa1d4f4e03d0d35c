"""Checkpoints that today's library no longer writes, derived from ones that it did write.

Owns: one function per older or damaged spelling. Each changes the tensors and the config of a tiny fixture in
place, and the decoded weights only where the meaning changes. Sources: the history of compressed-tensors.
Its own old versions decode the results to the same bytes: 0.17.1 the padded packing and the group indices,
0.9.3 the unpacked zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from fixture_models import generator

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
WORD_BITS = 32


@dataclass(frozen=True)
class Rewrite:
    """One rewritten fixture: its source in the table, and the change, whose docstring explains it."""

    name: str
    source: str
    note: str
    apply: Callable[[Tensors, Config, Tensors], None]


def settings(config: Config) -> Config:
    """The quantization config, where the present library puts it."""
    found: Config = config["quantization_config"]
    return found


def packed_modules(tensors: Tensors) -> Iterator[str]:
    """Names of the pack-quantized modules."""
    for name in sorted(tensors):
        if name.endswith(".weight_packed"):
            yield name.removesuffix(".weight_packed")


def module_bits(tensors: Tensors, module: str) -> int:
    """Bits of a code, from the width of the dense packing."""
    columns = int(tensors[f"{module}.weight_shape"][1])
    return tensors[f"{module}.weight_packed"].shape[1] * WORD_BITS // columns


def codes_of(tensors: Tensors, module: str) -> torch.Tensor:
    """Signed codes [N, K] int8 of a packed module."""
    shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
    return unpack_from_int32(tensors[f"{module}.weight_packed"], module_bits(tensors, module), shape)


def zero_points_of(tensors: Tensors, module: str) -> torch.Tensor:
    """Signed zero points [N, groups] int8 of a packed asymmetric module."""
    rows = int(tensors[f"{module}.weight_shape"][0])
    shape = torch.Size((rows, tensors[f"{module}.weight_scale"].shape[1]))
    bits = module_bits(tensors, module)
    return unpack_from_int32(tensors[f"{module}.weight_zero_point"], bits, shape, packed_dim=0).contiguous()


def compression_config(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The block stands under compression_config, status frozen, without version and per-group formats, with
    a sparsity_config that says dense: as files of 2024 have it."""
    block = config.pop("quantization_config")
    for key in ("version", "transform_config"):
        block.pop(key, None)
    for group in block["config_groups"].values():
        del group["format"]
        for key in ("actorder", "scale_dtype", "zp_dtype"):
            group["weights"].pop(key, None)
        group["weights"]["observer"] = "minmax"
    block["quantization_status"] = "frozen"
    block["global_compression_ratio"] = 1.4589
    block["sparsity_config"] = {
        "format": "dense",
        "global_sparsity": 0.1358,
        "ignore": [],
        "registry_requires_subclass": False,
        "sparsity_structure": "unstructured",
        "targets": [],
    }
    config["compression_config"] = block


def compression_config_nested(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The block stands one level deeper, compression_config.quantization_config, beside sparsity_config."""
    compression_config(tensors, config, decoded)
    block = config["compression_config"]
    sparsity = block.pop("sparsity_config")
    config["compression_config"] = {"quantization_config": block, "sparsity_config": sparsity}


def text_config_only(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The block stands in text_config and nowhere else, as in multimodal checkpoints; the model's own keys
    are in both places."""
    block = config.pop("quantization_config")
    config["text_config"] = dict(config) | {"quantization_config": block}


def unpacked_zero_points(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """Zero points as compressed-tensors 0.9.3 and older wrote them: int8 [N, groups], not packed, and absent
    where all are zero. Those of k_proj are set to zero to have one such module: its weight changes."""
    settings(config)["version"] = "0.9.3"
    for module in packed_modules(tensors):
        tensors[f"{module}.weight_zero_point"] = zero_points_of(tensors, module)
    module = "model.layers.0.self_attn.k_proj"
    del tensors[f"{module}.weight_zero_point"]
    decoded[f"{module}.weight"] = grouped(codes_of(tensors, module), tensors[f"{module}.weight_scale"])


def grouped(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes - zero point) x scale in the scale's dtype, the library's formula, with the group of each column
    from g_idx, or in order."""
    columns = codes.shape[1]
    if g_idx is None:
        g_idx = torch.arange(columns) // (columns // scale.shape[1])
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype)[:, g_idx]
    return (values * scale[:, g_idx]).contiguous()


def padded(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, count] uint8 in int32 words [rows, ceil(count / per word)], 32 // bits to a word, from the
    lowest bits up; no code straddles two words."""
    per_word = WORD_BITS // bits
    rows, count = codes.shape
    words = -(-count // per_word)
    filled = np.zeros((rows, words * per_word), np.uint64)
    filled[:, :count] = codes
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    packed = (filled.reshape(rows, words, per_word) << shifts).sum(axis=2, dtype=np.uint64)
    return packed.astype(np.uint32).view(np.int32)


def padded_packing(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """Packing as compressed-tensors 0.17 and older did it: 32 // bits codes to a word, which differs for 3,
    5, 6 and 7 bits, in the weights along K and in the zero points along N."""
    settings(config)["version"] = "0.17.1"
    for module in packed_modules(tensors):
        bits = module_bits(tensors, module)
        offset = 1 << (bits - 1)
        codes = codes_of(tensors, module).numpy().astype(np.int16) + offset
        zeros = zero_points_of(tensors, module).numpy().astype(np.int16) + offset
        tensors[f"{module}.weight_packed"] = torch.from_numpy(padded(codes, bits))
        tensors[f"{module}.weight_zero_point"] = torch.from_numpy(padded(zeros.T, bits).T.copy())


def activation_order(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """Activation order with group indices, compressed-tensors 0.18 and older: actorder "group" and a random
    weight_g_idx [K] int32 that puts as many columns in each group as before. The codes stay, so weights get
    the scale and zero point of other groups: decoded again with (code - zero point) x scale at g_idx."""
    block = settings(config)
    block["version"] = "0.12.2"
    for group in block["config_groups"].values():
        group["weights"]["actorder"] = "group"
    for module in packed_modules(tensors):
        scale = tensors[f"{module}.weight_scale"]
        codes = codes_of(tensors, module)
        columns, groups = codes.shape[1], scale.shape[1]
        order = generator("g_idx", module).permutation(columns)
        g_idx = torch.from_numpy((order // (columns // groups)).astype(np.int32))
        zero_point = zero_points_of(tensors, module) if f"{module}.weight_zero_point" in tensors else None
        tensors[f"{module}.weight_g_idx"] = g_idx
        decoded[f"{module}.weight"] = grouped(codes, scale, zero_point, g_idx.long())


def preset_list(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """A config group that is a list: its key is the preset's name, the list its targets. Besides, all-zero
    int8 zero points that older writers stored for symmetric weights."""
    block = settings(config)
    block["version"] = "0.8.1"
    block["config_groups"] = {"W8A8": ["Linear"]}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        zero_point = name.removesuffix("scale") + "zero_point"
        tensors[zero_point] = torch.zeros_like(tensors[name], dtype=torch.int8)


def channel_scale_vector(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """Channel scales stored [N] instead of [N, 1], as converters do."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name][:, 0].contiguous()


def tensor_scale_scalar(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """Tensor scales without dimensions for the weights, [1, 1] for the inputs, as converters do."""
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name] = tensors[name].reshape(())
        if name.endswith(".input_scale"):
            tensors[name] = tensors[name].reshape(1, 1)


def cache_scale_of_projection(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """KV-cache scales as compressed-tensors 0.5 and older named them: output_scale of k_proj and v_proj."""
    settings(config)["version"] = "0.5.0"
    for name in [name for name in tensors if name.endswith(("self_attn.k_scale", "self_attn.v_scale"))]:
        attention, _, letter = name.removesuffix("_scale").rpartition(".")
        tensors[f"{attention}.{letter}_proj.output_scale"] = tensors.pop(name)


def head_ignored(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The head is stored quantized although ignore names it: config and tensors disagree."""
    settings(config)["ignore"] = ["lm_head"]


def head_no_target(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The head is stored quantized although no target matches it."""
    for group in settings(config)["config_groups"].values():
        group["targets"] = ["re:.*_proj$"]


def head_dense_no_target(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The head is stored dense, no target matches it and ignore doesn't name it (the library's own saves list
    such a head in ignore)."""
    head_no_target(tensors, config, decoded)
    settings(config)["ignore"] = []


def head_dense_though_targeted(tensors: Tensors, config: Config, decoded: Tensors) -> None:
    """The head is stored dense although a target matches it and ignore doesn't name it."""
    settings(config)["ignore"] = []


ASYM = "tiny-w4a16-asym-g16-head"
SYM = "tiny-w4a16-sym-g16"
REWRITES = (
    Rewrite("old-compression-config", ASYM, "config under compression_config, status frozen", compression_config),
    Rewrite(
        "old-compression-config-nested",
        ASYM,
        "config under compression_config.quantization_config",
        compression_config_nested,
    ),
    Rewrite("text-config-only", ASYM, "config under text_config only", text_config_only),
    Rewrite(
        "old-unpacked-zero-points",
        ASYM,
        "int8 zero points [N, groups]; k_proj has none",
        unpacked_zero_points,
    ),
    Rewrite(
        "old-unpacked-zero-points-channel",
        "tiny-w4a16-asym-channel-head",
        "int8 zero points [N, 1]; k_proj has none",
        unpacked_zero_points,
    ),
    Rewrite(
        "old-padded-packing",
        "tiny-wna16-every-width-asym-g16-head",
        "32 // bits codes to a word",
        padded_packing,
    ),
    Rewrite("old-g-idx-asym", ASYM, "activation order with weight_g_idx, asymmetric", activation_order),
    Rewrite("old-g-idx-sym", SYM, "activation order with weight_g_idx, symmetric; head ignored", activation_order),
    Rewrite(
        "old-preset-list",
        "tiny-w8a8-dynamic-head",
        "config group given as a list; all-zero zero points stored",
        preset_list,
    ),
    Rewrite("scale-shape-n", "tiny-fp8-dynamic-head", "channel scales [N]", channel_scale_vector),
    Rewrite("scale-shape-scalar", "tiny-fp8-static-head", "tensor scales [] and [1, 1]", tensor_scale_scalar),
    Rewrite(
        "old-kv-output-scale",
        "tiny-w8a8-kv-fp8",
        "KV scales named k_proj.output_scale",
        cache_scale_of_projection,
    ),
    Rewrite("head-packed-though-ignored", ASYM, "packed head in ignore", head_ignored),
    Rewrite("head-packed-no-target", ASYM, "packed head that no target matches", head_no_target),
    Rewrite("head-dense-no-target", SYM, "dense head that no target matches", head_dense_no_target),
    Rewrite("head-dense-though-targeted", SYM, "dense head that a target matches", head_dense_though_targeted),
)
