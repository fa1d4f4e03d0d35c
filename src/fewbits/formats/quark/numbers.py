"""Number formats by the names that Quark gives them, and how their codes are stored. Source: quark/torch/utils/pack.py.

int4, uint4   eight to an int32, the lowest bits first: in order, or "reorder", as AWQ has them
int3          eight to three bytes, lowest bits first
uint2         four to a byte, the highest bits first
fp4           two to a byte, low nibble first
fp6           four to three bytes, lowest bits first
all others    one to an element, int2 to one of int32
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import CheckpointError
from fewbits.formats import packing
from fewbits.qweight import unpack_nibbles

Codes = NDArray[np.uint8]

_SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a reordered word the codes 0 … 7 lie


class Number(NamedTuple):
    """`dtype` of the stored elements; `codes` of them lie in `elements` of these."""

    kind: Literal["int", "float"]
    bits: int
    dtype: str
    codes: int = 1
    elements: int = 1
    signed: bool = True
    exponent: int = 0
    mantissa: int = 0

    def width(self, count: int) -> int:
        """Elements that `count` codes take."""
        return -(-count // self.codes) * self.elements


NUMBERS = {
    "int2": Number("int", 2, "I32"),
    "uint2": Number("int", 2, "U8", 4, signed=False),
    "int3": Number("int", 3, "U8", 8, 3),
    "int4": Number("int", 4, "I32", 8),
    "uint4": Number("int", 4, "I32", 8, signed=False),
    "int8": Number("int", 8, "I8"),
    "uint8": Number("int", 8, "U8", signed=False),
    "fp4": Number("float", 4, "U8", 2, exponent=2, mantissa=1),
    "fp6_e2m3": Number("float", 6, "U8", 4, 3, exponent=2, mantissa=3),
    "fp6_e3m2": Number("float", 6, "U8", 4, 3, exponent=3, mantissa=2),
    "fp8_e4m3": Number("float", 8, "F8_E4M3", exponent=4, mantissa=3),
    "fp8_e5m2": Number("float", 8, "F8_E5M2", exponent=5, mantissa=2),
}


def offset_binary(stored: NDArray[np.generic], number: Number, count: int, reorder: bool, tensor: str) -> Codes:
    """Integers [R, width] as codes uint8 [R, count], two's complement or unsigned → offset-binary or unsigned.

    Raises CheckpointError code-range, naming the tensor.
    """
    middle = 1 << (number.bits - 1)
    if number.codes == 1 and stored.itemsize > 1:
        low = -middle if number.signed else 0
        if stored.size and (stored.min() < low or stored.max() >= low + 2 * middle):
            raise CheckpointError("code-range", f"holds values outside of {number.bits} bits", module=tensor)
        return (stored - low).astype(np.uint8)
    data = np.ascontiguousarray(stored).view(np.uint8)
    if number.bits == 8:
        codes = data
    elif number.bits == 4:
        codes = unpack_nibbles(data, data.shape[1] * 2)
        if reorder:
            codes = codes.reshape(len(data), -1, 8)[:, :, _SLOTS].reshape(len(data), -1)
    elif number.bits == 3:
        words = packing.little_endian(data, 3)
        codes = (words[:, :, np.newaxis] >> np.arange(0, 24, 3, dtype=np.uint32) & np.uint32(7)).astype(np.uint8)
    else:
        codes = data[:, :, np.newaxis] >> np.array([6, 4, 2, 0], np.uint8) & np.uint8(3)
    codes = codes.reshape(len(data), -1)[:, :count]
    return codes ^ np.uint8(middle) if number.signed else codes


def _e5m3_values() -> NDArray[np.float32]:
    """Unsigned floats of 5 bits of exponent and 3 of mantissa, by code; the last code is NaN."""
    exponent, mantissa = np.divmod(np.arange(256), 8)
    subnormal = mantissa / 8 * 2.0**-14
    values = np.where(exponent == 0, subnormal, (1 + mantissa / 8) * 2.0 ** (exponent - 15.0))
    values[255] = np.nan
    return values.astype(np.float32)


E5M3 = _e5m3_values()
