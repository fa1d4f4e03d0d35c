"""Tensors grouped into modules, and the kind of a module that no family names: from names and dimensions alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fewbits.checkpoint.files import TensorInfo
from fewbits.formats.resolved import ModuleKind

# What the name of a tensor may end with, behind the name of its module; each as the one object for all of them.
_SUFFIXES = {
    suffix: suffix
    for suffix in """weight bias weight_packed weight_scale weight_zero_point weight_shape weight_g_idx
    weight_global_scale input_scale input_zero_point input_global_scale output_scale output_zero_point
    weight_scale_2 weight_zero_point_2 input_scale_2 input_zero_point_2 input_rotation input_prescale
    meta scale_packed qweight qzeros qqzeros scales qscales""".split()
}
# Files of 2024 have any tensor in parts: <module>.weight.bitmask, <module>.bias.bitmask
_SPARSE = frozenset(("bitmask", "compressed", "row_offsets", "shape"))
# As many dimensions as the module's weight.
_WEIGHTS = ("weight", "weight_packed", "qweight", "bitmask", "weight.bitmask", "weight_packed.bitmask")

Modules = dict[str, dict[str, TensorInfo]]


def group(tensors: Mapping[str, TensorInfo]) -> tuple[Modules, list[str]]:
    """Module → suffix → tensor, and the tensors whose names end like no module's."""
    modules: Modules = {}
    loose = []
    last, stored = "", {}  # most tensors follow others of their module
    for name, info in tensors.items():
        module, _, end = name.rpartition(".")
        suffix = _SUFFIXES.get(end)
        if suffix is None:
            owner, _, whole = module.rpartition(".")
            if end in _SPARSE and owner and (whole in _SUFFIXES or whole in _SPARSE):
                module, suffix = owner, f"{whole}.{end}"
            elif end in _SPARSE:
                suffix = end
        if not module or suffix is None:
            loose.append(name)
            continue
        if module != last:
            last, stored = module, modules.setdefault(module, {})
        stored[suffix] = info
    return modules, loose


def expert_parents(names: Iterable[str]) -> set[str]:
    """Modules that hold experts: their `gate` is a router."""
    return {name.partition(".experts.")[0] for name in names if ".experts." in name}


def kind_of(name: str, tensors: Mapping[str, TensorInfo], parents: set[str]) -> ModuleKind:
    """The kind of a module that no family names, from its name and its tensors' dimensions."""
    if ".experts." in name or name.endswith(".experts"):
        return "expert"
    last = name.rpartition(".")[2]
    weight = next((tensors[suffix] for suffix in _WEIGHTS if suffix in tensors), None)
    dimensions = len(weight.shape) if weight is not None else 0
    if last in ("lm_head", "output"):
        return "head"
    if last in ("embed_tokens", "wte", "tok_embeddings"):
        return "embedding"
    if last in ("gate", "router") and dimensions == 2 and name.rpartition(".")[0] in parents:
        return "router"
    if dimensions == 1 and "weight_packed" not in tensors:
        return "norm"
    if dimensions == 2:
        return "linear"
    if dimensions > 2:
        return "conv"
    return "other"
