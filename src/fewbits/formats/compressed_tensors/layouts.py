"""The storage formats of compressed-tensors, in a table: which tensors make a module so stored, and who reads them.

A layout is found from the tensors that are there, never from the number of bits. Headers alone are enough for
`inspect` (headers.py); `decode` gets the arrays (decoding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbits.formats.compressed_tensors.decoding import (
    decode_dense,
    decode_fp4,
    decode_fp6,
    decode_packed,
    decode_plain,
)
from fewbits.formats.compressed_tensors.headers import (
    Version,
    dense_shape,
    float_says,
    packed_float_shape,
    packed_says,
    packed_shape,
    plain_says,
    plain_shape,
)
from fewbits.formats.resolved import Arrays, StoredModule, Warn
from fewbits.formats.stored import DENSE_DTYPES, Tensors, dense_spec
from fewbits.qweight import QWeight
from fewbits.spec import WeightSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """`suffixes` are claimed where present. `holds(tensors)`: whether a module is stored so. `shape(module, spec)`
    gives [N, K], a dense tensor's own shape, or raises Mismatch. `spec(module, version)`: what the tensors alone
    say, None where they leave it open. `decode`'s last argument is the writer's version too: it tells the packing
    where widths don't.
    """

    name: str
    suffixes: tuple[str, ...]
    holds: Callable[[Tensors], bool]
    shape: Callable[[StoredModule, WeightSpec], tuple[int, ...]]
    spec: Callable[[StoredModule, Version], WeightSpec | None]
    decode: Callable[[str, WeightSpec, tuple[int, int], Arrays, Warn, Version], QWeight]


_SCALE = ("weight_scale",)
_ZERO = ("weight_zero_point",)

# In this order: the first layout whose tensors are there is the one.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "pack-quantized",
        ("weight_packed", *_SCALE, *_ZERO, "weight_shape", "weight_g_idx"),
        lambda tensors: "weight_packed" in tensors and tensors["weight_packed"].dtype == "I32",
        packed_shape,
        packed_says,
        decode_packed,
    ),
    Layout(
        "mxfp6-pack-quantized",
        ("weight_packed", *_SCALE),
        lambda tensors: _is_packed_float(tensors) and _six_bits(tensors),
        packed_float_shape(6),
        float_says,
        decode_fp6,
    ),
    Layout(
        "fp4-pack-quantized",
        ("weight_packed", *_SCALE, "weight_global_scale"),
        lambda tensors: _is_packed_float(tensors),
        packed_float_shape(4),
        float_says,
        decode_fp4,
    ),
    Layout(
        "naive-quantized",
        ("weight", *_SCALE, *_ZERO, "weight_g_idx"),
        lambda tensors: "weight_scale" in tensors and _dtype(tensors, "weight") in ("I8", "F8_E4M3"),
        plain_shape,
        plain_says,
        decode_plain,
    ),
    Layout(
        "dense",
        ("weight",),
        lambda tensors: _dtype(tensors, "weight") in DENSE_DTYPES,
        dense_shape,
        lambda module, version: dense_spec(module.tensors),
        decode_dense,
    ),
)


def _dtype(tensors: Tensors, suffix: str) -> str:
    return tensors[suffix].dtype if suffix in tensors else ""


def _is_packed_float(tensors: Tensors) -> bool:
    return _dtype(tensors, "weight_packed") == "U8" and "weight_scale" in tensors


def _six_bits(tensors: Tensors) -> bool:
    packed, scale = tensors["weight_packed"].shape, tensors["weight_scale"].shape
    return len(packed) == 2 == len(scale) and packed[1] == scale[1] * 24 and "weight_global_scale" not in tensors


def layout_of(tensors: Tensors) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.holds(tensors)), None)
