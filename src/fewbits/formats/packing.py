"""Codes packed into 32-bit words, unpacked to one byte each.

dense:  element i of a row occupies bits [i*b, i*b+b) of the row's little-endian bit string, words straddled
padded: 32 // b elements a word from the lowest bits up, the rest of the word zero
For 1, 2, 4 and 8 bits the two are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 1 << 22  # codes unpacked in one go: bounds the temporary bits to some 32 MB
_SEXTETS_AT_ONCE = 1 << 18  # what is made of them stays in the cache


def words_dense(count: int, bits: int) -> int:
    """32-bit words that `count` codes take in the dense packing."""
    return -(-count * bits // 32)


def words_padded(count: int, bits: int) -> int:
    """32-bit words that `count` codes take in the padded packing."""
    return -(-count // (32 // bits))


def unpack(words: NDArray[Any], bits: int, count: int, padded: bool) -> NDArray[np.uint8]:
    """int32 [R, W] → uint8 [R, count], the unsigned codes. `padded` tells the packing."""
    rows = words.shape[0]
    words = np.ascontiguousarray(words).view("<u4").reshape(rows, -1)
    if bits == 8:
        return words.view(np.uint8)[:, :count]
    codes = np.empty((rows, count), np.uint8)
    step = max(1, _ROWS_AT_ONCE // max(count, 1))
    for begin in range(0, rows, step):
        part = words[begin : begin + step]
        if padded or 32 % bits == 0:
            shifts = np.arange(32 // bits, dtype=np.uint32) * bits
            values = (part[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
            codes[begin : begin + step] = values.reshape(len(part), -1)[:, :count]
        else:
            stream = np.unpackbits(part.view(np.uint8), axis=1, count=count * bits, bitorder="little")
            groups = stream.reshape(len(part), count, bits)
            padding = np.zeros((len(part), count, 8 - bits), np.uint8)
            whole = np.concatenate([groups, padding], axis=2)
            codes[begin : begin + step] = np.packbits(whole, axis=2, bitorder="little")[:, :, 0]
    return codes


def unpack_sextets(stored: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """uint8 [R, 3 * columns / 4] → uint8 [R, columns]: four codes of 6 bits in three bytes, lowest first."""
    shifts = np.array([0, 6, 12, 18], np.uint32)
    codes = np.empty((len(stored), columns), np.uint8)
    step = max(1, _SEXTETS_AT_ONCE // max(columns, 1))
    for begin in range(0, len(stored), step):
        words = little_endian(stored[begin : begin + step], 3)
        codes[begin : begin + step] = (words[:, :, None] >> shifts & np.uint32(63)).reshape(len(words), -1)
    return codes


def little_endian(stored: NDArray[np.uint8], size: int) -> NDArray[np.uint32]:
    """uint8 [R, W * size] → uint32 [R, W]: integers of `size` bytes, lowest first."""
    parts = stored.reshape(len(stored), -1, size).astype(np.uint32)
    shifted = [parts[:, :, place] << np.uint32(8 * place) for place in range(size)]
    words: NDArray[np.uint32] = np.bitwise_or.reduce(shifted)
    return words
