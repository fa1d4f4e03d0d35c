"""What a user may ask of activations that a checkpoint leaves unquantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fewbits.formats.resolved import ModuleKind, Resolved
from fewbits.spec import ActSpec, QuantSpec

Activations = Literal["stored", "int8"]

_GROUP = 128  # columns of x that share a scale, where the weight's own groups say nothing
_SMALLEST = 32  # of the weight's groups that x takes over: each costs a scale and a multiplication
_WORD = 8  # a group is whole words of packed codes
_NOTICE = (
    "as asked: integer weights are multiplied with activations quantized to int8, which the checkpoint doesn't say"
)


def with_int8(resolved: Resolved, kind: ModuleKind) -> Resolved:
    """The module with its input quantized to int8 per token and group, if its weights are integers in groups or
    rows and the checkpoint leaves its input as it is, and a notice of that; else `resolved` itself.
    """
    weight = resolved.spec.weight
    integers = weight.quantized and weight.kind != "float" and bool(weight.bits)
    if kind not in ("linear", "head", "expert") or not integers or weight.act_order or resolved.spec.act is not None:
        return resolved
    columns = weight.block[1]
    group = columns if columns >= _SMALLEST and columns % _WORD == 0 else _GROUP
    act = ActSpec("int", 8, "group", True, group)
    decided_by = f"{resolved.decided_by}, activations as asked"
    notices = (("activations-asked", _NOTICE), *resolved.notices)
    return replace(resolved, spec=QuantSpec(weight, act), decided_by=decided_by, notices=notices)
