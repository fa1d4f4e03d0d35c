"""The storage formats of compressed-tensors: which tensors make a module, what they weigh, how they decode.

A layout is found from the tensors that are there, never from the number of bits. Everything in `inspect` uses
headers alone; `decode` gets the arrays. Source: compressed_tensors/compressors/*/base.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import CheckpointError
from fewbits.formats import packing, scales
from fewbits.formats.compressed_tensors.config import E8M0
from fewbits.formats.resolved import Arrays, StoredModule, Warn
from fewbits.qweight import QWeight, pack_nibbles
from fewbits.spec import WHOLE, WeightSpec, dense

Array = NDArray[Any]
Tensors = dict[str, TensorInfo]
Version = tuple[int, ...]  # of compressed-tensors; (0,) where the file doesn't say

DENSE_DTYPES = ("BF16", "F16", "F32", "F64")
_DENSE_SINCE = (0, 18)  # from this version on 3, 5, 6 and 7 bits are packed without padding

FLOAT_DTYPES = (*DENSE_DTYPES, "F8_E4M3", "F8_E5M2")


class Mismatch(Exception):
    """The tensors can't hold what the spec says; the text says how they differ."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`suffixes` are claimed where present. `holds(tensors)`: whether a module is stored so. `shape(module, spec)`
    gives [N, K] or raises Mismatch. `spec(module, version)`: what the tensors alone say, None where they leave it
    open. `decode`'s last argument is the writer's version too: it tells the packing where widths don't.
    """

    name: str
    suffixes: tuple[str, ...]
    holds: Callable[[Tensors], bool]
    shape: Callable[[StoredModule, WeightSpec], tuple[int, int]]
    spec: Callable[[StoredModule, Version], WeightSpec | None]
    decode: Callable[[str, WeightSpec, tuple[int, int], Arrays, Warn, Version], QWeight]


# ---- headers ---------------------------------------------------------------------------------------------------


def _two(tensors: Tensors, suffix: str) -> tuple[int, int]:
    shape = tensors[suffix].shape
    if len(shape) != 2:
        raise Mismatch(f"{suffix} has {len(shape)} dimensions")
    return shape[0], shape[1]


def with_scale_dtype(tensors: Tensors, spec: WeightSpec) -> WeightSpec:
    """The spec with the scale's dtype as stored, uint8 being E8M0. Raises Mismatch for what can't be its scale."""
    dtype = tensors["weight_scale"].dtype
    if dtype in ("U8", "F8_E8M0"):
        # Some writers don't say it: floats in groups of 32 with such a scale are MX all the same.
        fits = spec.scale_dtype == E8M0 or (spec.kind == "float" and spec.block == (1, 32))
    else:
        fits = spec.scale_dtype != E8M0 and dtype in (*DENSE_DTYPES, "F8_E4M3")
    if not fits:
        raise Mismatch(f"weight_scale is {dtype}, which doesn't fit {spec}")
    return replace(spec, scale_dtype=E8M0 if dtype == "U8" else DTYPES[dtype][1].name)


def _check_scale(tensors: Tensors, spec: WeightSpec, shape: tuple[int, int]) -> None:
    stored = tensors["weight_scale"].shape
    rows, columns = spec.block
    if columns not in (WHOLE,) and rows == 1 and shape[1] % columns:
        raise Mismatch(f"{shape[1]} columns don't divide into groups of {columns}")
    if not scales.fits(stored, spec, shape):
        raise Mismatch(
            f"weight_scale has shape {list(stored)}, {spec} of {list(shape)} needs {list(spec.blocks_of(shape))}"
        )


def _columns_of(module: StoredModule, spec: WeightSpec, rows: int, width: int, unit: int) -> int:
    """K of a packed weight of `width` units of `unit` bits: from the scale's columns, the family, weight_shape."""
    tensors = module.tensors
    group = spec.block[1]
    blocks = tensors["weight_scale"].shape
    if group != WHOLE and len(blocks) == 2 and spec.block[0] == 1:
        return blocks[1] * group
    widths = {packing.words_dense, packing.words_padded} if unit == 32 else set()
    if module.expected and any(count(module.expected[1], spec.bits) == width for count in widths):
        return module.expected[1]
    return _stored_columns(module) or width * unit // spec.bits


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


def _check_width(width: int, columns: int, bits: int) -> None:
    dense_width, padded = packing.words_dense(columns, bits), packing.words_padded(columns, bits)
    if width not in (dense_width, padded):
        text = f"{dense_width}" if dense_width == padded else f"{dense_width} (or {padded}, padded)"
        raise Mismatch(f"weight_packed is {width} words wide, {columns} columns of {bits} bits take {text}")


def _packed_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
    tensors = module.tensors
    if spec.kind == "float":
        raise Mismatch(f"weight_packed is int32, which holds integers, not {spec.number}")
    rows, width = _two(tensors, "weight_packed")
    _check_weight_shape(tensors)
    shape = (rows, _columns_of(module, spec, rows, width, 32))
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


def _plain_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
    tensors = module.tensors
    shape = _two(tensors, "weight")
    dtype = tensors["weight"].dtype
    if (dtype == "F8_E4M3") != (spec.kind == "float") or (dtype == "F8_E4M3" and spec.bits != 8):
        raise Mismatch(f"weight is {dtype}, which doesn't hold {spec.number}")
    _check_scale(tensors, spec, shape)
    _check_zero_point(tensors, spec, shape)
    _check_g_idx(tensors, shape)
    return shape


def _packed_float_shape(bits: int) -> Callable[[StoredModule, WeightSpec], tuple[int, int]]:
    def shape_of(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
        if spec.kind != "float" or spec.bits != bits:
            raise Mismatch(f"weight_packed is uint8, which holds fp{bits} here, not {spec.number}")
        rows, width = _two(module.tensors, "weight_packed")
        shape = (rows, width * 8 // bits)
        if width * 8 % bits:
            raise Mismatch(f"weight_packed is {width} bytes wide, which is no whole number of {bits}-bit codes")
        _check_scale(module.tensors, spec, shape)
        divisor = module.tensors.get("weight_global_scale")
        if spec.global_scale and divisor is None:
            raise Mismatch("weight_global_scale is missing")
        if divisor is not None and (divisor.shape not in ((), (1,)) or divisor.dtype not in DENSE_DTYPES):
            raise Mismatch(f"weight_global_scale is {divisor.dtype} {list(divisor.shape)}, not one number")
        return shape

    return shape_of


def _dense_shape(module: StoredModule, spec: WeightSpec) -> tuple[int, int]:
    shape = module.tensors["weight"].shape
    if len(shape) == 2:
        return shape[0], shape[1]
    return (shape[0] if shape else 1, int(np.prod(shape[1:], dtype=np.int64)))


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


def _packed_says(module: StoredModule, version: Version) -> WeightSpec | None:
    """Bits and block of a packed integer weight that no group explains: they need the unpacked K."""
    tensors = module.tensors
    rows, width = _two(tensors, "weight_packed")
    columns = _stored_columns(module)
    if columns is None and module.expected:
        columns = module.expected[1]
    if not columns:
        return None
    packings = [packing.words_dense] if version >= _DENSE_SINCE else [packing.words_padded]
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


def _plain_says(module: StoredModule, version: Version) -> WeightSpec | None:
    tensors = module.tensors
    rows, columns = _two(tensors, "weight")
    block = _group_of(tensors["weight_scale"].shape, rows, columns)
    if block is None:
        return None
    if tensors["weight"].dtype == "F8_E4M3":
        e8m0 = tensors["weight_scale"].dtype == "U8"
        return WeightSpec("float", 8, block, E8M0 if e8m0 else "", exponent=4, mantissa=3)
    if tensors["weight"].dtype != "I8":
        return None
    return _integers(tensors, 8, block)


def _float_says(module: StoredModule, version: Version) -> WeightSpec | None:
    tensors = module.tensors
    _, width = _two(tensors, "weight_packed")
    columns = tensors["weight_scale"].shape[-1] if tensors["weight_scale"].shape else 0
    if "weight_global_scale" in tensors:
        return WeightSpec("float", 4, (1, 16), "", exponent=2, mantissa=1, global_scale=True)
    if columns and width == columns * 16:
        return WeightSpec("float", 4, (1, 32), E8M0, exponent=2, mantissa=1)
    if columns and width == columns * 24:
        return WeightSpec("float", 6, (1, 32), E8M0, exponent=2, mantissa=3)
    return None


def dense_spec(module: StoredModule, version: Version = (0,)) -> WeightSpec | None:
    """The spec of `weight` where it is a float of 16 bits or more, else None."""
    info = module.tensors.get("weight")
    if info is None or info.dtype not in DENSE_DTYPES:
        return None
    return dense(DTYPES[info.dtype][1].name)


# ---- data ------------------------------------------------------------------------------------------------------


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
    if stored.dtype == np.int32:
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


def _decode_packed(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    words = arrays["weight_packed"]
    stored = arrays.get("weight_shape")
    if stored is not None and tuple(stored.tolist()[-2:]) != shape:
        raise CheckpointError(
            "tensors-disagree",
            f"weight_shape says {stored.reshape(-1).tolist()}, the other tensors {list(shape)}",
            module=module,
        )
    rows, columns = shape
    width = packing.words_dense(columns, spec.bits)
    padded = words.shape[1] != width
    if width == packing.words_padded(columns, spec.bits):
        padded = (0,) < version < _DENSE_SINCE
    spec, zero = _zero_point(module, spec, shape, arrays, warn, padded)
    if spec.bits == 4 and "weight_g_idx" not in arrays:  # as it is stored
        codes = np.ascontiguousarray(words).view(np.uint8)[:, : (columns + 1) // 2]
        return QWeight(spec, shape, codes, _scale(arrays, spec, shape), zero)
    codes = packing.unpack(words, spec.bits, columns, padded)
    return _integers_in_order(module, spec, shape, arrays, codes, zero)


def _integers_in_order(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, codes: Array, zero: Array | None
) -> QWeight:
    """Codes one a byte, [N, K], with their columns sorted by group where an activation order is stored."""
    perm = _input_order(module, spec, shape, arrays)
    if perm is not None:
        codes = codes[:, perm]
    if spec.bits == 4:
        codes = pack_nibbles(codes)
    spec = replace(spec, act_order=perm is not None)
    return QWeight(spec, shape, codes, _scale(arrays, spec, shape), zero, perm=perm)


def _decode_plain(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    weight = arrays["weight"]
    if spec.kind == "float":
        if (weight.view(np.uint8) & 0x7F == 0x7F).any():
            raise CheckpointError("weight-nan", "holds NaN codes", module=f"{module}.weight")
        if "weight_zero_point" in arrays and arrays["weight_zero_point"].astype(np.float32).any():
            text = "is not zero, and float weights have no zero point"
            raise CheckpointError("tensors-disagree", text, module=f"{module}.weight_zero_point")
        return QWeight(spec, shape, weight.view(np.uint8), _scale(arrays, spec, shape))
    middle = 1 << (spec.bits - 1)
    if spec.bits < 8 and weight.size and (weight.min() < -middle or weight.max() >= middle):
        raise CheckpointError("code-range", f"holds values outside of {spec.bits} bits", module=f"{module}.weight")
    spec, zero = _zero_point(module, spec, shape, arrays, warn, padded=False)
    codes = weight.astype(np.int8, copy=False).view(np.uint8) + np.uint8(middle)
    return _integers_in_order(module, spec, shape, arrays, codes, zero)


def _decode_fp4(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    codes = arrays["weight_packed"].view(np.uint8)
    global_scale = None
    if spec.global_scale:
        divisor = float(arrays["weight_global_scale"].astype(np.float64).reshape(-1)[0])
        if not divisor > 0 or not np.isfinite(divisor):
            raise CheckpointError(
                "scale-invalid", f"the global scale is {divisor}", module=f"{module}.weight_global_scale"
            )
        global_scale = 1.0 / divisor
    return QWeight(spec, shape, codes, _scale(arrays, spec, shape), global_scale=global_scale)


def _decode_fp6(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    packed = arrays["weight_packed"].view(np.uint8)
    triples = packed.reshape(shape[0], -1, 3).astype(np.uint32)
    words = triples[:, :, 0] | triples[:, :, 1] << 8 | triples[:, :, 2] << 16
    codes = (words[:, :, None] >> np.array([0, 6, 12, 18], np.uint32)) & np.uint32(63)
    return QWeight(spec, shape, codes.reshape(shape).astype(np.uint8), _scale(arrays, spec, shape))


def _decode_dense(
    module: str, spec: WeightSpec, shape: tuple[int, int], arrays: Arrays, warn: Warn, version: Version
) -> QWeight:
    weight = arrays["weight"].reshape(shape)
    return QWeight(spec, shape, weight.view(np.uint16) if spec.bits == 16 else weight)


_SCALE = ("weight_scale",)
_ZERO = ("weight_zero_point",)

# In this order: the first layout whose tensors are there is the one.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "pack-quantized",
        ("weight_packed", *_SCALE, *_ZERO, "weight_shape", "weight_g_idx"),
        lambda tensors: "weight_packed" in tensors and tensors["weight_packed"].dtype == "I32",
        _packed_shape,
        _packed_says,
        _decode_packed,
    ),
    Layout(
        "mxfp6-pack-quantized",
        ("weight_packed", *_SCALE),
        lambda tensors: _is_packed_float(tensors) and _six_bits(tensors),
        _packed_float_shape(6),
        _float_says,
        _decode_fp6,
    ),
    Layout(
        "fp4-pack-quantized",
        ("weight_packed", *_SCALE, "weight_global_scale"),
        lambda tensors: _is_packed_float(tensors),
        _packed_float_shape(4),
        _float_says,
        _decode_fp4,
    ),
    Layout(
        "naive-quantized",
        ("weight", *_SCALE, *_ZERO, "weight_g_idx"),
        lambda tensors: "weight_scale" in tensors and _dtype(tensors, "weight") in ("I8", "F8_E4M3"),
        _plain_shape,
        _plain_says,
        _decode_plain,
    ),
    Layout(
        "dense",
        ("weight",),
        lambda tensors: _dtype(tensors, "weight") in DENSE_DTYPES,
        _dense_shape,
        dense_spec,
        _decode_dense,
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
