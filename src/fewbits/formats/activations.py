"""The stored scales and zero points of a module's input: which a scheme needs, and their values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint.files import TensorInfo
from fewbits.errors import CheckpointError
from fewbits.formats import scales
from fewbits.formats.resolved import Arrays, Warn
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import ActSpec

SUFFIXES = ("input_scale", "input_zero_point", "input_global_scale")


def needed(act: ActSpec | None) -> str | None:
    """The stored scale that a static activation scheme can't do without."""
    if act is None:
        return None
    if act.global_scale:
        return "input_global_scale"
    return None if act.dynamic else "input_scale"


def unused(tensors: dict[str, TensorInfo], act: ActSpec | None) -> str | None:
    """What to say of stored scales that the scheme has no use for."""
    scale = needed(act)
    used = (scale, "input_zero_point") if scale == "input_scale" else (scale,)
    left = [suffix for suffix in SUFFIXES if suffix in tensors and suffix not in used]
    if not left:
        return None
    why = "activations aren't quantized" if act is None else f"{act} activations have no use for it"
    return f"{', '.join(left)} stored, but {why}"


def with_input_scales(
    module: str, weight: QWeight, act: ActSpec | None, bias: NDArray[Any] | None, arrays: Arrays, warn: Warn
) -> QLinear:
    """The projection with its own static input scale, zero point or global scale (a multiplier)."""
    suffix = needed(act)
    if act is None or suffix is None:
        return QLinear(weight, act, bias)
    scale = scales.positive(arrays[suffix], f"{module}.{suffix}")
    if act.global_scale:
        return QLinear(weight, act, bias, input_global_scale=1.0 / scale)
    zero = _zero_point(module, act, arrays.get("input_zero_point"))
    if zero and act.symmetric:
        warn("zero-point-kept", "the config says symmetric inputs, but input_zero_point isn't zero; it is applied")
        act = replace(act, symmetric=False)
    return QLinear(weight, act, bias, input_scale=scale, input_zero=None if act.symmetric else zero)


def _zero_point(module: str, act: ActSpec, stored: NDArray[Any] | None) -> int:
    """A signed integer; old writers dropped one that was zero."""
    if stored is None:
        return 0
    name = f"{module}.input_zero_point"
    if act.kind == "float":
        if stored.astype(np.float32).any():
            raise CheckpointError("tensors-disagree", "is not zero, and float inputs have no zero point", module=name)
        return 0
    if stored.size != 1 or stored.dtype not in (np.int8, np.int32, np.int64) or not -128 <= int(stored.item()) < 128:
        text = f"one integer of 8 bits is needed, not {stored.dtype} {list(stored.shape)}"
        raise CheckpointError("code-range", text, module=name)
    return int(stored.item())
