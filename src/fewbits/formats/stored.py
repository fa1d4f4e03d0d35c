"""What any format says of a module as it is stored: that it is dense, incomplete, or doesn't fit."""

from __future__ import annotations

import math

from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.formats.resolved import Resolved, StoredModule
from fewbits.spec import QuantSpec, WeightSpec, dense

Tensors = dict[str, TensorInfo]

DENSE_DTYPES = ("BF16", "F16", "F32", "F64")
_OPEN = WeightSpec("float", 0)  # of modules whose tensors don't tell


class Mismatch(Exception):
    """The tensors can't hold what the spec says; the text says how they differ."""


def two(tensors: Tensors, suffix: str) -> tuple[int, int]:
    """The shape of a tensor that must have two dimensions."""
    shape = tensors[suffix].shape
    if len(shape) != 2:
        raise Mismatch(f"{suffix} has {len(shape)} dimensions")
    return shape[0], shape[1]


def dense_spec(tensors: Tensors) -> WeightSpec | None:
    """The spec of `weight` where it is a float of 16 bits or more, else None."""
    info = tensors.get("weight")
    if info is None or info.dtype not in DENSE_DTYPES:
        return None
    return dense(DTYPES[info.dtype][1].name)


def check_groups(spec: WeightSpec, columns: int) -> None:
    """Blocks of several rows may be ragged, groups may not."""
    rows, group = spec.block
    if rows == 1 and group and columns % group:
        raise Mismatch(f"{columns} columns don't divide into groups of {group}")


def present(module: StoredModule, *groups: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(suffix for group in groups for suffix in group if suffix in module.tensors))


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[N, K] of any dense tensor: a vector is a column."""
    return (shape[0] if shape else 1, math.prod(shape[1:]))


def module_dtype(tensors: Tensors) -> str:
    """The dtype a quantized module computes in: that of its scales where these are floats of 16 bits or more."""
    stored = DTYPES[tensors["weight_scale"].dtype][1].name
    return stored if stored in ("bfloat16", "float16", "float32") else ""


def failed(module: StoredModule, layout: str, error: tuple[str, str]) -> Resolved:
    shape = _rough_shape(module)
    return Resolved(QuantSpec(_OPEN), shape, "", layout, "", tuple(module.tensors), (), error)


def incomplete(module: StoredModule) -> Resolved:
    found = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in sorted(module.tensors.items()))
    weight = module.tensors.get("weight")
    if weight is not None and weight.dtype not in DENSE_DTYPES and "weight_scale" not in module.tensors:
        text = f"{weight.dtype} weights without weight_scale: no scale has a default (stored: {found})"
    else:
        text = f"its tensors make no weight that fewbits knows (stored: {found})"
    return failed(module, "", ("module-incomplete", text))


def _rough_shape(module: StoredModule) -> tuple[int, int]:
    for suffix in ("weight", "weight_packed", "bitmask", "weight.bitmask"):
        if suffix in module.tensors:
            shape = module.tensors[suffix].shape
            return (shape[0] if shape else 1, shape[-1] if len(shape) > 1 else 1)
    return (0, 0)
