"""How Quark lays out a module's tensors: the shapes that its two exporters give them, and their canonical form.

    integers of 4 and 8 bits and 2-bit ones, in groups    weight transposed: [K, N], packed along N
    all others                                            weight [N, K], packed along K
    scale and zero point of integers in groups            transposed: [K / g, N]
    scale of floats in groups or blocks                   as the weight: [N, K / g]
    one for each row                                      [N]
    one for all                                           [], older [1]

The exporter from file to file transposes integers in groups too, but neither reorders their codes nor transposes their
scale, whatever its config says, and writes no zero point: that is how it is told.
Source: quark/torch/export/nn/modules/realquantizer.py, quark/torch/quantization/file2file_quantization.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint.files import DTYPES
from fewbits.errors import CheckpointError
from fewbits.formats import packing, scales, values
from fewbits.formats.blocks import decoded
from fewbits.formats.quark.config import E8M0, Scheme
from fewbits.formats.quark.numbers import E5M3, NUMBERS, Number, offset_binary
from fewbits.formats.resolved import Arrays, StoredModule, Warn
from fewbits.formats.stored import DENSE_DTYPES, Mismatch, Tensors, check_groups, two
from fewbits.qweight import QWeight, pack_nibbles
from fewbits.spec import WHOLE, QuantSpec, WeightSpec

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """`codes`: the number's name in NUMBERS. `transposed` and `scale_transposed` as in the table above."""

    codes: str
    transposed: bool = False
    scale_transposed: bool = False
    reorder: bool = False

    def __str__(self) -> str:
        return ",".join([self.codes, *(name for name in _FLAGS if getattr(self, name))])


def _plain(codes: str, block: tuple[int, int], **more: Any) -> Scheme:
    number = NUMBERS[codes]
    kind: Any = number.kind
    spec = WeightSpec(kind, number.bits, block, "", exponent=number.exponent, mantissa=number.mantissa)
    return Scheme(codes, QuantSpec(replace(spec, **more)), number)


# What a module may be that no part of the config speaks of: schemes whose tensors are no other's.
PLAIN = (
    _plain("int8", (WHOLE, WHOLE)),
    _plain("int8", (1, WHOLE)),
    _plain("fp8_e4m3", (WHOLE, WHOLE)),
    _plain("fp8_e4m3", (1, WHOLE)),
    _plain("fp8_e4m3", (1, 32), scale_dtype=E8M0),
    _plain("fp6_e2m3", (1, 32), scale_dtype=E8M0),
    _plain("fp4", (1, 32), scale_dtype=E8M0),
    _plain("fp4", (1, 16), scale_dtype="float8_e4m3fn", global_scale=True),
)

_FLAGS = ("transposed", "scale_transposed", "reorder")


def layout_named(name: str) -> Layout:
    """The layout whose str() is `name`."""
    codes, *flags = name.split(",")
    return Layout(codes, **dict.fromkeys(flags, True))


def suffix_of_scale(spec: WeightSpec) -> str:
    """The scale of blocks; in FP8 made of 4-bit integers that of the second stage."""
    return "weight_scale_2" if spec.global_scale and spec.kind != "float" else "weight_scale"


def suffix_of_global(spec: WeightSpec) -> str:
    return "weight_scale" if spec.kind != "float" else "weight_scale_2"


def suffix_of_zero(spec: WeightSpec) -> str:
    return suffix_of_scale(spec).replace("scale", "zero_point")


def fit(module: StoredModule, scheme: Scheme, reorder: bool) -> tuple[Layout, WeightSpec, tuple[int, int]]:
    """How a module is stored, its spec with the scale's dtype, and [N, K]. Raises Mismatch."""
    assert scheme.spec is not None and scheme.number is not None
    number, spec, tensors = scheme.number, scheme.spec.weight, module.tensors
    scale = tensors.get(suffix_of_scale(spec))
    if scale is None:
        raise Mismatch(f"{suffix_of_scale(spec)} is missing")
    if spec.global_scale:
        one = tensors.get(suffix_of_global(spec))
        if one is None:
            raise Mismatch(f"{suffix_of_global(spec)} is missing")
        if one.shape not in ((), (1,)) or one.dtype not in DENSE_DTYPES:
            raise Mismatch(f"{suffix_of_global(spec)} is {one.dtype} {list(one.shape)}, not one number")
    stored = tensors["weight"]
    if stored.dtype != number.dtype:
        raise Mismatch(f"weight is {stored.dtype}, {_name(number)} are stored as {number.dtype}")
    groups = number.kind == "int" and spec.block[0] == 1 and spec.block[1] != WHOLE
    transposed = groups and number.bits != 3
    first, width = two(tensors, "weight")
    if transposed:
        # [K / g, N], or from file to file [N, K / g]
        rows = [size for size in scale.shape if size != first // spec.block[1]] or list(scale.shape)
        shape = (_count(module, number, width, 0, rows), first)
    else:
        shape = (first, _count(module, number, width, 1, []))
    check_groups(spec, shape[1])
    spec = replace(spec, scale_dtype=_scale_dtype(scale.dtype, spec))
    blocks = spec.blocks_of(shape)
    by_file = groups and tuple(scale.shape) == blocks and suffix_of_zero(spec) not in tensors
    scale_transposed = groups and not by_file
    wanted = blocks[::-1] if scale_transposed else blocks
    if not scales.fits(scale.shape, replace(spec, block=(1, 1)), wanted):
        found, text = f"{suffix_of_scale(spec)} has shape {list(scale.shape)}", f"{spec} of {list(shape)} needs"
        raise Mismatch(f"{found}, {text} {list(wanted)}")
    packed = (number.kind, number.bits) == ("int", 4)
    reorder = reorder and packed and not _plain_order(spec, tensors, by_file)
    layout = Layout(_name(number), transposed, scale_transposed, reorder)
    _check_zero(module.tensors, spec, layout, wanted)
    if spec.zero_point == "float" and _whole(module, suffix_of_zero(spec), number.bits):
        spec = replace(spec, zero_point="integer")
    return layout, spec, shape


def _whole(module: StoredModule, suffix: str, bits: int) -> bool:
    """Whether zero points that are floats in Quark's memory are whole and small: it writes them as int32."""
    if module.tensors[suffix].dtype != "I32":
        return False
    stored = module.peek(suffix)
    return stored is None or bool(stored.min(initial=0) >= 0 and stored.max(initial=0) <= _largest_zero(bits))


def _largest_zero(bits: int) -> int:
    """Kernels keep zero points as int8 about the codes' middle: of fewer than 8 bits they may lie beyond these."""
    return (1 << (bits - 1)) + 127


def _plain_order(spec: WeightSpec, tensors: Tensors, by_file: bool) -> bool:
    """The file-to-file exporter reorders only what it makes in two stages."""
    return by_file or (suffix_of_zero(spec) not in tensors and not spec.global_scale)


def _name(number: Number) -> str:
    return next(name for name, one in NUMBERS.items() if one is number)


def _count(module: StoredModule, number: Number, width: int, axis: int, others: list[int]) -> int:
    """Codes in a row of the stored weight: what the family expects or others have, else as many as fit."""
    known = [module.expected[axis], *others] if module.expected else others
    fitting = next((count for count in known if number.width(count) == width), None)
    most = width * number.codes // number.elements
    if fitting is None and number.width(most) != width:
        raise Mismatch(f"weight is {width} wide, which is no whole number of codes")
    return most if fitting is None else fitting


def _scale_dtype(stored: str, spec: WeightSpec) -> str:
    if spec.scale_dtype == E8M0:
        if stored not in ("U8", "F8_E8M0"):
            raise Mismatch(f"weight_scale is {stored}, not the exponents that {spec} has")
        return E8M0
    if stored == "U8" and spec.kind == "float" and spec.bits == 4:
        return "float32"  # E5M3, which no library has
    if stored == "F8_E8M0" and spec.kind == "float":
        return E8M0
    if stored not in (*DENSE_DTYPES, "F8_E4M3"):
        raise Mismatch(f"weight_scale is {stored}, which doesn't fit {spec}")
    return DTYPES[stored][1].name


def _check_zero(tensors: Tensors, spec: WeightSpec, layout: Layout, blocks: tuple[int, int]) -> None:
    suffix = suffix_of_zero(spec)
    info = tensors.get(suffix)
    if info is None:
        if spec.zero_point != "none":
            raise Mismatch(f"{suffix} is missing")
        return
    number = NUMBERS[layout.codes]
    count = int(np.prod(blocks))
    rows, columns = blocks if spec.block[1] != WHOLE else (1, count)
    plain = int(np.prod(info.shape)) == count
    packed = int(np.prod(info.shape)) == rows * number.width(columns)
    if spec.kind == "float" or not (plain or packed):
        text = f"{suffix} has shape {list(info.shape)}, {spec} has scales {list(blocks)}"
        raise Mismatch(text)


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(
    module: str, spec: WeightSpec, shape: tuple[int, int], layout: Layout, arrays: Arrays, warn: Warn
) -> QWeight:
    """The weight in canonical form. Raises CheckpointError for values that no kernel may meet."""
    number = NUMBERS[layout.codes]
    global_scale = None
    if spec.global_scale:
        suffix = suffix_of_global(spec)
        global_scale = scales.positive(arrays[suffix], f"{module}.{suffix}")
    scale = _scale(arrays[suffix_of_scale(spec)], spec, shape, layout)
    zero = None
    if number.kind == "int":
        spec, zero = _zero_point(module, spec, shape, layout, arrays, warn)
    codes = _codes(module, spec, shape, layout, arrays["weight"])
    return QWeight(spec, shape, codes, scale, zero, global_scale=global_scale)


def _codes(module: str, spec: WeightSpec, shape: tuple[int, int], layout: Layout, stored: Array) -> Array:
    number, name = NUMBERS[layout.codes], f"{module}.weight"
    if number.kind == "float":
        if number.bits == 8:
            return values.float8_codes(stored, spec, name)
        if number.bits == 6:
            return decoded(stored, lambda rows, _: packing.unpack_sextets(rows.view(np.uint8), shape[1]))
        return decoded(stored, lambda rows, _: rows.view(np.uint8))

    def unpacked(rows: Array, begin: int) -> Array:
        count = shape[0] if layout.transposed else shape[1]
        codes = offset_binary(rows, number, count, layout.reorder, name)
        if layout.transposed:
            codes = np.ascontiguousarray(codes.T)
        return pack_nibbles(codes) if spec.bits == 4 else codes

    if layout.transposed:  # a row of the weight is a column of what is stored
        return unpacked(stored[0 : stored.shape[0]], 0)
    return decoded(stored, unpacked)


def _scale(stored: Array, spec: WeightSpec, shape: tuple[int, int], layout: Layout) -> Array:
    if stored.dtype == np.uint8:
        stored = stored.view(DTYPES["F8_E8M0"][1]) if spec.scale_dtype == E8M0 else E5M3[stored]
    if layout.scale_transposed:
        stored = np.ascontiguousarray(stored.T)
    return scales.normalise(stored, spec, shape)


def _zero_point(
    module: str, spec: WeightSpec, shape: tuple[int, int], layout: Layout, arrays: Arrays, warn: Warn
) -> tuple[WeightSpec, Array | None]:
    """Zero points as offset-binary codes, and the spec they make: those of symmetric integers are all 0."""
    suffix = suffix_of_zero(spec)
    stored = arrays.get(suffix)
    if stored is None:
        return spec, None
    number, name = NUMBERS[layout.codes], f"{module}.{suffix}"
    middle = 1 << (number.bits - 1)
    blocks = spec.blocks_of(shape)
    stored_as = blocks[::-1] if layout.scale_transposed else blocks
    if stored.dtype.kind == "f" or spec.zero_point == "float":
        zero: Array = stored.astype(np.float32).reshape(stored_as) + np.float32(middle * number.signed)
        values.check_finite(zero, name)
    else:
        columns = stored_as[1] if spec.block[1] != WHOLE else blocks[0] * blocks[1]
        if stored.size == blocks[0] * blocks[1] and (number.codes == 1 or stored.size != number.width(columns)):
            low = -middle if number.signed else 0
            if stored.min(initial=0) < low or stored.max(initial=0) > low + _largest_zero(number.bits):
                raise CheckpointError(
                    "code-range", f"zero points too far from codes of {number.bits} bits", module=name
                )
            zero = (stored.astype(np.int64) - low).astype(np.uint8)
        else:
            rows = np.ascontiguousarray(stored.reshape(-1, number.width(columns)))
            zero = offset_binary(rows, number, columns, layout.reorder, name)
        zero = zero.reshape(stored_as)
    if layout.scale_transposed:
        zero = np.ascontiguousarray(zero.T)
    if spec.zero_point != "none":
        return spec, zero
    if (zero == middle).all():
        return spec, None
    warn("zero-point-kept", "the config says symmetric, but the stored zero points are not zero; they are applied")
    return replace(spec, kind="uint", zero_point="integer"), zero
