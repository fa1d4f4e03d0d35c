"""Native norms, the gated activation and embedding rows, against float64 and against themselves.

The tier is fixed when the process starts: the last test runs this file again under each other one.
"""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fewbits import _native

EPS = 2.0**-24  # half an ulp of 1 in float32
LENGTHS = [1, 7, 15, 16, 17, 63, 64, 65, 100, 384, 1000, 4099]


@pytest.fixture(autouse=True)
def threads():
    before = _native.thread_count()
    yield
    _native.set_thread_count(before)


def guarded(shape):
    """An array for results, NaN all around it, and a check that the surroundings stay."""
    size = int(np.prod(shape))
    memory = np.full(size + 64, np.nan, np.float32)

    def check():
        assert np.isnan(memory[:32]).all() and np.isnan(memory[size + 32 :]).all()

    return memory[32 : size + 32].reshape(shape), check


def rms_norm(x, weight, eps=1e-6, offset=0.0):
    y, check = guarded(x.shape)
    _native.rms_norm(x.ctypes.data, weight.ctypes.data, y.ctypes.data, *x.shape, eps, offset)
    check()
    return y


def gated(gate, up):
    y, check = guarded(gate.shape)
    _native.gated(gate.ctypes.data, up.ctypes.data, y.ctypes.data, *gate.shape)
    check()
    return y


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("H", LENGTHS)
def test_rms_norm(H, offset):
    rng = np.random.default_rng(H)
    x = (rng.standard_normal((9, H)) * 10.0 ** rng.uniform(-4, 4, (9, 1))).astype(np.float32)
    x[3] = 0
    weight = rng.standard_normal(H).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * (weight.astype(np.float64) + offset)
    # The root halves the relative error of a sum of H squares (each lane sums H / 16 of them); six roundings more.
    # The sum of weight and offset is rounded before it is used.
    bound = abs(expected) * (H / 32 + 10) * EPS + abs(wide).max(-1, keepdims=True) * 1e-30
    bound += EPS * abs(expected) + EPS * offset * abs(expected) / np.maximum(abs(weight + offset), 1e-30) * 2
    assert np.all(abs(rms_norm(x, weight, 1e-5, offset) - expected) <= bound)


def test_rms_norm_in_place():
    x = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    weight = np.ones(100, np.float32)
    expected = rms_norm(x, weight)
    _native.rms_norm(x.ctypes.data, weight.ctypes.data, x.ctypes.data, 5, 100, 1e-6, 0.0)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("width", LENGTHS)
def test_gated(width):
    rng = np.random.default_rng(width)
    gate = (rng.standard_normal((7, width)) * 10.0 ** rng.uniform(-6, 2, (7, width))).astype(np.float32)
    up = rng.standard_normal((7, width)).astype(np.float32)
    wide = gate.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * up
    # An exponential (1.03 ulp), a sum, two products, a quotient; below -87 the exponential is 0.
    bound = abs(expected) * 10 * EPS + abs(wide * up) * np.exp(-87.0)
    assert np.all(abs(gated(gate, up) - expected) <= bound)


def test_silu_of_extremes():
    gate = np.array([[0.0, -0.0, 88, -88, 1e30, -1e30, np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38]], np.float32)
    out = gated(gate, np.ones_like(gate))[0]
    assert out[0] == 0 and out[1] == 0 and out[2] == 88 and abs(out[3]) < 1e-35
    assert out[4] == np.float32(1e30) and out[5] == 0 and out[6] == np.inf and np.isnan(out[7])
    assert out[10] == gate[0, 10] and out[11] == 0
    np.testing.assert_allclose(out[8:10], gate[0, 8:10] / 2, atol=2e-45)


def argmax(x):
    columns = np.full(len(x) + 2, -7, np.int64)
    _native.argmax(x.ctypes.data, *x.shape, columns[1:].ctypes.data)
    assert columns[0] == columns[-1] == -7
    return columns[1:-1]


@pytest.mark.parametrize("width", [*LENGTHS, 511, 512, 513, 128_256])
def test_argmax(width):
    """Of equal numbers the first, and of NaN the first, wherever they lie; NumPy's rule."""
    rng = np.random.default_rng(width)
    x = rng.integers(-50, 50, (40, width)).astype(np.float32)
    x[1], x[2] = -np.inf, 0.0
    for row in range(3, 40):
        at = rng.integers(0, width, 3)
        x[row, at] = rng.choice([np.nan, np.inf, -np.inf, 50, 51], 3)
    assert np.array_equal(argmax(x), x.argmax(axis=1))
    assert np.array_equal(argmax(x[:1]), x[:1].argmax(axis=1))


@pytest.mark.parametrize("width", [5, 384, 2048])
def test_rows_have_the_same_bits_in_any_company(width):
    rng = np.random.default_rng(width)
    x, up = rng.standard_normal((2, 300, width)).astype(np.float32)
    weight = rng.standard_normal(width).astype(np.float32)
    norms, products = [], []
    for count in (1, 2, 3, 4):
        _native.set_thread_count(count)
        norms.append(rms_norm(x, weight))
        products.append(gated(x, up))
    for rows in (1, 2, 5, 77):
        parts = [slice(begin, begin + rows) for begin in range(0, 300, rows)]
        norms.append(np.concatenate([rms_norm(x[part], weight) for part in parts]))
        products.append(np.concatenate([gated(x[part], up[part]) for part in parts]))
    assert all(np.array_equal(norms[0], other) for other in norms)
    assert all(np.array_equal(products[0], other) for other in products)


def rows_of(embedding, ids):
    ids = np.array(ids, np.int64)
    y, check = guarded((len(ids), embedding.K))
    embedding.rows(ids.ctypes.data, len(ids), y.ctypes.data)
    check()
    return y


IDS = [3, 0, 10, 3, 7]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("K, group_size", [(64, 32), (33, 33), (40, 16), (7, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embedding(bits, K, group_size, zero_points):
    rng = np.random.default_rng(K)
    codes = rng.integers(0, 2**bits, (11, K), dtype=np.uint8)
    groups = -(-K // group_size)
    scale = rng.standard_normal((11, groups)).astype(np.float32)
    zero = rng.integers(0, 2**bits, (11, groups)).astype(np.float32) if zero_points else None
    stored = codes
    if bits == 4:
        padded = np.pad(codes, ((0, 0), (0, K % 2)), constant_values=15)
        stored = padded[:, ::2] | padded[:, 1::2] << 4
    embedding = _native.Embedding(f"int{bits}", np.ascontiguousarray(stored), K, scale, zero, group_size)
    assert (embedding.N, embedding.K) == (11, K)
    group = np.arange(K) // group_size
    centred = codes - (zero[:, group] if zero_points else np.float32(2 ** (bits - 1)))
    assert np.array_equal(rows_of(embedding, IDS), (centred * scale[:, group])[IDS])


@pytest.mark.parametrize("kind, dtype", [("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f32", np.float32)])
def test_embedding_in_a_mapped_file(kind, dtype, tmp_path):
    values = np.random.default_rng(0).standard_normal((11, 37)).astype(dtype)
    values[0, :4] = 0.0, -0.0, 2.0**-24, -(2.0**-15)
    path = tmp_path / "rows"
    path.write_bytes(b"12345678" + values.tobytes())
    raw = np.float32 if kind == "f32" else np.uint16
    mapped = np.memmap(path, raw, "r", offset=8, shape=(11, 37))
    embedding = _native.Embedding(kind, mapped, 37, None, None, 37)
    del mapped
    assert np.array_equal(rows_of(embedding, IDS), values.astype(np.float32)[IDS])


def test_embedding_of_many_rows_with_threads():
    table = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    embedding = _native.Embedding("f32", table, 300, None, None, 300)
    ids = np.random.default_rng(1).integers(0, 50, 700)
    for count in (1, 3):
        _native.set_thread_count(count)
        assert np.array_equal(rows_of(embedding, ids), table[ids])


@pytest.mark.parametrize("wrong", [-1, 4])
def test_embedding_refuses_unknown_ids(wrong):
    embedding = _native.Embedding("f32", np.zeros((4, 8), np.float32), 8, None, None, 8)
    with pytest.raises(ValueError, match=f"token id {wrong} "):
        rows_of(embedding, [0, wrong])


def test_embedding_refuses_arrays_that_do_not_fit():
    codes, scale = np.zeros((4, 8), np.uint8), np.ones((4, 1), np.float32)
    for arguments, sentence in [
        (("int2", codes, 8, scale, None, 8), "not int2"),
        (("bf16", codes, 8, None, None, 8), "uint16"),
        (("int8", codes, 9, scale, None, 9), "8 columns where 9"),
        (("int4", codes, 8, scale, None, 8), "8 columns where 4"),
        (("int8", codes, 8, None, None, 8), "need scales"),
        (("int8", codes, 8, scale, None, 4), r"\[4, 2\]"),
        (("int8", codes, 8, scale, scale[:2], 8), r"zero points must be an array of shape \[4, 1\]"),
        (("int8", codes, 8, scale, None, 0), "group size"),
        (("fp8", codes, 8, scale, scale, 8), "only integer codes have zero points"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            _native.Embedding(*arguments)


def test_refuses_negative_sizes():
    x = np.zeros(8, np.float32).ctypes.data
    with pytest.raises(ValueError, match="at least one element"):
        _native.rms_norm(x, x, x, 1, 0, 1e-6, 0.0)
    with pytest.raises(ValueError, match="negative"):
        _native.gated(x, x, x, -1, 8)


@pytest.mark.parametrize("tier", [tier for tier in _native.supported_tiers() if tier != _native.tier()])
@pytest.mark.skipif("FEWBITS_ISA" in os.environ, reason="a tier is forced")
def test_every_other_tier(tier):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"FEWBITS_ISA": tier}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
