"""Codes in 32-bit words: vectors worked out by hand, and an independent packer, one bit after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import packed, packed_row

from fewbits.formats.packing import unpack, words_dense, words_padded


def words(*values: int) -> np.ndarray:
    return np.array([values], np.uint32).view(np.int32)


def signed(stored: np.ndarray, bits: int, count: int, padded: bool = False) -> list[int]:
    return (unpack(stored, bits, count, padded)[0].astype(int) - (1 << (bits - 1))).tolist()


ALTERNATING = [-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, 3, 1]
CYCLE = [place % 8 - 4 for place in range(32)]

# bits, values, dense words, padded words (where they differ)
VECTORS = [
    (4, list(range(-8, 0)), [0x76543210], None),
    (4, list(range(8)), [0xFEDCBA98], None),
    (4, [*range(-8, 0), 0, 1], [0x76543210, 0x00000098], None),
    (8, [1, 2], [0x00008281], None),
    (8, [-128, -1, 0, 127], [0xFF807F00], None),
    (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4], None),
    (3, ALTERNATING, [0xC8FAC688, 0x0000000B], [0x08FAC688, 0x0000002F]),
    (3, CYCLE, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], [0x08FAC688, 0x1A23EB1A, 0x2C688FAC, 0x0000003E]),
    (5, [-16, -1, 0, 1, 15, -8, 7], [0xD1F8C1E0, 0x00000005], [0x11F8C1E0, 0x00000017]),
    (6, [-32, -1, 0, 1, 31, -16], [0x3F8607C0, 0x00000004], [0x3F8607C0, 0x00000010]),
    (7, [-64, -1, 0, 1, 63], [0xF8301F80, 0x00000007], [0x08301F80, 0x0000007F]),
]


@pytest.mark.parametrize(("bits", "values", "dense", "padded"), VECTORS)
def test_by_hand(bits, values, dense, padded):
    assert signed(words(*dense), bits, len(values)) == values
    assert signed(words(*(padded or dense)), bits, len(values), padded=True) == values
    codes = [value + (1 << (bits - 1)) for value in values]
    assert packed_row(codes, bits) == dense, "the tests' own packer"
    assert packed_row(codes, bits, padded=True) == (padded or dense), "the tests' own packer"


def test_signs_of_stored_words():
    assert words(0x76543210).tolist() == [[1985229328]]
    assert words(0xFEDCBA98).tolist() == [[-19088744]]
    assert words(0xE4E4E4E4).tolist() == [[-454761244]]


@pytest.mark.parametrize(
    ("bits", "count", "dense", "padded"),
    [
        (3, 4096, 384, 410),
        (5, 4096, 640, 683),
        (6, 4096, 768, 820),
        (7, 4096, 896, 1024),
        (3, 2880, 270, 288),
        (5, 2880, 450, 480),
        (6, 2880, 540, 576),
        (7, 2880, 630, 720),
        (3, 11008, 1032, 1101),
        (5, 11008, 1720, 1835),
        (6, 11008, 2064, 2202),
        (7, 11008, 2408, 2752),
        (4, 4096, 512, 512),
        (4, 9, 2, 2),
        (8, 0, 0, 0),
    ],
)
def test_widths(bits, count, dense, padded):
    assert (words_dense(count, bits), words_padded(count, bits)) == (dense, padded)


@given(st.data())
def test_round_trip(data):
    bits, padded = data.draw(st.integers(1, 8)), data.draw(st.booleans())
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    codes = np.array(
        data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=rows * columns, max_size=rows * columns)), np.uint8
    ).reshape(rows, columns)
    stored = packed(codes, bits, padded).reshape(rows, (words_padded if padded else words_dense)(columns, bits))
    assert unpack(stored, bits, columns, padded).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [3, 4])
def test_many_rows_are_unpacked_in_several_goes(bits, monkeypatch):
    from fewbits.formats import packing

    monkeypatch.setattr(packing, "_ROWS_AT_ONCE", 100)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (23, 33)).astype(np.uint8)
    assert unpack(packed(codes, bits), bits, 33, False).tolist() == codes.tolist()
