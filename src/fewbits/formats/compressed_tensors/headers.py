"""What the headers of a module's tensors say: whether they can hold a spec, with which [N, K], or which spec alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fewbits.checkpoint.files import DTYPES
from fewbits.formats import packing, scales
from fewbits.formats.compressed_tensors.config import E8M0
from fewbits.formats.resolved import StoredModule
from fewbits.formats.stored import DENSE_DTYPES, Mismatch, Tensors, check_groups, two
from fewbits.spec import WHOLE, WeightSpec

Version = tuple[int, ...]  # of compressed-tensors; (0,) where the file doesn't say

DENSE_SINCE = (0, 18)  # from this version on 3, 5, 6 and 7 bits are packed without padding


def with_stored_scales(tensors: Tensors, spec: WeightSpec) -> WeightSpec:
    """The spec with its scales as stored: their dtype, uint8 being E8M0, and a global one under NVFP4 even where the
    config says plain groups, as the owner's library has it. Raises Mismatch for what can't be its scale.
    """
    dtype = tensors["weight_scale"].dtype
    if dtype in ("U8", "F8_E8M0"):
        # Some writers don't say it: floats in groups of 32 with such a scale are MX all the same.
        fits = spec.scale_dtype == E8M0 or (spec.kind == "float" and spec.block == (1, 32))
    else:
        fits = spec.scale_dtype != E8M0 and dtype in (*DENSE_DTYPES, "F8_E4M3")
    if not fits:
        raise Mismatch(f"weight_scale is {dtype}, which doesn't fit {spec}")
    fp4 = (spec.kind, spec.bits, spec.block) == ("float", 4, (1, 16))
    return replace(
        spec,
        scale_dtype=E8M0 if dtype == "U8" else DTYPES[dtype][1].name,
        global_scale=spec.global_scale or (fp4 and "weight_global_scale" in tensors),
    )


def _check_scale(tensors: Tensors, spec: WeightSpec, shape: tuple[int, int]) -> None:
    stored = tensors["weight_scale"].shape
    check_groups(spec, shape[1])
    if not scales.fits(stored, spec, shape):
        raise Mismatch(
            f"weight_scale has shape {list(stored)}, {spec} of {list(shape)} needs {list(spec.blocks_of(shape))}"
        )


def _columns_of(module: StoredModule, spec: WeightSpec, width: int) -> int:
    """K of a packed weight of `width` words: from the scale's columns, the family, weight_shape."""
    tensors = module.tensors
    group = spec.block[1]
    blocks = tensors["weight_scale"].shape
    if group != WHOLE and len(blocks) == 2 and spec.block[0] == 1:
        return blocks[1] * group
    return _known_columns(module, spec, width) or width * 32 // spec.bits


def _known_columns(module: StoredModule, spec: WeightSpec, width: int) -> int | None:
    """K as the family or weight_shape has it."""
    if module.expected and _fits_width(width, module.expected[1], spec.bits):
        return module.expected[1]
    return _stored_columns(module)


def _stored_columns(module: StoredModule) -> int | None:
    """K by weight_shape, None where it isn't stored or has no data. Raises Mismatch where it is no shape."""
    _check_weight_shape(module.tensors)
    stored = module.peek("weight_shape") if "weight_shape" in module.tensors else None
    if stored is None:
        return None
    if not 0 <= stored[-1] < 1 << 40:
        raise Mismatch(f"weight_shape says {stored.tolist()}")
    return int(stored[-1])


def _check_weight_shape(tensors: Tensors) -> None:
    info = tensors.get("weight_shape")
    if info is not None and (info.dtype not in ("I64", "I32") or info.shape not in ((2,), (3,))):
        raise Mismatch(f"weight_shape is {info.dtype} {list(info.shape)}, not [N, K]")


def _fits_width(width: int, columns: int, bits: int) -> bool:
    return width in (packing.words_dense(columns, bits), packing.words_padded(columns, bits))


def _check_width(width: int, columns: int, bits: int) -> None:
    dense_width, padded = packing.words_dense(columns, bits), packing.words_padded(columns, bits)
    if not _fits_width(width, columns, bits):
        text = f"{dense_width}" if dense_width == padded else f"{dense_width} (or {padded}, padded)"
        raise Mismatch(f"weight_packed is {width} words wide, {columns} columns of {bits} bits take {text}")


def packed_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
    tensors = module.tensors
    if spec.kind == "float":
        raise Mismatch(f"weight_packed is int32, which holds integers, not {spec.number}")
    rows, width = two(tensors, "weight_packed")
    _check_weight_shape(tensors)
    shape = (rows, _columns_of(module, spec, width))
    if not _fits_width(width, shape[1], spec.bits) or (module.expected and module.expected[1] != shape[1]):
        # K isn't what the scale's columns make it: perhaps they are too few or too many for it.
        check_groups(spec, _known_columns(module, spec, width) or 0)
    _check_width(width, shape[1], spec.bits)
    _check_scale(tensors, spec, shape)
    _check_zero_point(tensors, spec, shape)
    _check_g_idx(tensors, shape)
    return shape


def _check_g_idx(tensors: Tensors, shape: tuple[int, int]) -> None:
    info = tensors.get("weight_g_idx")
    if info is not None and (info.shape != (shape[1],) or info.dtype not in ("I32", "I64")):
        raise Mismatch(f"weight_g_idx is {info.dtype} {list(info.shape)}, not {shape[1]} integers")


def _check_zero_point(tensors: Tensors, spec: WeightSpec, shape: tuple[int, int]) -> None:
    if "weight_zero_point" not in tensors:
        return
    info = tensors["weight_zero_point"]
    if spec.kind != "float" and info.dtype not in ("I8", "I16", "I32", "I64"):
        raise Mismatch(f"weight_zero_point is {info.dtype}, not integers")
    rows, columns = spec.blocks_of(shape)
    if info.dtype == "I32" and "weight_packed" in tensors and spec.block[0] == 1:
        heights = {packing.words_dense(rows, spec.bits), packing.words_padded(rows, spec.bits)}
        if len(info.shape) != 2 or info.shape[0] not in heights or info.shape[1] != columns:
            raise Mismatch(
                f"weight_zero_point has shape {list(info.shape)}, packed along {rows} rows it needs "
                f"{[min(heights), columns]}"
            )
    elif not scales.fits(info.shape, spec, shape):
        raise Mismatch(f"weight_zero_point has shape {list(info.shape)}, its scale {[rows, columns]}")


def plain_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
    tensors = module.tensors
    shape = two(tensors, "weight")
    dtype = tensors["weight"].dtype
    if (dtype == "F8_E4M3") != (spec.kind == "float") or (dtype == "F8_E4M3" and spec.bits != 8):
        raise Mismatch(f"weight is {dtype}, which doesn't hold {spec.number}")
    _check_scale(tensors, spec, shape)
    _check_zero_point(tensors, spec, shape)
    _check_g_idx(tensors, shape)
    return shape


def packed_float_shape(bits: int) -> Callable[[StoredModule, WeightSpec], tuple[int, int]]:
    def shape_of(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
        if spec.kind != "float" or spec.bits != bits:
            raise Mismatch(f"weight_packed is uint8, which holds fp{bits} here, not {spec.number}")
        rows, width = two(module.tensors, "weight_packed")
        shape = (rows, width * 8 // bits)
        if width * 8 % bits:
            raise Mismatch(f"weight_packed is {width} bytes wide, which is no whole number of {bits}-bit codes")
        _check_scale(module.tensors, spec, shape)
        divisor = module.tensors.get("weight_global_scale")
        if spec.global_scale and divisor is None:
            raise Mismatch("weight_global_scale is missing")
        if divisor is not None and not spec.global_scale:
            raise Mismatch(f"weight_global_scale is stored, and {spec} has none")
        if divisor is not None and (divisor.shape not in ((), (1,)) or divisor.dtype not in DENSE_DTYPES):
            raise Mismatch(f"weight_global_scale is {divisor.dtype} {list(divisor.shape)}, not one number")
        return shape

    return shape_of


def dense_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, ...]:
    return module.tensors["weight"].shape


def _group_of(scale: tuple[int, ...], rows: int, columns: int) -> tuple[int, int] | None:
    """The block that a scale's shape implies for a weight [rows, columns]."""
    count = int(np.prod(scale, dtype=np.int64))
    if count == 1:
        return (WHOLE, WHOLE)
    if count == rows:
        return (1, WHOLE)
    if len(scale) == 2 and scale[0] == rows and scale[1] and columns % scale[1] == 0:
        return (1, columns // scale[1])
    return None


def packed_says(module: StoredModule, version: Version) -> WeightSpec | None:
    """Bits and block of a packed integer weight that no group explains: they need the unpacked K."""
    tensors = module.tensors
    rows, width = two(tensors, "weight_packed")
    columns = _stored_columns(module)
    if columns is None and module.expected:
        columns = module.expected[1]
    if not columns:
        return None
    packings = [packing.words_dense] if version >= DENSE_SINCE else [packing.words_padded]
    if version == (0,):
        packings = [packing.words_dense, packing.words_padded]
    bits = [bit for bit in range(1, 9) if any(words(columns, bit) == width for words in packings)]
    block = _group_of(tensors["weight_scale"].shape, rows, columns)
    if len(bits) != 1 or block is None:
        return None
    return _integers(tensors, bits[0], block)


def _integers(tensors: Tensors, bits: int, block: tuple[int, int]) -> WeightSpec:
    asymmetric = "weight_zero_point" in tensors
    return WeightSpec(
        "uint" if asymmetric else "int",
        bits,
        block,
        scale_dtype="",
        zero_point="integer" if asymmetric else "none",
        act_order="weight_g_idx" in tensors,
    )


def plain_says(module: StoredModule, version: Version) -> WeightSpec | None:
    tensors = module.tensors
    rows, columns = two(tensors, "weight")
    block = _group_of(tensors["weight_scale"].shape, rows, columns)
    if block is None:
        return None
    if tensors["weight"].dtype == "F8_E4M3":
        e8m0 = tensors["weight_scale"].dtype == "U8"
        return WeightSpec("float", 8, block, E8M0 if e8m0 else "", exponent=4, mantissa=3)
    if tensors["weight"].dtype != "I8":
        return None
    return _integers(tensors, 8, block)


def float_says(module: StoredModule, version: Version) -> WeightSpec | None:
    tensors = module.tensors
    _, width = two(tensors, "weight_packed")
    columns = tensors["weight_scale"].shape[-1] if tensors["weight_scale"].shape else 0
    if "weight_global_scale" in tensors:
        return WeightSpec("float", 4, (1, 16), "", exponent=2, mantissa=1, global_scale=True)
    if columns and width == columns * 16:
        return WeightSpec("float", 4, (1, 32), E8M0, exponent=2, mantissa=1)
    if columns and width == columns * 24:
        return WeightSpec("float", 6, (1, 32), E8M0, exponent=2, mantissa=3)
    return None
