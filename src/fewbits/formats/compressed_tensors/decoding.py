"""A module's arrays, as the storage formats have them, in canonical form. Source: compressed_tensors/compressors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint.files import DTYPES
from fewbits.errors import CheckpointError
from fewbits.formats import packing, scales, values
from fewbits.formats.blocks import decoded
from fewbits.formats.compressed_tensors.config import E8M0
from fewbits.formats.compressed_tensors.headers import DENSE_SINCE, Version
from fewbits.formats.resolved import Arrays, Warn
from fewbits.qweight import QWeight, pack_nibbles
from fewbits.spec import WHOLE, WeightSpec

Array = NDArray[Any]


def _scale(arrays: Arrays, spec: WeightSpec, shape: tuple[int, int]) -> Array:
    scale = arrays["weight_scale"]
    if spec.scale_dtype == E8M0:
        scale = scale.view(DTYPES["F8_E8M0"][1])
    return scales.normalise(scale, spec, shape)


def _zero_point(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, padded: bool
) -> tuple[WeightSpec, Array | None]:
    """Zero points as offset-binary codes, and the spec they make: constant ones at the middle are symmetric."""
    blocks = spec.blocks_of(shape)
    middle = 1 << (spec.bits - 1)
    stored = arrays.get("weight_zero_point")
    if stored is None:
        # compressed-tensors 0.9.3 and older dropped a zero point that was zero everywhere.
        zero = np.full(blocks, middle, np.uint8) if spec.zero_point == "integer" else None
        return spec, zero
    if stored.dtype == np.int32 and "weight_packed" in arrays and spec.block[0] == 1:
        height, as_dense = stored.shape[0], packing.words_dense(blocks[0], spec.bits)
        if as_dense == packing.words_padded(blocks[0], spec.bits):
            as_padded = padded
        else:
            as_padded = height != as_dense
        zero = packing.unpack(np.ascontiguousarray(stored.T), spec.bits, blocks[0], as_padded).T.copy()
    else:
        signed = stored.reshape(blocks).astype(np.int64) + middle
        if signed.min(initial=0) < 0 or signed.max(initial=0) >= 2 * middle:
            raise CheckpointError(
                "code-range", f"zero points outside of {spec.bits} bits", module=f"{module}.weight_zero_point"
            )
        zero = signed.astype(np.uint8)
    if spec.zero_point == "integer":
        return spec, zero
    if (zero == middle).all():
        return spec, None
    warn(
        "zero-point-kept",
        "the config says symmetric, but the stored zero points are not zero; they are applied",
    )
    return replace(spec, kind="uint", zero_point="integer"), zero


def _input_order(module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays) -> Array | None:
    """Stored column → input column when g_idx really permutes, None where it is absent, unset or plain."""
    g_idx = arrays.get("weight_g_idx")
    if g_idx is None:
        return None
    size = spec.block_of(shape)[1]
    plain = np.arange(shape[1]) // size
    if (g_idx == -1).any() or (g_idx == plain).all():
        return None
    groups = shape[1] // size
    if g_idx.min() < 0 or g_idx.max() >= groups or (np.bincount(g_idx, minlength=groups) != size).any():
        raise CheckpointError(
            "act-order-invalid",
            f"doesn't give each of the {groups} groups {size} columns",
            module=f"{module}.weight_g_idx",
        )
    return np.argsort(g_idx, kind="stable").astype(np.int64)


def decode_packed(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    words = arrays["weight_packed"]
    stored = arrays.get("weight_shape")
    if stored is not None and tuple(stored.tolist()[-2:]) != shape:
        text = f"weight_shape says {stored.tolist()}, the other tensors {list(shape)}"
        if spec.block[1] != WHOLE:
            text += f" in groups of {spec.block[1]}"
        raise CheckpointError("tensors-disagree", text, module=module)
    rows, columns = shape
    width = packing.words_dense(columns, spec.bits)
    padded = words.shape[1] != width
    if width == packing.words_padded(columns, spec.bits):
        padded = (0,) < version < DENSE_SINCE
    spec, zero = _zero_point(module, spec, shape, arrays, warn, padded)
    if spec.bits == 4 and "weight_g_idx" not in arrays:  # as it is stored
        row_bytes = (columns + 1) // 2
        codes = decoded(words, lambda rows, _: np.ascontiguousarray(rows).view(np.uint8)[:, :row_bytes])
        return QWeight(spec, shape, codes, _scale(arrays, spec, shape), zero)

    def unpacked(rows: Array, begin: int) -> Array:
        return packing.unpack(rows, spec.bits, columns, padded)

    return _integers_in_order(module, spec, shape, arrays, words, unpacked, zero)


def _integers_in_order(
    module: str,
    spec: WeightSpec,
    shape: tuple[int, int],
    arrays: Arrays,
    stored: Array,
    unpack: Callable[[Array, int], Array],
    zero: Array | None,
) -> QWeight:
    """Codes [N, K], with their columns sorted by group where an activation order is stored.

    `unpack(rows, index of the first)` gives codes one a byte.
    """
    perm = _input_order(module, spec, shape, arrays)

    def in_order(rows: Array, begin: int) -> Array:
        codes = unpack(rows, begin)
        if perm is not None:
            codes = codes[:, perm]
        return pack_nibbles(codes) if spec.bits == 4 else codes

    ordered = replace(spec, act_order=perm is not None)
    return QWeight(ordered, shape, decoded(stored, in_order), _scale(arrays, spec, shape), zero, perm=perm)


def decode_plain(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    weight = arrays["weight"]
    if spec.kind == "float":
        if "weight_zero_point" in arrays and arrays["weight_zero_point"].astype(np.float32).any():
            text = "is not zero, and float weights have no zero point"
            raise CheckpointError("tensors-disagree", text, module=f"{module}.weight_zero_point")
        codes = values.float8_codes(weight, spec, f"{module}.weight")
        return QWeight(spec, shape, codes, _scale(arrays, spec, shape))
    middle = 1 << (spec.bits - 1)

    def offset_binary(rows: Array, begin: int) -> Array:
        if spec.bits < 8 and rows.size and (rows.min() < -middle or rows.max() >= middle):
            raise CheckpointError("code-range", f"holds values outside of {spec.bits} bits", module=f"{module}.weight")
        return rows.astype(np.int8, copy=False).view(np.uint8) + np.uint8(middle)

    spec, zero = _zero_point(module, spec, shape, arrays, warn, padded=False)
    return _integers_in_order(module, spec, shape, arrays, weight, offset_binary, zero)


def decode_fp4(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    codes = decoded(arrays["weight_packed"], lambda rows, _: rows.view(np.uint8))
    global_scale = None
    if spec.global_scale:
        global_scale = 1.0 / scales.positive(arrays["weight_global_scale"], f"{module}.weight_global_scale")
    return QWeight(spec, shape, codes, _scale(arrays, spec, shape), global_scale=global_scale)


def decode_fp6(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    codes = decoded(arrays["weight_packed"], lambda rows, _: packing.unpack_sextets(rows.view(np.uint8), shape[1]))
    return QWeight(spec, shape, codes, _scale(arrays, spec, shape))


def decode_dense(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    return values.dense_weight(arrays["weight"], spec, shape, f"{module}.weight")
