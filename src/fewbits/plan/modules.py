"""Tensors grouped into modules, and the kind of a module that no family names: from names and dimensions alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fewbits.checkpoint.files import TensorInfo
from fewbits.formats.resolved import ModuleKind

# What the name of a tensor may end with, behind the name of its module.
_SUFFIXES = frozenset(
    """weight bias weight_packed weight_scale weight_zero_point weight_shape weight_g_idx weight_global_scale
    input_scale input_zero_point input_global_scale output_scale output_zero_point
    bitmask compressed row_offsets shape meta scale_packed""".split()
)
_SPARSE = ("bitmask", "compressed", "row_offsets", "shape")

Modules = dict[str, dict[str, TensorInfo]]


def group(tensors: Mapping[str, TensorInfo], apart: Iterable[str]) -> tuple[Modules, list[str]]:
    """Module → suffix → tensor, and the tensors whose names end like no module's. Those in `apart` are left out."""
    modules: Modules = {}
    loose = []
    skipped = set(apart)
    for name, info in tensors.items():
        if name in skipped:
            continue
        module, _, suffix = name.rpartition(".")
        if suffix in _SPARSE and module.endswith(".weight"):  # the sparse files of 2024: <module>.weight.bitmask
            module, suffix = module.removesuffix(".weight"), f"weight.{suffix}"
        if module and (suffix in _SUFFIXES or suffix.startswith("weight.")):
            modules.setdefault(module, {})[suffix] = info
        else:
            loose.append(name)
    return modules, loose


def expert_parents(tensors: Iterable[str]) -> set[str]:
    """Modules that hold experts: their `gate` is a router."""
    return {name.partition(".experts.")[0] for name in tensors if ".experts." in name}


def kind_of(name: str, tensors: Mapping[str, TensorInfo], parents: set[str]) -> ModuleKind:
    """The kind of a module that no family names, from its name and its tensors' dimensions."""
    last = name.rpartition(".")[2]
    weight = tensors.get("weight") or tensors.get("weight_packed")
    dimensions = len(weight.shape) if weight is not None else 0
    if ".experts." in f"{name}.":
        return "expert"
    if last in ("lm_head", "output"):
        return "head"
    if last in ("embed_tokens", "wte", "tok_embeddings"):
        return "embedding"
    if last in ("gate", "router") and dimensions == 2 and name.rpartition(".")[0] in parents:
        return "router"
    if dimensions == 1 and "weight" in tensors:
        return "norm"
    if dimensions == 2:
        return "linear"
    if dimensions > 2:
        return "conv"
    return "linear" if "compressed" in tensors or "weight.compressed" in tensors else "other"
