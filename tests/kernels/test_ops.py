"""The operations of both back ends: worked numbers, native against the reference, and rows by themselves."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fewbits import _native
from fewbits.engine.kvcache import KVCache, Part
from fewbits.kernels.batch import CacheLayer
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.ops import Activation, AttentionSpec
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.kernels.rope import Rope, RopeTable

OPS = [ReferenceOps(), CpuOps()]
ROPE = Rope((1.0, 0.01))
DTYPES = ["f32", "bf16", "f16", "fp8", "int8"]


@pytest.fixture(params=OPS, ids=lambda ops: ops.name)
def ops(request):
    return request.param


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cache_for(spec, dtype="f32", pages=64):
    heads = spec.kv_heads
    scales = ((2.0**-6,) * heads, tuple(0.01 + 0.01 * i for i in range(heads))) if dtype == "fp8" else (None, None)
    kind = "latent" if spec is SPECS["latents"] else "kv"
    layer = CacheLayer(heads, spec.head_dim, dtype, spec.window, *scales, kind=kind, value_width=spec.value_dim)
    return KVCache([layer], pages)


def sizes_of(spec):
    """Widths of q, k and v."""
    return spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim


def attend(ops, spec, cache, batch, q, k, v, rounded=False):
    """The whole operation on copies of q, k and v; with `rounded`, queries are bf16 numbers once they are rotated."""
    bound, step, q = ops.attention(spec), ops.begin(batch), q.copy()
    v = None if spec is SPECS["latents"] else v.copy()
    bound.rope_and_append(q, k.copy(), v, step, cache.layers[0])
    if rounded:
        q = q.astype(ml_dtypes.bfloat16).astype(np.float32)
    return bound.attend(q, step, cache.layers[0]), q


# ---- norms, gates, rows


def test_norm_by_hand(ops):
    x = np.array([[3.0, 4.0]], np.float32)
    y = ops.norm(ops.vector([2.0, 0.5]), 0.0, 0.0)(x)
    np.testing.assert_allclose(y, [[6 / math.sqrt(12.5), 2 / math.sqrt(12.5)]], rtol=1e-6)
    # A zero-centred norm: the stored weight -0.25 means 0.75.
    y = ops.norm(ops.vector([-0.25, -0.25]), 0.5, 1.0)(x)
    np.testing.assert_allclose(y, 0.75 * x / math.sqrt(13), rtol=1e-6)


def test_argmax(ops):
    logits = np.array([[1, 7, 7, 2], [np.nan, np.inf, 1, np.nan], [1, 2, np.nan, 3], [-np.inf] * 4], np.float32)
    assert ops.argmax(logits).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("H", [1, 7, 16, 64, 100, 1000])
def test_norms_agree_and_rows_stand_alone(H):
    x, weight = random(33, H) * 10, random(H, seed=1)
    reference, native = (ops.norm(ops.vector(weight), 1e-5, 0.0) for ops in OPS)
    np.testing.assert_allclose(native(x), reference(x), rtol=(H + 8) * 2.0**-24, atol=1e-7)
    for norm in (reference, native):
        alone = np.concatenate([norm(x[t : t + 1]) for t in range(len(x))])
        np.testing.assert_array_equal(alone, norm(x))


def test_gate_by_hand(ops):
    gate = ops.gate(Activation())
    y = gate(np.array([[10.0, -3.0, 0.0, -200.0, 200.0]], np.float32), np.array([[9.0, -9, 5, 1, 2]], np.float32))
    np.testing.assert_allclose(y, [[89.9959142, 1.28049894, 0, 0, 400]], rtol=1e-6, atol=1e-30)
    assert gate(random(0, 8), random(0, 8)).shape == (0, 8)


def test_gates_agree_and_rows_stand_alone():
    gate, up = random(9, 130) * 5, random(9, 130, seed=1)
    reference, native = (ops.gate(Activation()) for ops in OPS)
    np.testing.assert_allclose(native(gate, up), reference(gate, up), rtol=1e-6)
    for bound in (reference, native):
        alone = np.concatenate([bound(gate[t : t + 1], up[t : t + 1]) for t in range(9)])
        np.testing.assert_array_equal(alone, bound(gate, up))


def test_an_unknown_activation_is_an_error(ops):
    with pytest.raises(KeyError):
        ops.gate(Activation("gelu"))


def test_take_and_copy_make_new_arrays(ops):
    x = random(4, 3)
    taken, copy = ops.take(x, np.array([2, 0])), ops.copy(x)
    np.testing.assert_array_equal(taken, x[[2, 0]])
    x[:] = 0
    assert taken.any() and copy.any()


def test_cut_and_beside_by_hand(ops):
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert ops.cut(x, 1, 3).tolist() == [[1, 2], [7, 8]]
    heads = ops.cut(x, 1, 3, 2)
    assert heads.tolist() == [[1, 2, 4, 5], [7, 8, 10, 11]]
    joined = ops.beside(heads, np.array([[50, 51], [60, 61]], np.float32), heads=2)
    assert joined.tolist() == [[1, 2, 50, 4, 5, 51], [7, 8, 60, 10, 11, 61]]
    x[:] = 0
    assert heads.any() and joined.flags.c_contiguous and joined.dtype == np.float32
    assert ops.cut(random(0, 6), 0, 2, 3).shape == (0, 6)
    assert ops.beside(random(0, 6), random(0, 6), heads=3).shape == (0, 12)


# ---- rotation


@pytest.mark.parametrize(
    "rope, expected",
    [
        (ROPE, [-1.984111, 1.959901, 2.462378, 4.019800]),
        (Rope((1.0, 0.01), interleaved=True), [-1.142640, 1.922076, 2.959851, 4.029800]),
        (Rope((1.0,)), [1 * math.cos(1) - 2 * math.sin(1), 2 * math.cos(1) + math.sin(1), 3, 4]),
        (Rope((1.0, 0.01), factor=2.0), [2 * -1.984111, 2 * 1.959901, 2 * 2.462378, 2 * 4.019800]),
        (Rope((1.0,), begin=2), [1, 2, 3 * math.cos(1) - 4 * math.sin(1), 4 * math.cos(1) + 3 * math.sin(1)]),
        (
            Rope((1.0,), interleaved=True, begin=1),
            [1, 2 * math.cos(1) - 3 * math.sin(1), 3 * math.cos(1) + 2 * math.sin(1), 4],
        ),
    ],
    ids=["half", "interleaved", "partial", "factor", "last", "between"],
)
def test_rotation_by_hand(ops, rope, expected):
    spec = AttentionSpec(1, 1, 4, rope, 1.0)
    x = np.array([[1, 2, 3, 4]] * 2, np.float32)
    cache = cache_for(spec)
    _, q = attend(ops, spec, cache, cache.batch([Part(0, [0, 0])]), x, x, x)
    np.testing.assert_allclose(q[1], expected, rtol=1e-6)
    np.testing.assert_allclose(cache.layers[0].keys[0, 0, 1], expected, rtol=1e-6)
    np.testing.assert_array_equal(cache.layers[0].values[0, 0, 1], x[1])


def test_head_norms_come_before_the_rotation(ops):
    norms = ops.vector([1.0, 0.5, 2.0, -1.0]), ops.vector([1.0, 1.0, 1.0, 3.0])
    spec = AttentionSpec(1, 1, 4, ROPE, 1.0, q_norm=norms[0], k_norm=norms[1], norm_eps=0.5, norm_offset=0.25)
    plain = AttentionSpec(1, 1, 4, ROPE, 1.0)
    x = np.array([[1, 2, 3, 4]] * 2, np.float32)
    normed = [x / math.sqrt(7.5 + 0.5) * (norm + 0.25) for norm in norms]
    cache, other = cache_for(spec), cache_for(plain)
    _, q = attend(ops, spec, cache, cache.batch([Part(0, [0, 0])]), x, x, x)
    _, expected = attend(ops, plain, other, other.batch([Part(0, [0, 0])]), *normed, x)
    np.testing.assert_allclose(q, expected, rtol=1e-6)
    np.testing.assert_allclose(cache.layers[0].keys[0, 0, :2], other.layers[0].keys[0, 0, :2], rtol=1e-6)


def test_a_table_has_the_same_rows_however_it_grew():
    rope = Rope(tuple(10000.0 ** (-i / 32) for i in range(32)))
    at_once, by_and_by = RopeTable(rope), RopeTable(rope)
    positions = np.array([0, 3, 5000, 700])
    expected = at_once.rows(positions, 5000)
    for highest in (2, 600, 5000):
        found = by_and_by.rows(np.minimum(positions, highest), highest)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    angle = np.float32(5000) * np.float32(rope.inv_freq[7])
    assert expected[0][2, 7] == np.float32(math.cos(angle))


# ---- what the cache holds


def test_fp8_is_rounded_to_nearest_and_saturates(ops):
    spec = AttentionSpec(1, 1, 4, Rope(()), 1.0)
    cache = KVCache([CacheLayer(1, 4, "fp8", 0, (0.5,), (2.0,))], 4)
    k = np.array([[3, -0.1, 500, 0.0]], np.float32)
    bound, batch = ops.attention(spec), cache.batch([Part(0, [0])])
    bound.rope_and_append(k.copy(), k, k, ops.begin(batch), cache.layers[0])
    assert cache.layers[0].keys[0, 0, 0].tolist() == [0x4C, 0xA5, 0x7E, 0x00]
    values = cache.layers[0].values[0, 0, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 2
    np.testing.assert_array_equal(values, [3, -0.1015625, 512, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_back_ends_store_the_same_codes(dtype):
    spec = AttentionSpec(4, 2, 20, Rope(()), 1.0)
    q, k, v = random(40, 80), random(40, 40, seed=1) * 5, random(40, 40, seed=2)
    stored = []
    for ops in OPS:
        cache = cache_for(spec, dtype)
        attend(ops, spec, cache, cache.batch([Part(0, [0] * 40)]), q, k, v)
        arrays = cache.layers[0].per_entry()
        # 40 entries: two pages of 16 and 8 rows of the third.
        stored.append([part for array in arrays for part in (array[:2], array[2, :, :8])])
    for reference, native in zip(*stored, strict=True):
        np.testing.assert_array_equal(native, reference)


# ---- attention


def test_sinks_take_weight_and_add_no_value(ops):
    # Logits 1 and 0 and a sink of 0.5: weights .506480 and .186324.
    spec = AttentionSpec(1, 1, 2, Rope(()), 1.0, sinks=ops.vector([0.5]))
    cache = cache_for(spec)
    q = np.array([[0, 0], [1, 0]], np.float32)
    k = np.array([[1, 0], [0, 0]], np.float32)
    v = np.array([[1, 0], [0, 1]], np.float32)
    out, _ = attend(ops, spec, cache, cache.batch([Part(0, [0, 0])]), q, k, v)
    np.testing.assert_allclose(out[1], [0.506480, 0.186324], rtol=1e-5)


def test_a_window_of_one_sees_only_itself(ops):
    spec = AttentionSpec(2, 1, 8, ROPE, 1.0, window=1)
    cache = cache_for(spec)
    q, k, v = random(20, 16), random(20, 8, seed=1), random(20, 8, seed=2)
    out, _ = attend(ops, spec, cache, cache.batch([Part(0, [0] * 20)]), q, k, v)
    np.testing.assert_allclose(out, np.concatenate([v, v], axis=1), rtol=1e-6)


SPECS = {
    "mha": AttentionSpec(3, 3, 16, ROPE, 0.25),
    "gqa": AttentionSpec(6, 2, 64, Rope(tuple(0.5**i for i in range(32))), 0.125),
    "mqa-odd": AttentionSpec(5, 1, 20, Rope((1.0, 0.1, 0.01), interleaved=True), 0.25),
    "window": AttentionSpec(4, 2, 32, Rope((1.0,) * 16), 0.25, window=37),
    "narrow-values": AttentionSpec(4, 4, 24, Rope((1.0, 0.3, 0.1, 0.01), 1.5, True, begin=16), 0.25, value_dim=12),
    "latents": AttentionSpec(9, 1, 40, Rope((1.0, 0.3, 0.1, 0.01), 1.5, True, begin=32), 0.25, value_dim=32),
    "wide-values": AttentionSpec(3, 1, 20, Rope((1.0, 0.1), begin=5), 0.25, value_dim=70),
    "sinks": AttentionSpec(4, 2, 32, Rope((1.0,) * 16), 0.25, window=70, sinks=random(4, seed=9)),
}
# Steps of (sequence, new tokens): beyond the native blocks of 64 and chunks of 256 entries.
STEPS = [[(0, 5), (1, 70)], [(1, 1), (0, 1)], [(2, 300), (0, 33)], [(0, 1), (1, 1), (2, 1)]]


LARGEST = 5.0  # no number of `play`'s inputs is larger


def play(ops, spec, dtype, steps):
    """Outputs per sequence of a run whose inputs depend on (sequence, position) alone."""
    cache = cache_for(spec, dtype)
    inputs = {}
    for sequence in (0, 1, 2):
        inputs[sequence] = [random(400, size, seed=10 * sequence + i) for i, size in enumerate(sizes_of(spec))]
        assert max(abs(x).max() for x in inputs[sequence]) < LARGEST
    outputs = {0: [], 1: [], 2: []}
    for step in steps:
        begins = {sequence: cache.length(sequence) for sequence, _ in step}
        batch = cache.batch([Part(sequence, [0] * count) for sequence, count in step])
        rows = [
            np.concatenate(
                [inputs[sequence][i][begins[sequence] : begins[sequence] + count] for sequence, count in step]
            )
            for i in range(3)
        ]
        out, _ = attend(ops, spec, cache, batch, *rows, rounded=True)
        ends = np.cumsum([count for _, count in step])[:-1]
        for (sequence, _), part in zip(step, np.split(out, ends), strict=True):
            outputs[sequence].append(part)
    return {sequence: np.concatenate(parts) for sequence, parts in outputs.items() if parts}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_native_attention_is_the_definition_within_rounding(name, dtype):
    reference, native = (play(ops, SPECS[name], dtype, STEPS) for ops in OPS)
    for sequence, expected in reference.items():
        # Keys of both may differ by one rounding of the cache's dtype where the rotation's last bit does.
        step = {"f32": 2.0**-24, "bf16": 2.0**-9, "f16": 2.0**-12, "fp8": 2.0**-4, "int8": 2.0**-7}[dtype]
        flips = 0.02 if dtype != "f32" else 0.0
        # Scales are powers of two, so a tier with a bf16 dot product takes the queries as they are; it rounds an
        # exponential twice, by 2^-8 at most. Values are of variance 1.
        rounding = 2.0**-8 * (_native.tier() == "avx512_bf16" and dtype not in ("f32", "f16"))
        difference = np.abs(native[sequence] - expected)
        assert difference.mean() < 1e-6 + flips * step + rounding
        assert difference.max() < 2e-5 + 2 * step * (dtype != "f32") + 2 * rounding * LARGEST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_attention_has_the_same_bits_in_any_company(ops, name, dtype):
    together = play(ops, SPECS[name], dtype, STEPS)
    for sequence, expected in together.items():
        alone = play(ops, SPECS[name], dtype, [[(sequence, len(expected))]])[sequence]
        np.testing.assert_array_equal(alone, expected, err_msg="in one prefill")
    short = len(together[0])
    tokens = play(ops, SPECS[name], dtype, [[(0, 1)]] * short)[0]
    np.testing.assert_array_equal(tokens, together[0], err_msg="token by token")


@pytest.mark.parametrize("name", SPECS)
def test_what_a_token_does_not_see_may_be_anything(ops, name):
    spec = SPECS[name]
    clean = play(ops, spec, "f32", [[(0, 90)]])[0]
    cache = cache_for(spec)
    cache.append(5, 40)
    cache.layers[0].keys[:] = np.nan
    if cache.layers[0].values is not None:
        cache.layers[0].values[:] = np.nan
    q, k, v = (random(400, size, seed=i)[:90] for i, size in enumerate(sizes_of(spec)))
    out, _ = attend(ops, spec, cache, cache.batch([Part(0, [0] * 90)]), q, k, v, rounded=True)
    np.testing.assert_array_equal(out, clean)


def test_a_mask_shows_each_token_its_ancestors(ops):
    spec = SPECS["gqa"]
    q, k, v = (random(75, size, seed=i) for i, size in enumerate(sizes_of(spec)))
    # Rows 70..74 are a tree on a prefix of 70: 70 - 71 - 72 and 70 - 73 - 74.
    branch = [*range(71), 73, 74]
    expected_cache, cache = cache_for(spec), cache_for(spec)
    expected, _ = attend(
        ops, spec, expected_cache, expected_cache.batch([Part(0, [0] * 73)]), *(x[branch] for x in (q, k, v))
    )
    attend(ops, spec, cache, cache.batch([Part(0, [0] * 70)]), *(x[:70] for x in (q, k, v)))
    batch = cache.batch([Part(0, [0] * 5)])
    batch.positions = np.array([70, 71, 72, 71, 72])
    batch.mask = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], np.uint8
    )
    out, _ = attend(ops, spec, cache, batch, *(x[70:] for x in (q, k, v)))
    np.testing.assert_array_equal(out[[0, 3, 4]], expected[70:])


def test_a_cache_that_grew_between_calls_is_found_again(ops):
    spec = SPECS["mha"]
    small = cache_for(spec)
    bound = ops.attention(spec)
    sizes = (48, 48, 48)
    q, k, v = (random(300, size, seed=i) for i, size in enumerate(sizes))
    outputs = []
    for begin, end in ((0, 3), (3, 200), (200, 300)):
        step = ops.begin(small.batch([Part(0, [0] * (end - begin))]))
        rows = q[begin:end].copy()
        bound.rope_and_append(rows, k[begin:end].copy(), v[begin:end].copy(), step, small.layers[0])
        rows = rows.astype(ml_dtypes.bfloat16).astype(np.float32)
        outputs.append(bound.attend(rows, step, small.layers[0]))
    np.testing.assert_array_equal(np.concatenate(outputs), play(ops, spec, "f32", [[(0, 300)]])[0])


def test_an_empty_batch_is_a_batch(ops):
    spec = SPECS["mha"]
    cache = cache_for(spec)
    out, _ = attend(ops, spec, cache, cache.batch([Part(0, [], 0)]), random(0, 48), random(0, 48), random(0, 48))
    assert out.shape == (0, 48)
