"""Which formula quantizes a linear's input: names that the reference and the native kernels share."""

from __future__ import annotations

from typing import Literal, get_args

from fewbits.spec import ActSpec

Formula = Literal[
    "int8_token",
    "int8_token_asymmetric",
    "int8_static",
    "int8_static_asymmetric",
    "int8_group",
    "fp8_token",
    "fp8_static",
    "fp8_group",
    "nvfp4",
    "mxfp4",
    "mxfp6",
    "mxfp6e3m2",
    "mxfp8",
]
FORMULAS: tuple[Formula, ...] = get_args(Formula)


def formula(act: ActSpec) -> Formula | None:
    """The formula for a spec, None where there is no definition."""
    number = (act.kind, act.bits, act.exponent, act.mantissa)
    token = act.dynamic and act.per in ("token", "tensor")
    static = not act.dynamic and act.per == "tensor"
    group = act.dynamic and act.per == "group" and bool(act.group_size)
    shared_exponent = act.scale_dtype == "float8_e8m0fnu"
    if act.kind == "int" and act.bits == 8:
        if static:
            return "int8_static" if act.symmetric else "int8_static_asymmetric"
        if token:
            return "int8_token" if act.symmetric else "int8_token_asymmetric"
        return "int8_group" if group and act.symmetric and not shared_exponent else None
    if not act.symmetric:
        return None
    if number == ("float", 8, 4, 3):
        if token or static:
            return "fp8_token" if token else "fp8_static"
        if group:
            return "mxfp8" if shared_exponent else "fp8_group"
    if group and number == ("float", 4, 2, 1):
        if act.global_scale and not shared_exponent:
            return "nvfp4"
        if shared_exponent and not act.global_scale:
            return "mxfp4"
    if group and shared_exponent and number == ("float", 6, 2, 3):
        return "mxfp6"
    if group and shared_exponent and number == ("float", 6, 3, 2):
        return "mxfp6e3m2"
    return None
