"""Quark's custom modes: its exports under the names of AutoAWQ and of vLLM's FP8, with a config of few keys.

What the tensors hold is what Quark always writes, not what those formats mean: integers of a symmetric "awq" export are
two's complement. An `export` object in the config, which only Quark writes, tells them apart. So the config is read as
the one that it was made from, and the tensors go by Quark's names.
Source: quark/torch/export/constants.py, quark/torch/export/main_export/quant_config_parser.py, 0.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from fewbits.checkpoint.config import Config
from fewbits.errors import FewbitsError
from fewbits.formats.quark.config import QuarkConfig, Scheme, parse, strings
from fewbits.formats.resolved import Arrays, StoredModule

METHODS = ("awq", "fp8")

# Since transformers 5.6 every weight becomes a qweight on saving, norms too; scales and zero points may get a q more.
_NAMES = {
    "qweight": "weight",
    "scales": "weight_scale",
    "qscales": "weight_scale",
    "qzeros": "weight_zero_point",
    "qqzeros": "weight_zero_point",
}


def names(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Quark's own suffix → the one that a module's tensor is stored under; of two for the same thing the first."""
    stored: dict[str, str] = {}
    for suffix in tensors:
        name = _NAMES.get(suffix, suffix)
        stored.setdefault(suffix if name in tensors else name, suffix)
    return stored


def renamed(module: StoredModule) -> tuple[StoredModule, dict[str, str]]:
    """The module with its tensors under Quark's own names, and where they are stored."""
    stored = names(module.tensors)
    tensors = {name: module.tensors[suffix] for name, suffix in stored.items()}
    return module._replace(tensors=tensors, peek=lambda name: module.peek(stored[name])), stored


class Renamed(Mapping[str, NDArray[Any]]):
    """The arrays of a module under Quark's own names."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays, self._stored = arrays, names(arrays)

    def __getitem__(self, suffix: str) -> NDArray[Any]:
        return self._arrays[self._stored[suffix]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def parse_custom(config: Config) -> QuarkConfig:
    """Read a custom mode's block. Raises CheckpointError where its own shape is wrong."""
    try:
        block = (_awq if config.data["quant_method"].lower() == "awq" else _fp8)(config)
        problem = None
    except FewbitsError as error:
        block, problem = {}, (error.code, f"{error.what} ({error.source})")
    config.ignore("quant_method", "export", "version", "pack_method")
    block["export"] = config.data["export"]
    parsed = parse(Config(block, config.source, config.path))
    if problem is not None:
        parsed.everything = Scheme("global_quant_config", None, problem=problem)
        config.ignore(*config.data)
    return replace(parsed, config=config)


def _awq(config: Config) -> dict[str, Any]:
    """Integers in groups, nothing else quantized."""
    config.expect("version", "gemm")
    asymmetric: bool = config.get("zero_point", bool)
    weight = {
        "dtype": f"{'u' if asymmetric else ''}int{config.expect('bits', 4, 8)}",
        "qscheme": "per_group",
        "group_size": config.get("group_size", int),
        "symmetric": not asymmetric,
        "ch_axis": 1,
    }
    whole = {"weight": weight, "input_tensors": None}
    return {"global_quant_config": whole, "exclude": config.get("modules_to_not_convert", list, [])}


def _fp8(config: Config) -> dict[str, Any]:
    """FP8 with one scale for each tensor; those of the KV cache are the outputs of the layers that fill it."""
    number = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    inputs = config.expect("activation_scheme", "static", "dynamic", default=None)
    acts = number | {"is_dynamic": inputs == "dynamic"} if inputs is not None else None
    whole = {"weight": number, "input_tensors": acts}
    block = {"global_quant_config": whole, "exclude": config.get("ignored_layers", list, [])}
    cache = config.expect("kv_cache_scheme", "static", "dynamic", default=None)
    if cache is not None:
        filled = whole | {"output_tensors": number | {"is_dynamic": cache == "dynamic"}}
        export = Config(config.data["export"], config.source, f"{config.path}.export")
        block["layer_quant_config"] = dict.fromkeys(strings(export, "kv_cache_group"), filled)
    return block
