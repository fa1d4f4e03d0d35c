"""Native attention and cache writes, against their definition in float64 and against themselves.

Every cache here starts as NaN in every slot, so that reading one that wasn't written shows. The tier is fixed
when the process starts: the last test runs this file again under each other one.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

from fewbits import _native

EPS = 2.0**-24  # half an ulp of 1 in float32
CHUNK = 256  # positions whose softmax is accumulated at a stretch (native/attention/attention.h)
EPS_BF16 = 2.0**-8
FLOATS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "fp8": ml_dtypes.float8_e4m3fn}
DTYPES = FLOATS | {"int8": np.int8}
RAW = {"f32": np.float32, "bf16": np.uint16, "f16": np.uint16, "fp8": np.uint8, "int8": np.int8}


def rounds_to_bf16(kind):
    """Whether this tier takes queries and exponentials in bf16 (native/attention/attention.h)."""
    return _native.tier() == "avx512_bf16" and kind not in ("f32", "f16")


def address(array):
    if array is None:
        return 0
    assert array.flags.c_contiguous
    return array.ctypes.data


@pytest.fixture(autouse=True)
def threads():
    before = _native.thread_count()
    yield
    _native.set_thread_count(before)


@dataclass
class Cache:
    """A paged cache of one layer, and the pages of its sequences in shuffled order."""

    kind: str
    kv_heads: int
    D: int
    page_size: int
    lengths: list[int]
    seed: int = 0
    value_D: int = 0  # that of keys where it is 0
    k: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        pages = [-(-n // self.page_size) for n in self.lengths]
        total = sum(pages) + 2
        order = rng.permutation(total).astype(np.int32)
        self.block_table = np.full((len(pages), max(pages + [1])), -1, np.int32)
        for s, n in enumerate(pages):
            self.block_table[s, :n], order = order[:n], order[n:]
        self.value_D = self.value_D or self.D
        shape = (total, self.kv_heads, self.page_size)
        with np.errstate(invalid="ignore"):
            nan = np.array(np.nan).astype(DTYPES[self.kind]).view(RAW[self.kind])
        self.k, self.v = np.full((*shape, self.D), nan), np.full((*shape, self.value_D), nan)
        if self.kind == "int8":
            self.k_scale, self.v_scale = np.full((2, *shape), np.nan, np.float32)
        elif self.kind == "fp8":
            self.k_scale = rng.uniform(0.01, 0.05, self.kv_heads).astype(np.float32)
            self.v_scale = rng.uniform(0.01, 0.05, self.kv_heads).astype(np.float32)
        else:
            self.k_scale = self.v_scale = None

    def slot(self, s, j):
        return int(self.block_table[s, j // self.page_size]) * self.page_size + j % self.page_size

    def entry(self, array, s, j):
        return array[self.block_table[s, j // self.page_size], :, j % self.page_size]

    def write(self, s, j, k, v):
        """k [kv_heads, D] and v [kv_heads, value_D], rounded here as the format defines it."""
        for array, value, scale in ((self.k, k, self.k_scale), (self.v, v, self.v_scale)):
            if self.kind == "int8":
                self.entry(scale, s, j)[:] = abs(value).max(1) / 127
                value = np.rint(value / self.entry(scale, s, j)[:, None])
            elif scale is not None:
                value = np.clip(value / scale[:, None], -448, 448)
            self.entry(array, s, j)[:] = value.astype(np.float32).astype(DTYPES[self.kind]).view(RAW[self.kind])

    def native(self):
        scales = (address(self.k_scale), address(self.v_scale))
        return _native.LayerCache(address(self.k), address(self.v), self.page_size, self.kind, *scales)

    def read(self, s, j):
        """The entry's key and value in float64, [kv_heads, D] and [kv_heads, value_D]."""
        out = []
        for array, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
            value = self.entry(array, s, j).view(DTYPES[self.kind]).astype(np.float64)
            if self.kind == "int8":
                scale = self.entry(scale, s, j)
            out.append(value if scale is None else value * scale[:, None].astype(np.float64))
        return out


@dataclass
class Batch:
    """Rows for sequences given as (entries before the batch, rows of the batch)."""

    sequences: list[tuple[int, int]]
    heads: int
    cache: Cache
    q: np.ndarray
    positions: np.ndarray
    window: int = 0
    sinks: np.ndarray | None = None
    mask: np.ndarray | None = None
    scale: float = 0.2

    @property
    def starts(self):
        return np.cumsum([0] + [rows for _, rows in self.sequences]).astype(np.int32)

    def run(self):
        out = np.full((len(self.q), self.heads * self.cache.value_D), np.nan, np.float32)
        kv_len = np.array([past + rows for past, rows in self.sequences], np.int32)
        starts = self.starts
        c = self.cache
        slots = np.zeros(len(self.q), np.int64)
        step = _native.Step(slots, self.positions, starts, kv_len, c.block_table, self.mask)
        spec = _native.AttentionSpec(
            self.heads, c.kv_heads, c.D, c.value_D, 0, 0, False, 0, 0, 0.0, 0.0, self.scale, self.window,
            address(self.sinks),
        )  # fmt: skip
        spec.attend(address(self.q), address(out), step, c.native())
        return out

    def scaled_query(self):
        """q * scale as the tier's products take it, in float64 [T, heads, D]."""
        c = self.cache
        q = self.q.reshape(-1, self.heads, c.D)
        if not rounds_to_bf16(c.kind):
            return q * float(self.scale)
        factor = np.full(c.kv_heads, self.scale, np.float32) * (c.k_scale if c.kind == "fp8" else np.float32(1))
        factor = np.repeat(factor, self.heads // c.kv_heads)[:, None]
        taken = (q * factor).astype(ml_dtypes.bfloat16).astype(np.float64)
        return taken / factor.astype(np.float64) * self.scale

    def definition(self):
        """What each row must be, in float64, and how far the tier's rounding may be from it."""
        c, starts = self.cache, self.starts
        out = np.zeros((len(self.q), self.heads, c.value_D))
        bound = np.zeros_like(out)
        group = self.heads // c.kv_heads
        query = self.scaled_query()
        for s, (past, rows) in enumerate(self.sequences):
            entries = [c.read(s, j) for j in range(past + rows)]
            for i in range(rows):
                t = starts[s] + i
                seen = []
                for j in range(past + rows):
                    position = j if j < past else self.positions[starts[s] + j - past]
                    if j >= past:
                        other = starts[s] + j - past
                        if not (self.mask[t, other] if self.mask is not None else j - past <= i):
                            continue
                    if not self.window or self.positions[t] - position < self.window:
                        seen.append(j)
                if not seen:
                    continue
                k = np.repeat(np.array([entries[j][0] for j in seen]), group, axis=1)
                v = np.repeat(np.array([entries[j][1] for j in seen]), group, axis=1)
                scores = np.einsum("hd,jhd->jh", query[t], k)
                magnitude = np.einsum("hd,jhd->jh", abs(query[t]), abs(k))
                logits = scores if self.sinks is None else np.vstack([scores, self.sinks[None].astype(np.float64)])
                weights = np.exp(scores - logits.max(0))
                weights /= np.exp(logits - logits.max(0)).sum(0)
                out[t] = np.einsum("jh,jhd->hd", weights, v)
                # A score is a sum of D products of q (rounded once or twice with the scales) and k; an error of x
                # in the scores changes a weight by at most a factor of e^2x. Sums over positions run over at most
                # CHUNK terms, with a dozen roundings for exponentials, rescaling, merging and the division.
                score_error = (c.D + 3) * EPS * magnitude.max(0)
                relative = 2 * score_error + (2 * CHUNK + 16 + 4 * len(seen) / 64) * EPS
                if rounds_to_bf16(c.kind):
                    # An exponential (itself good to 2^-18) is rounded where it weighs and where it is summed.
                    relative += 2 * (EPS_BF16 + 2.0**-18)
                bound[t] = np.einsum("jh,jhd->hd", weights, abs(v)) * relative[:, None] + 1e-36
        return out.reshape(len(out), -1), bound.reshape(len(out), -1)

    def check(self):
        out = self.run()
        expected, bound = self.definition()
        worst = np.max(abs(out - expected) / np.maximum(bound, 1e-300), initial=0)
        assert np.all(abs(out - expected) <= bound), f"{worst:.3g} of the bound"
        return out


def make_batch(sequences, *, kind="f32", heads=4, kv_heads=2, D=32, value_D=0, page_size=16, seed=0, **options):
    rng = np.random.default_rng(seed)
    cache = Cache(kind, kv_heads, D, page_size, [past + rows for past, rows in sequences], seed, value_D)
    for s, (past, rows) in enumerate(sequences):
        for j in range(past + rows):
            k, v = rng.standard_normal((kv_heads, D)), rng.standard_normal((kv_heads, cache.value_D))
            cache.write(s, j, k, v)
    T = sum(rows for _, rows in sequences)
    q = rng.standard_normal((T, heads * D)).astype(np.float32)
    positions = np.concatenate([np.arange(past, past + rows) for past, rows in sequences]).astype(np.int64)
    return Batch(sequences, heads, cache, q, positions, **options)


MIXED = [(0, 1), (5, 1), (63, 2), (64, 1), (0, 0), (255, 7), (300, 40), (0, 70)]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, D", [(4, 4, 16), (8, 2, 64), (6, 2, 80), (9, 1, 40), (3, 3, 17), (5, 1, 250), (2, 1, 256)]
)
def test_matches_the_definition(kind, heads, kv_heads, D):
    make_batch(MIXED[:6], kind=kind, heads=heads, kv_heads=kv_heads, D=D, scale=D**-0.5).check()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, D, value_D", [(4, 4, 24, 12), (6, 2, 192, 128), (12, 1, 48, 80), (3, 3, 17, 40), (2, 1, 33, 16)]
)
def test_values_may_have_a_width_of_their_own(kind, heads, kv_heads, D, value_D):
    shape = {"kind": kind, "heads": heads, "kv_heads": kv_heads, "D": D, "value_D": value_D, "scale": D**-0.5}
    whole = make_batch(MIXED[:6], **shape)
    expected = whole.check()
    assert expected.shape == (len(whole.q), heads * value_D)
    _native.set_thread_count(3)
    assert np.array_equal(whole.run(), expected)
    alone = make_batch([(0, 90)], **shape)
    rows = alone.check()
    for begin, end in ((0, 1), (37, 38), (40, 45), (89, 90)):
        part = Batch(
            [(begin, end - begin)], heads, alone.cache, alone.q[begin:end], alone.positions[begin:end], scale=D**-0.5
        )
        assert np.array_equal(part.run(), rows[begin:end])


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 65, 300])
def test_prompts_of_any_length(rows):
    make_batch([(0, rows)], kind="bf16", heads=7, kv_heads=1, D=48).check()


@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 100])
@pytest.mark.parametrize("window", [0, 1, 13, 64, 200])
def test_windows_and_page_sizes(page_size, window):
    make_batch(MIXED, kind="bf16", page_size=page_size, window=window).check()


def test_pages_before_the_window_may_be_gone():
    batch = make_batch([(200, 3)], window=40)
    before = batch.check()
    batch.cache.block_table[0, : (200 - 39) // 16] = -(2**30)
    assert np.array_equal(batch.run(), before)


@pytest.mark.parametrize("window", [0, 20])
def test_sinks(window):
    sinks = np.array([-3.0, 0.5, 4.0, -np.inf], np.float32)
    batch = make_batch(MIXED, window=window)
    without = batch.run()
    batch.sinks = sinks
    out = batch.check().reshape(-1, 4, 32)
    assert np.array_equal(out[:, 3], without.reshape(-1, 4, 32)[:, 3])


def test_large_scores_do_not_overflow():
    batch = make_batch([(100, 3)], scale=300.0)
    batch.check()


def tree(rows, seed):
    """Random parents (the row before counts as likely), the mask of ancestors, and depths."""
    rng = np.random.default_rng(seed)
    parents = [-1] + [int(rng.integers(-1, i)) for i in range(1, rows)]
    mask = np.zeros((rows, rows), np.uint8)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] = mask[parent]
        mask[i, i] = 1
    return mask, mask.sum(1).astype(np.int64) - 1


@pytest.mark.parametrize("window", [0, 3, 30])
@pytest.mark.parametrize("past", [0, 10, 63, 100])
def test_tree_of_drafts(past, window):
    mask, depth = tree(12, past)
    batch = make_batch([(past, 12)], kind="bf16", window=window)
    batch.mask, batch.positions = mask, past + depth
    batch.check()


def test_tree_among_other_sequences():
    mask, depth = tree(9, 3)
    batch = make_batch([(40, 4), (70, 9), (0, 3)], window=0)
    whole = np.zeros((16, 16), np.uint8)
    whole[:4, :4] = np.tri(4)
    whole[4:13, 4:13] = mask
    whole[13:, 13:] = np.tri(3)
    batch.mask, batch.positions[4:13] = whole, 70 + depth
    causal = make_batch([(40, 4), (70, 9), (0, 3)]).run()
    out = batch.check()
    assert np.array_equal(out[:4], causal[:4]) and np.array_equal(out[13:], causal[13:])


@pytest.mark.parametrize("window", [0, 5, 50])
def test_a_path_of_a_tree_has_the_bits_of_the_sequence_alone(window):
    past, rows = 60, 24
    mask, depth = tree(rows, 1)
    batch = make_batch([(past, rows)], kind="bf16", window=window)
    batch.mask, batch.positions = mask, past + depth
    out = batch.run()
    for t in range(rows):
        path = np.flatnonzero(mask[t])
        alone = make_batch([(past, rows)], kind="bf16", window=window)
        for depth_, row in enumerate(path):
            for array in (alone.cache.k, alone.cache.v):
                source = batch.cache.entry(batch.cache.k if array is alone.cache.k else batch.cache.v, 0, past + row)
                alone.cache.entry(array, 0, past + depth_)[:] = source
        alone.sequences = [(past + len(path) - 1, 1)]
        alone.q = batch.q[t : t + 1]
        alone.positions = np.array([past + len(path) - 1])
        assert np.array_equal(alone.run()[0], out[t])


def test_positions_need_not_follow_the_index():
    batch = make_batch([(50, 20)], window=12)
    batch.positions = np.random.default_rng(5).integers(45, 75, 20)
    batch.check()


def test_a_row_that_sees_nothing_is_zero():
    batch = make_batch([(0, 3)])
    batch.mask = np.zeros((3, 3), np.uint8)
    batch.mask[1, 0] = 1
    assert np.all(batch.check()[[0, 2]] == 0)


@pytest.mark.parametrize(
    "kind, heads, kv_heads, D", [("bf16", 8, 2, 64), ("fp8", 3, 3, 40), ("f32", 7, 1, 17), ("int8", 4, 1, 50)]
)
def test_rows_have_the_same_bits_in_any_company(kind, heads, kv_heads, D):
    whole = make_batch([(0, 290)], kind=kind, heads=heads, kv_heads=kv_heads, D=D, window=0)
    expected = whole.run()

    def rows(begin, end):
        part = Batch([(begin, end - begin)], heads, whole.cache, whole.q[begin:end], whole.positions[begin:end])
        return part.run()

    for size in (1, 3, 7, 16, 64, 101):
        begins = range(0, 290, size) if size > 1 else (0, 1, 15, 16, 63, 64, 128, 255, 256, 257, 289)
        for begin in begins:
            end = min(begin + size, 290)
            assert np.array_equal(rows(begin, end), expected[begin:end]), (begin, end)


def test_sequences_have_the_same_bits_in_any_batch():
    together = make_batch(MIXED, kind="bf16", window=77)
    out = together.run()
    for s, (past, rows) in enumerate(MIXED):
        begin = together.starts[s]
        table = together.cache.block_table
        together.cache.block_table = table[s : s + 1].copy()
        alone = Batch(
            [(past, rows)], 4, together.cache, together.q[begin : begin + rows],
            together.positions[begin : begin + rows], window=77,
        )  # fmt: skip
        assert np.array_equal(alone.run(), out[begin : begin + rows])
        together.cache.block_table = table


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("sequences", [[(2000, 1)], [(700, 3), (1500, 1)], [(0, 300)], MIXED])
def test_thread_counts_do_not_change_bits(sequences, kind):
    batch = make_batch(sequences, kind=kind, heads=8, kv_heads=1, D=64, sinks=np.zeros(8, np.float32))
    results = []
    for count in (1, 2, 3, 4):
        _native.set_thread_count(count)
        results.append(batch.run())
    assert all(np.array_equal(results[0], other) for other in results[1:])
    batch.check()


@pytest.mark.parametrize("kind", DTYPES)
def test_a_nan_reaches_only_the_rows_that_see_it(kind):
    batch = make_batch([(30, 80)], kind=kind)
    cache = batch.cache
    before = batch.run()
    if kind == "int8":
        cache.entry(cache.v_scale, 0, 90)[:] = cache.entry(cache.k_scale, 0, 95)[:] = np.nan
    else:
        nan = np.array(np.nan).astype(DTYPES[kind]).view(RAW[kind])
        cache.entry(cache.v, 0, 90)[:] = cache.entry(cache.k, 0, 95)[:] = nan
    after = batch.run()
    assert np.array_equal(after[:60], before[:60])
    assert np.all(np.isnan(after[60:]))


def test_refuses_what_cannot_be():
    batch = make_batch([(3, 2)])
    batch.heads = 3
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        batch.run()
    batch = make_batch([(3, 2)])
    batch.sequences = [(-1, 2)]
    with pytest.raises(ValueError, match="sequence 0: kv_len"):
        batch.run()
    batch = make_batch([(3, 2)])
    batch.sequences = [(30, 2)]
    with pytest.raises(ValueError, match="beyond the pages"):
        batch.run()
    batch = make_batch([(3, 2)])
    batch.cache.kind = "fp8"
    batch.cache.k_scale = batch.cache.v_scale = None
    with pytest.raises(ValueError, match="k_scale"):
        batch.run()
    batch = make_batch([(3, 2)], D=16, value_D=32)
    batch.cache.v = batch.cache.k
    with pytest.raises(ValueError, match="values of 32 numbers aren't within keys of 16"):
        batch.run()
    batch = make_batch([(3, 2)], kind="fp8")
    batch.cache.v, batch.cache.v_scale = batch.cache.k, batch.cache.k_scale.copy()
    with pytest.raises(ValueError, match="share their scales"):
        batch.run()


# The cache's rounding, and rotary embedding.


def append(cache, q, k, v, slots, cos, sin, *, interleaved=False, begin=0, q_norm=None, k_norm=None,
           eps=1e-6, offset=0.0):  # fmt: skip
    T, heads = len(k), q.shape[1] // cache.D
    spec = _native.AttentionSpec(
        heads, cache.kv_heads, cache.D, cache.value_D, begin, 2 * cos.shape[1], interleaved, address(q_norm),
        address(k_norm), eps, offset, 1.0, 0, 0,
    )  # fmt: skip
    starts, lengths = np.array([0, T], np.int32), np.array([T], np.int32)
    step = _native.Step(slots, np.arange(T), starts, lengths, cache.block_table[:1], None)
    spec.rope_and_append(*map(address, (q, k, v)), step, cache.native(), address(cos), address(sin))


def awkward_floats():
    """Every exponent with mantissas at and beside the ties of all three formats, in both signs, and the rest."""
    exponents = np.arange(256, dtype=np.uint32)[:, None] << 23
    tops = np.arange(16, dtype=np.uint32)[None, :] << 19  # e4m3's three bits and the tie below them
    base = (exponents | tops).reshape(-1, 1)
    tails = np.array([0, 1, 0x7FFFF, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000], np.uint32)
    bits = (base | tails[None]).reshape(-1)
    bits = np.concatenate([bits, bits | np.uint32(0x80000000)])
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    return np.concatenate([bits, random]).view(np.float32)


@pytest.mark.parametrize("D", [16, 50, 128])
@pytest.mark.parametrize("kind", FLOATS)
def test_stored_values_are_rounded_to_nearest_even(kind, D):
    values = awkward_floats()
    T = -(-len(values) // (2 * D))
    values = np.resize(values, (T, 2 * D)).copy()
    cache = Cache(kind, 2, D, 16, [T])
    if kind == "fp8":
        cache.k_scale = np.array([1.0, 0.3], np.float32)
        cache.v_scale = np.array([0.7, 2.0], np.float32)
    slots = np.array([cache.slot(0, j) for j in range(T)], np.int64)
    none = np.zeros((T, 0), np.float32)
    before = values.copy()
    append(cache, np.zeros((T, 2 * D), np.float32), values, values, slots, none, none)
    assert np.array_equal(values.view(np.uint32), before.view(np.uint32))
    with np.errstate(all="ignore"):
        for array, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            x = values.reshape(T, 2, D)
            if kind == "fp8":
                x = x / scale[:, None]
                x = np.where(np.isnan(x), x, np.clip(x, -448, 448))
            expected = x.astype(DTYPES[kind])
            stored = np.array([cache.entry(array, 0, j) for j in range(T)])
            nan = np.isnan(expected.astype(np.float32))
            assert np.array_equal(np.isnan(stored.view(DTYPES[kind]).astype(np.float32)), nan)
            assert np.array_equal(stored[~nan], expected.view(RAW[kind])[~nan])


@pytest.mark.parametrize("D", [16, 50, 128])
def test_int8_is_rounded_to_nearest_by_each_rows_largest(D):
    rng = np.random.default_rng(D)
    # Rows of every size down to subnormal scales; ties, which 127 as the largest makes exact; and zeros.
    values = rng.standard_normal((200, 2, D)) * 2.0 ** rng.integers(-140, 120, (200, 2, 1))
    values[:50] = np.clip(rng.integers(-254, 255, (50, 2, D)) / 2, -127, 127)
    values[:50, :, 0] = 127
    values[50] = 0
    values = values.astype(np.float32)
    for row, bad in enumerate((np.nan, np.inf, -np.inf), 60):
        values[row, 1, D - 1] = bad
    cache = Cache("int8", 2, D, 16, [200])
    slots = np.array([cache.slot(0, j) for j in range(200)], np.int64)
    none = np.zeros((200, 0), np.float32)
    rows = values.reshape(200, -1).copy()
    append(cache, np.zeros((200, 2 * D), np.float32), rows, rows, slots, none, none)
    largest = abs(values).max(2) / np.float32(127)
    expected_scale = np.where(largest < 2.0**-126, np.float32(0), largest)
    broken = ~np.isfinite(values).all(2)
    for array, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        scale = np.array([cache.entry(scales, 0, j) for j in range(200)])
        codes = np.array([cache.entry(array, 0, j) for j in range(200)])
        assert np.array_equal(np.isnan(scale), broken)
        assert np.array_equal(scale[~broken], expected_scale[~broken])
        divisor = np.where(expected_scale == 0, np.float32(np.inf), expected_scale)[..., None]
        with np.errstate(invalid="ignore"):
            assert np.array_equal(codes[~broken], np.rint(values / divisor)[~broken])


def test_every_int8_code_is_read_as_its_value():
    codes = np.arange(-127, 128, dtype=np.int8)
    cache = Cache("int8", 1, 255, 16, [1])
    cache.k_scale[:] = cache.v_scale[:] = 1
    cache.entry(cache.k, 0, 0)[:] = 0
    cache.entry(cache.v, 0, 0)[:] = codes
    batch = Batch([(0, 1)], 1, cache, np.ones((1, 255), np.float32), np.zeros(1, np.int64))
    assert np.array_equal(batch.run()[0], codes.astype(np.float32))


def test_every_fp8_code_is_read_as_its_value():
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    cache = Cache("fp8", 1, 254, 16, [1])
    cache.k_scale = cache.v_scale = np.ones(1, np.float32)
    cache.entry(cache.k, 0, 0)[:] = 0
    cache.entry(cache.v, 0, 0)[:] = codes
    batch = Batch([(0, 1)], 1, cache, np.ones((1, 254), np.float32), np.zeros(1, np.int64))
    assert np.array_equal(batch.run()[0], codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    cache.entry(cache.v, 0, 0)[0, :2] = 0x7F, 0xFF
    assert np.array_equal(np.isnan(batch.run()[0]), np.arange(254) < 2)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_every_16_bit_code_is_read_as_its_value(kind):
    codes = np.arange(65536, dtype=np.uint16).reshape(64, 1, 1024)
    cache = Cache(kind, 1, 1024, 16, [1] * 64)
    for s in range(64):
        cache.entry(cache.k, s, 0)[:] = 0
        cache.entry(cache.v, s, 0)[:] = codes[s]
    batch = Batch([(0, 1)] * 64, 1, cache, np.ones((64, 1024), np.float32), np.zeros(64, np.int64))
    with np.errstate(all="ignore"):
        expected = codes.reshape(64, 1024).view(DTYPES[kind]).astype(np.float32)
    if rounds_to_bf16(kind):  # the dot product takes subnormal numbers for zeros
        expected[abs(expected) < 2.0**-126] = 0
    finite = np.isfinite(expected)
    out = batch.run()
    assert np.array_equal(out[finite], expected[finite])
    assert not np.any(np.isfinite(out[~finite]))


def rotated(x, cos, sin, interleaved, begin):
    """x: float64 [T, heads, D]; cos and sin [T, rotary_dim / 2], for the channels from `begin` on."""
    half = cos.shape[1]
    end = begin + 2 * half
    out = x.copy()
    a, b = slice(begin, begin + half), slice(begin + half, end)
    if interleaved:
        a, b = slice(begin, end, 2), slice(begin + 1, end, 2)
    out[..., a] = x[..., a] * cos[:, None] - x[..., b] * sin[:, None]
    out[..., b] = x[..., b] * cos[:, None] + x[..., a] * sin[:, None]
    return out


def normed(x, weight, eps, offset):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight + offset)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "D, begin, rotary_dim, value_D",
    [
        (64, 0, 64, 64), (80, 0, 32, 80), (40, 0, 40, 40), (24, 0, 6, 24), (17, 0, 10, 17), (256, 0, 64, 256),
        (16, 0, 0, 16), (192, 128, 64, 128), (24, 16, 8, 12), (41, 3, 36, 50), (20, 20, 0, 20),
    ],
)  # fmt: skip
def test_rope_and_norms(D, begin, rotary_dim, value_D, interleaved, norm):
    rng = np.random.default_rng(D)
    T, heads, kv_heads, offset, eps = 5, 6, 2, 1.0, 1e-5
    q = rng.standard_normal((T, heads * D)).astype(np.float32)
    k, v = (rng.standard_normal((T, kv_heads * width)).astype(np.float32) for width in (D, value_D))
    angle = rng.uniform(-3, 3, (T, rotary_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    q_norm, k_norm = rng.standard_normal((2, D)).astype(np.float32) if norm else (None, None)
    cache = Cache("f32", kv_heads, D, 3, [T], value_D=value_D)
    slots = np.array([cache.slot(0, j) for j in range(T)], np.int64)
    expected = []
    for x, weight in ((q, q_norm), (k, k_norm)):
        x = x.reshape(T, -1, D).astype(np.float64)
        if norm:
            x = normed(x, weight.astype(np.float64), eps, offset)
        size = np.abs(x) + np.sqrt((x**2).sum(-1, keepdims=True))
        expected.append((rotated(x, cos.astype(np.float64), sin.astype(np.float64), interleaved, begin), size))
    k_before = k.copy()
    append(cache, q, k, v, slots, cos, sin, interleaved=interleaved, begin=begin, q_norm=q_norm, k_norm=k_norm,
           eps=eps, offset=offset)  # fmt: skip
    assert np.array_equal(k, k_before)
    stored_k = np.array([cache.entry(cache.k, 0, j) for j in range(T)])
    stored_v = np.array([cache.entry(cache.v, 0, j) for j in range(T)])
    for out, (value, size) in ((q.reshape(T, heads, D), expected[0]), (stored_k, expected[1])):
        # Two products and a sum; with norms, the mean of D squares, a root, a division and two products more.
        assert np.all(abs(out - value) <= (4 + (D + 12) * norm) * EPS * size)
    assert np.array_equal(stored_v.reshape(T, -1), v)
    written = np.zeros(cache.k.shape[0] * 3, bool)
    written[slots] = True
    untouched = cache.k.transpose(0, 2, 1, 3).reshape(-1, kv_heads, D)[~written]
    assert np.all(np.isnan(untouched))


@pytest.mark.parametrize("interleaved", [False, True])
def test_appended_rows_have_the_same_bits_in_any_company(interleaved):
    rng = np.random.default_rng(0)
    T, D = 130, 72
    q = rng.standard_normal((T, 4 * D)).astype(np.float32)
    k, v = rng.standard_normal((2, T, 2 * D)).astype(np.float32)
    cos, sin = rng.uniform(-1, 1, (2, T, 20)).astype(np.float32)
    norm = rng.standard_normal(D).astype(np.float32)

    def run(pieces):
        cache = Cache("fp8", 2, D, 16, [T])
        rows = q.copy()
        slots = np.array([cache.slot(0, j) for j in range(T)], np.int64)
        for begin, end in itertools.pairwise(pieces):
            part = slice(begin, end)
            append(cache, rows[part], k[part], v[part], slots[part], cos[part], sin[part], interleaved=interleaved,
                   q_norm=norm, k_norm=norm)  # fmt: skip
        return rows, cache.k, cache.v

    expected = run([0, T])
    for pieces in ([*range(0, T, 7), T], list(range(T + 1))):
        assert all(np.array_equal(a, b) for a, b in zip(run(pieces), expected, strict=True))
    for count in (1, 2, 3, 4):
        _native.set_thread_count(count)
        assert all(np.array_equal(a, b) for a, b in zip(run([0, T]), expected, strict=True))


def test_append_refuses_what_cannot_be():
    cache = Cache("f32", 1, 16, 16, [1])
    x = np.zeros((1, 16), np.float32)
    none = np.zeros((1, 0), np.float32)
    with pytest.raises(ValueError, match="negative slot"):
        append(cache, x, x, x, np.array([-1]), none, none)
    with pytest.raises(ValueError, match="rotary_dim"):
        append(cache, x, x, x, np.array([0]), np.zeros((1, 9), np.float32), np.zeros((1, 9), np.float32))
    for begin in (-1, 17, 9):
        with pytest.raises(ValueError, match="rotary_"):
            append(
                cache, x, x, x, np.array([0]), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), begin=begin
            )
    cache.value_D = 1025
    with pytest.raises(ValueError, match="width of values 1025"):
        append(cache, x, x, x, np.array([0]), none, none)
    cache.value_D = 16
    cache.kind = "int4"
    with pytest.raises(ValueError, match="int4"):
        append(cache, x, x, x, np.array([0]), none, none)


@pytest.mark.parametrize("tier", [tier for tier in _native.supported_tiers() if tier != _native.tier()])
@pytest.mark.skipif("FEWBITS_ISA" in os.environ, reason="a tier is forced")
def test_every_other_tier(tier):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"FEWBITS_ISA": tier}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
