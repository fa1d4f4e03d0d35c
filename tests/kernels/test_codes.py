"""Every code of every number format, at every place of a word: the native product has the value that it stands for."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from random_weights import ACTS, CHANNEL, floats, integers

from fewbits import _native
from fewbits.kernels.cpu import linear
from fewbits.qweight import QLinear, QWeight, pack_nibbles
from fewbits.spec import WeightSpec, dense

COLUMNS = 11  # more than a word's codes, and no multiple of them
# Groups that aren't whole words are kept in wider codes.
BLOCKS = [CHANNEL, (1, 8), (1, 4), (1, 6), (1, 5)]
FLOATS = {
    (2, 1): ml_dtypes.float4_e2m1fn,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
}


def products(spec: WeightSpec, codes: np.ndarray, scale: np.ndarray | None, integer_dot: bool = False) -> np.ndarray:
    """The weight's columns [K, N] as products with unit vectors, one at a time; all at once they are the same."""
    shape = codes.shape
    stored = pack_nibbles(codes) if spec.quantized and spec.bits == 4 else codes
    act = ACTS["int8-static"] if integer_dot else None
    layer = QLinear(QWeight(spec, shape, stored, scale), act, input_scale=1.0 if act else None)
    run = linear.bind([linear.pack(layer)])
    x = np.eye(shape[1], dtype=np.float32)
    alone = np.concatenate([run(row[np.newaxis])[0] for row in x])
    np.testing.assert_array_equal(run(np.concatenate([x, x]))[0], np.concatenate([alone, alone]))
    return alone


def check(
    spec: WeightSpec, values: np.ndarray, zero_code: int, columns: int = COLUMNS, integer_dot: bool = False
) -> None:
    """`values` of all codes. Row (k, code) holds the code in column k, and otherwise what stands for 0."""
    count = len(values)
    codes = np.full((columns, count, columns), zero_code, np.uint16 if count > 256 else np.uint8)
    for k in range(columns):
        codes[k, :, k] = np.arange(count)
    codes = codes.reshape(-1, columns)
    scale = np.ones(spec.blocks_of(codes.shape), spec.scale_dtype) if spec.quantized else None
    y = products(spec, codes, scale, integer_dot).reshape(columns, columns, count)
    for k in range(columns):
        np.testing.assert_array_equal(y[k, k], values, err_msg=f"column {k}")
        others = np.delete(y[k], k, axis=0)
        assert not others[:, np.isfinite(values)].any(), f"column {k}"


@pytest.mark.parametrize("integer_dot", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits, block, integer_dot):
    middle = 1 << (bits - 1)
    check(integers(bits, block), np.arange(2 * middle) - middle, middle, integer_dot=integer_dot)


@pytest.mark.parametrize("integer_dot", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points(bits, block, integer_dot):
    """A code and a zero point of every value: their difference, whole."""
    spec = integers(bits, block, asymmetric=True)
    count = 1 << bits
    shape = (count, COLUMNS)
    code, zero = (np.random.default_rng(bits).permutation(count).astype(np.uint8) for _ in range(2))
    blocks = spec.blocks_of(shape)
    codes = np.repeat(code[:, np.newaxis], COLUMNS, axis=1)
    weight = QWeight(
        spec,
        shape,
        pack_nibbles(codes) if bits == 4 else codes,
        np.ones(blocks, spec.scale_dtype),
        np.repeat(zero[:, np.newaxis], blocks[1], axis=1),
    )
    act = ACTS["int8-static"] if integer_dot else None
    run = linear.bind([linear.pack(QLinear(weight, act, input_scale=1.0 if act else None))])
    (y,) = run(np.eye(COLUMNS, dtype=np.float32))
    np.testing.assert_array_equal(y, np.broadcast_to(code.astype(np.int16) - zero, y.shape))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("exponent, mantissa", FLOATS)
def test_floats(exponent, mantissa, block):
    count = 1 << (1 + exponent + mantissa)
    values = np.arange(count, dtype=np.uint8).view(FLOATS[exponent, mantissa]).astype(np.float32)
    assert np.isnan(values).sum() == {(4, 3): 2, (5, 2): 6}.get((exponent, mantissa), 0)
    check(floats(exponent, mantissa, block, "float32"), values, 0)


@pytest.mark.parametrize("name, dtype", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision(name, dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    if name == "bfloat16" and _native.tier() == "avx512_bf16":
        values[np.abs(values) < 2.0**-126] = 0  # the instruction takes subnormals for 0
    check(dense(name), values, 0, columns=3)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e8m0fnu", "bfloat16", "float16"])
def test_scales(dtype):
    stored = np.uint8 if dtype.startswith("float8") else np.uint16
    count = 1 << (8 * np.dtype(stored).itemsize)
    scale = np.arange(count, dtype=stored).view(dtype)
    for spec, one in [(integers(4, CHANNEL), 9), (floats(2, 1, CHANNEL, dtype), 2), (integers(8, CHANNEL), 129)]:
        codes = np.full((count, 1), one, np.uint8)
        (y,) = products(replace(spec, scale_dtype=dtype), codes, scale[:, np.newaxis])
        np.testing.assert_array_equal(y, scale.astype(np.float32))
