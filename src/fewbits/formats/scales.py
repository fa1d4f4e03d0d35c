"""Scales as files hold them, brought to the shape of their blocks and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import CheckpointError
from fewbits.qweight import QWeight
from fewbits.spec import WeightSpec

Array = NDArray[Any]

_CODES_AT_ONCE = 1 << 22

# Bit patterns of the positive, finite values of a dtype, in their order: from the first to before the second.
_POSITIVE = {
    "float32": (1, 0x7F800000),
    "bfloat16": (1, 0x7F80),
    "float16": (1, 0x7C00),
    "float8_e4m3fn": (1, 0x7F),
    "float8_e8m0fnu": (0, 0xFF),
}


def fits(shape: tuple[int, ...], spec: WeightSpec, weight: tuple[int, int]) -> bool:
    """Whether a stored scale of `shape` can belong to a weight of shape `weight`: `[]`, `[N]`, `[N, 1]`… by count."""
    blocks = spec.blocks_of(weight)
    squeezed = tuple(size for size in shape if size != 1)
    return squeezed == tuple(size for size in blocks if size != 1)


def normalise(scale: Array, spec: WeightSpec, weight: tuple[int, int]) -> Array:
    """The scale in the shape [ceil(N/rows), ceil(K/columns)]."""
    return scale.reshape(spec.blocks_of(weight))


def positive(stored: Array, tensor: str) -> float:
    """The one number of a scale for a whole tensor. It and its reciprocal must be positive and finite in float32.

    Raises CheckpointError scale-invalid, naming the tensor.
    """
    values = stored.real.astype(np.float64).reshape(-1)
    if values.size == 1 and not np.iscomplexobj(stored):
        with np.errstate(over="ignore", divide="ignore"):
            scale = np.float32(values[0])
            fine = np.isfinite(scale) and scale > 0 and np.isfinite(np.float32(1) / scale)
        if fine:
            return float(values[0])
    text = f"one positive number is needed, not {values[:4].tolist()}"
    raise CheckpointError("scale-invalid", text, module=tensor)


def check(weight: QWeight, module: str, suffix: str) -> None:
    """Every scale must be positive and finite; zero is allowed over blocks whose every value is zero.

    Raises CheckpointError scale-invalid, naming the tensor and the first bad block.
    """
    assert weight.scale is not None
    if _all_positive(weight.scale):
        return
    with np.errstate(over="ignore"):  # a float64 scale beyond float32 is as bad as an infinite one
        scale = weight.scale.astype(np.float32)
    bad = ~np.isfinite(scale) | (scale < 0)
    if not bad.any():
        empty = scale == 0
        if not empty.any():
            return
        bad = _over_values(weight, empty)
        if not bad.any():
            return
    row, column = (int(index[0]) for index in np.nonzero(bad))
    raise CheckpointError(
        "scale-invalid",
        f"the scale of block [{row}, {column}] is {float(scale[row, column])}",
        module=f"{module}.{suffix}",
        details=(f"found: {int(bad.sum())} such scales of {scale.size}",),
        hint="the file is damaged, or was written from a model that had overflowed; quantize it again",
    )


def _all_positive(scale: Array) -> bool:
    """Whether all are positive and finite; False, too, for a dtype that this isn't seen of at once."""
    if scale.dtype.name not in _POSITIVE or scale.size == 0:
        return False
    first, end = _POSITIVE[scale.dtype.name]
    bits = scale.view(f"u{scale.itemsize}")
    return bool(bits.min() >= first and bits.max() < end)


def _over_values(weight: QWeight, empty: Array) -> Array:
    """Which of the `empty` blocks (bool, of the scale's shape) hold a value other than zero."""
    height = weight.spec.block_of(weight.shape)[0]
    step = max(1, _CODES_AT_ONCE // max(height * weight.shape[1], 1))
    found = np.zeros_like(empty)
    for begin in range(0, len(empty), step):
        if empty[begin : begin + step].any():
            rows = weight.rows(begin * height, min((begin + step) * height, weight.shape[0]))
            found[begin : begin + step] = _blocks_with_values(rows)
    return found & empty


def _blocks_with_values(weight: QWeight) -> Array:
    """bool of the scale's shape: blocks that hold a value other than zero."""
    spec = weight.spec
    codes = weight.unpacked()
    if spec.kind == "float":
        nonzero = (codes & ((1 << (spec.bits - 1)) - 1)) != 0
    else:
        zero = np.uint8(1 << (spec.bits - 1)) if weight.zero is None else weight.spread(weight.zero)
        nonzero = codes != zero
    rows, columns = spec.block_of(weight.shape)
    nonzero = np.logical_or.reduceat(nonzero, np.arange(0, weight.shape[0], rows), axis=0)
    return np.logical_or.reduceat(nonzero, np.arange(0, weight.shape[1], columns), axis=1)
