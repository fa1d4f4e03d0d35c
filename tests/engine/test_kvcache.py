"""Pages: handing out, taking back, growing, moving, and the batch that describes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.engine.kvcache import PAGE_SIZE, CacheFull, KVCache, Part
from fewbits.kernels.batch import CacheLayer

LAYERS = [CacheLayer(2, 4, "f32"), CacheLayer(1, 8, "bf16", window=8)]


def cache(max_pages=100):
    return KVCache(LAYERS, max_pages)


def test_slots_are_page_times_size_plus_row():
    pages = cache()
    slots = [*pages.append(7, 3), *pages.append(7, 20), *pages.append(9, 1), *pages.append(7, 10)]
    table = pages.block_table([7])[0]
    expected = [int(table[j // 16]) * 16 + j % 16 for j in range(33)]
    assert slots[:23] + slots[24:] == expected
    assert slots[23] // 16 not in table.tolist()
    assert pages.length(7) == 33 and pages.length(9) == 1 and pages.length(8) == 0


def test_the_batch_describes_what_was_appended():
    pages = cache()
    pages.append(1, 17)
    batch = pages.batch([Part(0, [5, 6, 7], 0), Part(1, [8, 9], 2), Part(2, [1] * 33)])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9] + [1] * 33
    assert batch.positions.tolist() == [0, 1, 2, 17, 18, *range(33)]
    assert batch.query_start.tolist() == [0, 3, 5, 38]
    assert batch.kv_len.tolist() == [3, 19, 33]
    assert batch.logit_rows.tolist() == [3, 4, 37]
    assert batch.block_table.shape == (3, 3) and batch.block_table[0, 1:].tolist() == [0, 0]
    for row, sequence in enumerate([0, 1, 2]):
        mine = slice(*batch.query_start[row : row + 2])
        table, positions = batch.block_table[row], batch.positions[mine]
        np.testing.assert_array_equal(batch.slots[mine], table[positions // 16] * 16 + positions % 16)
        np.testing.assert_array_equal(pages.block_table([sequence])[0], table[: -(-batch.kv_len[row] // 16)])
    dtypes = [batch.token_ids, batch.positions, batch.slots, batch.logit_rows]
    assert {array.dtype for array in dtypes} == {np.dtype(np.int64)}
    assert {array.dtype for array in (batch.query_start, batch.kv_len, batch.block_table)} == {np.dtype(np.int32)}


def test_growing_keeps_what_is_stored():
    pages = cache()
    slots = pages.append(0, 20)
    layer = pages.layers[0]
    content = np.random.default_rng(0).standard_normal((20, 2, 4)).astype(np.float32)
    layer.keys[slots // 16, :, slots % 16] = content
    before = layer.generation
    pages.append(1, 500)
    assert layer.generation > before
    np.testing.assert_array_equal(layer.keys[slots // 16, :, slots % 16], content)
    assert not set(pages.block_table([0])[0]) & set(pages.block_table([1])[0])


def test_a_full_cache_says_so_and_changes_nothing():
    pages = cache(max_pages=4)
    pages.append(0, 30)
    assert pages.free_pages == 2 and pages.pages_needed(0, 3) == 1 and pages.pages_needed(1, 33) == 3
    with pytest.raises(CacheFull):
        pages.append(1, 33)
    with pytest.raises(CacheFull):
        # Each part would fit by itself.
        pages.batch([Part(0, [1] * 3), Part(1, [1] * 17)])
    assert pages.length(0) == 30 and pages.length(1) == 0 and pages.free_pages == 2
    pages.append(0, 2)
    pages.append(1, 32)
    assert pages.free_pages == 0
    pages.free(0)
    assert pages.free_pages == 2 and pages.length(0) == 0
    pages.free(0)
    assert pages.free_pages == 2


def test_truncate_gives_whole_pages_back():
    pages = cache(max_pages=4)
    first = pages.append(0, 64)
    pages.truncate(0, 33)
    assert pages.free_pages == 1
    pages.truncate(0, 32)
    assert pages.free_pages == 2 and pages.length(0) == 32
    np.testing.assert_array_equal(pages.append(0, 32), first[32:])
    for wrong in (-1, 65):
        with pytest.raises(ValueError, match="64 entries"):
            pages.truncate(0, wrong)


def test_move_closes_up_over_what_was_rejected():
    pages = cache()
    slots = pages.append(0, 40)
    for layer in pages.layers:
        for array in (layer.keys, layer.values):
            array[slots // 16, :, slots % 16] = np.arange(40)[:, None, None]
    pages.move(0, 30, [30, 33, 39])
    assert pages.length(0) == 33
    for layer in pages.layers:
        for array in (layer.keys, layer.values):
            entries = array[slots[:33] // 16, :, slots[:33] % 16]
            np.testing.assert_array_equal(entries[:, 0, 0], [*range(31), 33, 39])
    for wrong in ([31, 30], [29], [33], [30, 30]):
        with pytest.raises(ValueError, match="increasing"):
            pages.move(0, 30, wrong)
    pages.move(0, 30, [])
    assert pages.length(0) == 30


def test_int8_scales_grow_and_move_with_their_entries():
    pages = KVCache([CacheLayer(2, 4, "int8")], 100)
    (layer,) = pages.layers
    assert pages.token_bytes == 2 * 2 * (4 + 4)
    pages.append(0, 5)
    layer.k_scale[:], layer.v_scale[:] = layer.keys[..., 0], -1.0
    layer.k_scale[0, :, :5] = np.arange(5)
    pages.append(0, 200)
    assert layer.k_scale.shape == layer.v_scale.shape == layer.keys.shape[:3]
    np.testing.assert_array_equal(layer.k_scale[0, 0, :5], np.arange(5))
    pages.move(0, 1, [2, 4])
    np.testing.assert_array_equal(layer.k_scale[0, 1, :3], [0, 2, 4])
    assert pages.nbytes == len(layer.keys) * PAGE_SIZE * pages.token_bytes


def test_groups_and_bytes():
    layers = [
        CacheLayer(2, 64, "fp8", k_scale=(1.0, 2.0), v_scale=(1.0, 1.0)),
        CacheLayer(2, 64, "bf16", window=8),
        CacheLayer(2, 64, "fp8", k_scale=(3.0, 3.0), v_scale=(1.0, 1.0)),
    ]
    pages = KVCache(layers, 10)
    assert list(pages.groups.values()) == [[0, 2], [1]]
    assert pages.token_bytes == 256 + 512 + 256
    assert pages.nbytes == 0
    pages.append(0, 1)
    assert pages.nbytes == 8 * PAGE_SIZE * pages.token_bytes
    assert pages.layers[0].k_scale.tolist() == [1, 2] and pages.layers[1].k_scale is None


@pytest.mark.parametrize(("dtype", "nbytes"), [("bf16", 2 * 2), ("int8", 2 * 1)])
def test_values_may_have_a_width_of_their_own(dtype, nbytes):
    pages = KVCache([CacheLayer(3, 24, dtype, value_width=12)], 10)
    pages.append(0, 1)
    (layer,) = pages.layers
    assert layer.keys.shape == (8, 3, PAGE_SIZE, 24) and layer.values.shape == (8, 3, PAGE_SIZE, 12)
    assert pages.token_bytes == 3 * (36 * nbytes // 2 + (8 if dtype == "int8" else 0))
    assert pages.nbytes == 8 * PAGE_SIZE * pages.token_bytes
    assert len(pages.groups) == 1 and CacheLayer(3, 24, "bf16") == CacheLayer(3, 24, "bf16", value_width=24)


@pytest.mark.parametrize(("dtype", "nbytes"), [("bf16", 2 * 40), ("f32", 4 * 40), ("int8", 40 + 4)])
def test_latents_are_kept_once(dtype, nbytes):
    pages = KVCache([CacheLayer(1, 40, dtype, kind="latent", value_width=32)], 100)
    pages.append(0, 70)
    (layer,) = pages.layers
    assert layer.values is None and layer.v_scale is None
    assert pages.token_bytes == nbytes and pages.nbytes == layer.keys.shape[0] * PAGE_SIZE * nbytes
    layer.keys[:] = np.arange(layer.keys[..., 0].size).reshape(layer.keys.shape[:3])[..., np.newaxis] % 100
    before = layer.keys[pages.block_table([0])[0]].reshape(-1, 40)[:70].copy()
    pages.append(1, 700)
    pages.move(0, 60, [63, 69])
    kept = pages.layers[0].keys[pages.block_table([0])[0]].reshape(-1, 40)[:62]
    np.testing.assert_array_equal(kept, before[[*range(60), 63, 69]])


@pytest.mark.parametrize(
    "layer",
    [
        CacheLayer(2, 4, "fp8"),
        CacheLayer(2, 4, "fp8", k_scale=(1.0,), v_scale=(1.0,)),
        CacheLayer(2, 4, "bf16", k_scale=(1.0, 1.0), v_scale=(1.0, 1.0)),
    ],
)
def test_scales_go_with_fp8_and_only_there(layer):
    with pytest.raises(ValueError, match="fp8"):
        KVCache([layer], 4)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["append", "truncate", "free"]), st.integers(0, 3), st.integers(0, 60)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_pages_are_never_shared_or_lost(actions):
    pages = cache(max_pages=12)
    lengths = dict.fromkeys(range(4), 0)
    for action, sequence, count in actions:
        if action == "append":
            try:
                pages.append(sequence, count)
                lengths[sequence] += count
            except CacheFull:
                assert pages.pages_needed(sequence, count) > pages.free_pages
        elif action == "truncate" and count <= lengths[sequence] and pages.length(sequence):
            pages.truncate(sequence, count)
            lengths[sequence] = count
        elif action == "free":
            pages.free(sequence)
            lengths[sequence] = 0
        known = [sequence for sequence in lengths if pages.length(sequence)]
        used = [page for sequence in known for page in pages.block_table([sequence])[0].tolist()]
        assert len(used) == len(set(used)) == sum(-(-lengths[sequence] // 16) for sequence in known)
        assert all(0 <= page < 12 for page in used)
        assert pages.free_pages == 12 - len(used)
        assert {sequence: pages.length(sequence) for sequence in lengths} == lengths
