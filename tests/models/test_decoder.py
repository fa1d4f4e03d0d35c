"""Families against transformers, and a row's independence of its company, on both back ends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewbits.engine.kvcache import Part

FOLDERS = {
    "llama-tied-f32": "llama",
    "llama-rope3-f32": "llama",
    "mistral-window8-f32": "mistral",
    "qwen2-f32": "qwen2",
    "qwen3-f32": "qwen3",
    "mixtral-f32": "mixtral",
    "qwen2-moe-f32": "qwen2_moe",
    "qwen3-moe-f32": "qwen3_moe",
    "deepseek-v2-f32": "deepseek_v2",
    "deepseek-v2-lite-f32": "deepseek_v2",
    "deepseek-v3-f32": "deepseek_v3",
}


def run(model, cache, chunks, sequence=0):
    """Logits [T, V] of the chunks' tokens, one forward pass a chunk."""
    rows = []
    for chunk in chunks:
        batch = cache.batch([Part(sequence, list(chunk), logits=len(chunk))])
        rows.append(model.decoder.forward(batch, cache).logits)
    return np.concatenate(rows)


def split(tokens, sizes):
    sizes = itertools.cycle(sizes)
    chunks, begin = [], 0
    while begin < len(tokens):
        end = begin + next(sizes)
        chunks.append(tokens[begin:end])
        begin = end
    return chunks


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_those_of_transformers(open_model, folder):
    model = open_model(folder)
    logits = run(model, model.cache(), [model.input_ids])
    # Two orders of the same float32 sums; a wrong norm, rotation or window moves logits by tenths.
    np.testing.assert_allclose(logits, model.logits, rtol=0, atol=1e-4)
    assert logits.dtype == np.float32


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_chunks_give_the_same_bits_as_one_prefill(open_model, folder, dtype):
    model = open_model(folder)
    whole = run(model, model.cache(dtype), [model.input_ids])
    for sizes in ([1], [3, 1, 7], [17]):
        parts = run(model, model.cache(dtype), split(model.input_ids, sizes))
        np.testing.assert_array_equal(parts, whole, err_msg=f"chunks of {sizes}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_batch_gives_the_same_bits_as_each_sequence_alone(open_model, folder):
    model = open_model(folder)
    vocab = model.decoder.config.vocab
    first = model.input_ids.tolist()
    second = [(token * 7 + 3) % vocab for token in first[:5]]
    third = [(token * 5 + 1) % vocab for token in first[:17]]
    alone = [run(model, model.cache("bf16"), [tokens]) for tokens in (first, second, third)]

    cache = model.cache("bf16")
    # The second step mixes a decode, a prefill and the rest of one.
    steps = [
        [Part(1, second[:4], 4), Part(0, first[:9], 9)],
        [Part(1, second[4:], 1), Part(2, third, 17), Part(0, first[9:], len(first) - 9)],
    ]
    together: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for parts in steps:
        logits = model.decoder.forward(cache.batch(parts), cache).logits
        ends = np.cumsum([part.logits for part in parts])[:-1]
        for part, rows in zip(parts, np.split(logits, ends), strict=True):
            together[part.sequence].append(rows)
    for sequence, expected in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate(together[sequence]), expected)


def test_truncate_and_append_again_forgets_what_was_there(open_model):
    model = open_model("qwen3-f32")
    tokens = model.input_ids.tolist()
    expected = run(model, model.cache(), [tokens])
    cache = model.cache()
    run(model, cache, [tokens[:10], tokens[:13]])
    cache.truncate(0, 10)
    again = run(model, cache, [tokens[10:]])
    np.testing.assert_array_equal(again, expected[10:])


def test_only_the_wanted_rows_have_logits(open_model):
    model = open_model("llama-tied-f32")
    whole = run(model, model.cache(), [model.input_ids])
    cache = model.cache()
    none = model.decoder.forward(cache.batch([Part(0, model.input_ids[:20].tolist(), 0)]), cache)
    assert none.logits.shape == (0, model.decoder.config.vocab)
    last = model.decoder.forward(cache.batch([Part(0, model.input_ids[20:].tolist(), 1)]), cache)
    np.testing.assert_array_equal(last.logits, whole[-1:])


def test_taps_are_the_residual_stream_at_layer_boundaries(open_model):
    model = open_model("llama-rope3-f32")
    cache = model.cache()
    layers = len(model.decoder.config.layers)
    batch = cache.batch([Part(0, model.input_ids.tolist())])
    output = model.decoder.forward(batch, cache, taps=(layers, 0, 1))
    last, embedding, first = output.taps
    np.testing.assert_array_equal(embedding, model.decoder._embedding(batch.token_ids))
    assert not np.array_equal(first, embedding)
    # The head's input is the last boundary behind the final norm.
    logits = model.decoder._head(model.decoder._norm(last[-1:]))
    np.testing.assert_array_equal(logits, output.logits)


def test_a_draft_tree_gives_each_branch_the_bits_of_its_chain(open_model):
    model = open_model("mistral-window8-f32")
    tokens = model.input_ids.tolist()
    prompt, a, b, c = tokens[:12], 5, 9, 21
    chains = [[a, b], [a, c]]
    expected = [run(model, model.cache(), [prompt, chain])[12:] for chain in chains]

    cache = model.cache()
    run(model, cache, [prompt])
    batch = cache.batch([Part(0, [a, b, c], 3)])
    batch.positions = np.array([12, 13, 13])
    batch.mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], np.uint8)
    logits = model.decoder.forward(batch, cache).logits
    np.testing.assert_array_equal(logits[[0, 1]], expected[0])
    np.testing.assert_array_equal(logits[[0, 2]], expected[1])

    # Keep a and c: the sequence goes on as if b had never been.
    cache.move(0, 12, [12, 14])
    after = run(model, cache, [[33]])
    chain = run(model, model.cache(), [[*prompt, a, c, 33]])
    np.testing.assert_array_equal(after, chain[-1:])
