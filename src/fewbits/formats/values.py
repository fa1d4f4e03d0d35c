"""Stored floats, checked on their way into canonical form: none may be NaN or infinite."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import CheckpointError
from fewbits.formats.blocks import decoded
from fewbits.qweight import QWeight
from fewbits.spec import WeightSpec

Array = NDArray[Any]

_CHECKED_AT_ONCE = 1 << 18  # numbers: what a check makes of them stays in the cache
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}
# An 8-bit float that is NaN, or beside it infinite, has all of these bits.
_NO_NUMBER = {"fp8": 0x7F, "fp8e5m2": 0x7C}


def check_finite(values: Array, tensor: str, row: int = 0) -> None:
    """Raise weight-nan where floats of 16 bits or more hold a NaN or an infinity: an exponent of all ones.

    `row` is the index of the first row in the tensor.
    """
    exponent = _EXPONENTS[values.dtype.name]
    _refuse(values.view(f"u{values.itemsize}"), exponent, tensor, "a value that is not finite", row)


def _refuse(codes: Array, mask: int, tensor: str, what: str, row: int = 0) -> None:
    """Raise weight-nan where a code has all bits of `mask` set."""
    flat = codes.reshape(-1)
    bits = flat.dtype.type(mask)
    for begin in range(0, flat.size, _CHECKED_AT_ONCE):
        masked = flat[begin : begin + _CHECKED_AT_ONCE] & bits
        if masked.max() == bits:
            place = [int(index) for index in np.unravel_index(begin + int(masked.argmax()), codes.shape)]
            place[:1] = [row + index for index in place[:1]]
            text = f"holds {what} at {place}"
            raise CheckpointError("weight-nan", text, module=tensor)


def float8_codes(stored: Array, spec: WeightSpec, tensor: str) -> Array:
    """Codes of 8-bit floats [N, K] as they are stored."""

    def checked(rows: Array, begin: int) -> Array:
        codes = rows.view(np.uint8)
        _refuse(codes, _NO_NUMBER[spec.number], tensor, "the code of NaN", begin)
        return codes

    return decoded(stored, checked)


def dense_weight(stored: Array, spec: WeightSpec, shape: tuple[int, int], tensor: str) -> QWeight:
    """Floats of 16 bits or more, of any number of dimensions, as [N, K]."""

    def checked(rows: Array, begin: int) -> Array:
        rows = rows.reshape(*(rows.shape[:1] or (1,)), shape[1])
        check_finite(rows, tensor, begin)
        return rows.view(np.uint16) if spec.bits == 16 else rows

    return QWeight(spec, shape, decoded(stored, checked))


def bias(stored: Array | None, tensor: str) -> Array | None:
    """The bias in float32."""
    if stored is None:
        return None
    with np.errstate(over="ignore"):
        values: Array = stored.astype(np.float32)
    check_finite(values, tensor)
    return values
