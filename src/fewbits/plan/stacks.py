"""Experts stacked in tensors [E, N, …]: cut along the first axis, so that a format only ever sees one expert's module.

    <parent>.<projection>      weight [E, N, K], weight_scale [E, N], input_scale [E] or []
    <parent>[e].<projection>   weight [N, K],    weight_scale [N],    input_scale []

or as tensors <parent>.<projection>, <parent>.<projection>_bias, … without a dot before what they are of it.

The first axis of a tensor is E iff the weight's is: a scale [E, N] can't be taken for one of [E, N] blocks, nor [E] for
a scale a row. One number alone, and `weight_shape`, hold for all experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fewbits.checkpoint.files import TensorInfo

_WEIGHTS = ("weight", "weight_packed", "blocks")

# What the names of tensors end with that belong to a stack whose parts have no dots, as gpt-oss (`gate_up_proj_blocks`)
# and engines (`w13_weight_scale`) write them.
_ENDINGS = {
    f"_{suffix}": suffix
    for suffix in """blocks scales bias weight weight_packed weight_scale weight_zero_point weight_shape
    weight_global_scale input_scale input_zero_point input_global_scale""".split()
}


class Stack(NamedTuple):
    """One stacked module of so many `experts`.

    `tensors`: suffix → (name of the tensor, whether experts have parts of it). `first` is what the first expert alone
    would be stored as; all are alike. `problem` is (code, text). `transposed`: each expert's weight is stored [K, N].
    """

    module: str
    experts: int
    tensors: dict[str, tuple[str, bool]]
    first: dict[str, TensorInfo]
    problem: tuple[str, str] | None
    transposed: bool = False

    @property
    def block(self) -> str:
        """The module that holds the experts, and their router."""
        return self.module.rpartition(".")[0].removesuffix(".experts")

    def row(self, expert: int) -> str:
        parent, _, projection = self.module.rpartition(".")
        return f"{parent}[{expert}].{projection}"

    def as_stored_transposed(self, shape: tuple[int | None, ...]) -> Stack:
        """The same stack, if its weights are plain floats, stored [K, N] for a `shape` of [N, K]."""
        weight = self.first.get("weight")
        if weight is None or weight.shape[::-1] != shape or "weight_scale" in self.first:
            return self
        turned = weight._replace(shape=weight.shape[::-1])
        return self._replace(first=self.first | {"weight": turned}, transposed=True)


def holds_experts(name: str, weight: TensorInfo | None) -> bool:
    """Whether the weight of a module (or a tensor that is called like one) is a stack of experts'."""
    return weight is not None and len(weight.shape) >= 3 and (".experts" in name or ".moe." in name)


def weight_of(stored: Mapping[str, TensorInfo]) -> TensorInfo | None:
    return next((stored[suffix] for suffix in _WEIGHTS if suffix in stored), None)


def of_module(name: str, stored: Mapping[str, TensorInfo]) -> Stack:
    """A module whose weight has an axis of experts."""
    return _cut(name, {suffix: (f"{name}.{suffix}", info) for suffix, info in stored.items()})


def of_tensors(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> list[Stack]:
    """Of tensors whose names don't end like a module's: a weight without `.weight` behind its name, as transformers 5
    stores `experts.gate_up_proj`, and what is stored beside it.
    """
    found: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for name in names:
        if ".experts" not in name and ".moe." not in name:
            continue
        ending = max((ending for ending in _ENDINGS if name.endswith(ending)), key=len, default="")
        suffix = _ENDINGS.get(ending, "weight")
        found.setdefault(name.removesuffix(ending), {})[suffix] = (name, tensors[name])
    return [
        _cut(module, stored)
        for module, stored in found.items()
        if holds_experts(module, weight_of({suffix: info for suffix, (_, info) in stored.items()}))
    ]


def _cut(module: str, stored: Mapping[str, tuple[str, TensorInfo]]) -> Stack:
    weight = weight_of({suffix: info for suffix, (_, info) in stored.items()})
    assert weight is not None
    count = weight.shape[0]
    tensors, first, problem = {}, {}, None
    for suffix, (name, info) in stored.items():
        one_for_all = math.prod(info.shape) == 1 or (suffix == "weight_shape" and len(info.shape) == 1)
        has_parts = info.shape[:1] == (count,) and not (one_for_all and count != 1)
        if not one_for_all and not has_parts:
            shape = list(info.shape)
            text = f"{suffix} has shape {shape}, which doesn't begin with the {count} experts of {list(weight.shape)}"
            problem = problem or ("tensors-disagree", text)
        if has_parts and count and info.nbytes % count:
            text = f"{suffix} {info.dtype} {list(info.shape)} has experts that end inside of a byte"
            problem = problem or ("tensors-disagree", text)
        tensors[suffix] = (name, has_parts)
        first[suffix] = info.part(0) if has_parts and count else info._replace(shape=info.shape[has_parts:])
    return Stack(module, count, tensors, first, problem)
