"""Fixtures in the storage formats that compressed-tensors has dropped: the bitmask formats and marlin-24.

Owns the rows, and what they make of a folder that today's tools have written: its tensors go through the version of
the library that stored them so (tools/fixture_libraries.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fixture_libraries import compress
from fixture_models import LLAMA_MARLIN, LLAMA_MICRO_24, LLAMA_MICRO_PRUNED
from fixture_table import HEAD, Fixture, Recipe, integer, one

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Sparse(Fixture):
    """`storage` names the format, `library` the version of compressed-tensors that writes it."""

    storage: str = "sparse-bitmask"
    numbers: bool = False

    def before(self, minor: int) -> bool:
        """Whether the library is older than 0.`minor`."""
        return int(self.library.split(".")[1]) < minor

    def store(self, tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
        """The folder's tensors and config.json as that version writes them."""
        # Up to 0.8 every tensor was compressed, whatever it was.
        modules = [] if self.before(9) else [name.removesuffix(".weight") for name in tensors if _projection(name)]
        stored, sparsity = compress(self.library, self.storage, tensors, modules, None)
        block = config.pop("quantization_config", None) or {}
        block |= {"sparsity_config": sparsity}
        if self.before(6):
            return stored, config | {"compression_config": block}
        block |= {"quant_method": "compressed-tensors", "version": self.library}
        return stored, config | {"quantization_config": block}


def _projection(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


@dataclass(frozen=True)
class Marlin(Sparse):
    """Of weights that were saved uncompressed beside their scales, packed for the kernel."""

    def store(self, tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
        block = config["quantization_config"]
        [group] = block["config_groups"].values()
        modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
        keys = ("num_bits", "type", "symmetric", "strategy", "group_size")
        arguments = {key: group["weights"][key] for key in keys}
        stored, _ = compress(self.library, self.storage, tensors, modules, arguments)
        block |= {"format": self.storage, "version": self.library, "quantization_status": "compressed"}
        group["format"] = self.storage
        return stored, config


SPARSE = (
    Sparse(
        "old-sparse-bitmask-whole-model",
        "bfloat16; every tensor of the model as name.bitmask, norms too",
        LLAMA_MICRO_PRUNED,
        library="0.5.0",
    ),
    Sparse(
        "old-sparse-bitmask-w4a16-whole-model",
        "packed weights; every tensor as name.bitmask, weight_shape too",
        LLAMA_MICRO_PRUNED,
        one(integer(4, group_size=16), ignore=HEAD),
        library="0.8.1",
    ),
    Sparse(
        "old-sparse-bitmask-fp8",
        "FP8 per channel, weights as module.bitmask",
        LLAMA_MICRO_PRUNED,
        Recipe(preset="FP8_DYNAMIC", ignore=HEAD),
        library="0.9.3",
    ),
    Sparse(
        "old-sparse-24-bitmask",
        "bfloat16, two of four values",
        LLAMA_MICRO_24,
        library="0.10.2",
        storage="sparse-24-bitmask",
    ),
    Sparse(
        "old-sparse-24-bitmask-fp8",
        "FP8 per channel, two of four values",
        LLAMA_MICRO_24,
        Recipe(preset="FP8_DYNAMIC", ignore=HEAD),
        library="0.10.2",
        storage="sparse-24-bitmask",
    ),
    Marlin(
        "old-marlin-24",
        "a GPU kernel's own layout",
        LLAMA_MARLIN,
        one(integer(4, "channel"), ignore=HEAD, compress=False),
        library="0.9.3",
        refused="format-refused",
        storage="marlin-24",
    ),
)
