"""Blocks as one native call: the same bits as operation by operation, and what can't be recorded is left alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits import _native
from fewbits.engine.kvcache import KVCache, Part
from fewbits.kernels.batch import CacheLayer
from fewbits.kernels.cpu import embedding as cpu_embedding
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.cpu.program import labelled
from fewbits.kernels.ops import Activation, Chain, Chosen, Routing

HEADS = 4
WIDTHS = (HEADS, 2 * HEADS, 5 * HEADS, 16 * HEADS)


def step_of(ops: CpuOps, rows: int) -> tuple[Any, KVCache]:
    cache = KVCache([CacheLayer(1, 16, "f32")], max_pages=8)
    return ops.begin(cache.batch([Part(0, [0] * rows)])), cache


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@st.composite
def blocks(draw: Any) -> Callable[..., None]:
    """A few operations on values that earlier ones made, in any order; all that is left is added to the input."""
    choices = [
        (
            draw(st.sampled_from(("beside", "cut", "norm", "gate", "sigmoid", "add"))),
            *draw(st.tuples(*[st.integers(0, 99)] * 2)),
        )
        for _ in range(draw(st.integers(1, 12)))
    ]

    def block(x: Any, step: Any, caches: Any) -> None:
        ops = CpuOps()
        values = [x]
        for operation, i, j in choices:
            first, second = values[i % len(values)], values[j % len(values)]
            width = first.shape[1]
            if operation == "beside" and width + second.shape[1] < 400:
                values.append(ops.beside(first, second, heads=HEADS))
            elif operation == "cut" and width // HEADS > 1:
                values.append(ops.cut(first, j % (width // HEADS), width // HEADS, HEADS))
            elif operation == "norm":
                norm = ops.norm(ops.vector(np.linspace(1, 2, width)), 1e-5, 0.5)
                values.append(ops.computed(norm(first)))
            elif operation == "gate" and second.shape[1] == width:
                values.append(ops.computed(ops.gate(Activation())(first, second)))
            elif operation == "sigmoid" and first is not x:
                ops.scale_by_sigmoid(first, ops.cut(second, 0, 1, HEADS))
            elif operation == "add" and second.shape[1] == width and second is not x and second is not first:
                ops.add(first, second)
        for value in values[1:]:
            same = [value] * (x.shape[1] // value.shape[1] + 1)
            ops.add(ops.cut(ops.beside(*same), 0, x.shape[1]), x)

    return block


@given(blocks(), st.sampled_from(WIDTHS), st.sampled_from((0, 1, 3, 40)))
def test_a_program_gives_the_bits_of_its_operations(block: Callable[..., None], width: int, rows: int) -> None:
    ops = CpuOps()
    program = ops.fused(block, (width,), 1)
    assert program is not None
    step, cache = step_of(ops, rows)
    expected = random(rows, width)
    given, again = expected.copy(), expected.copy()
    block(expected, step, cache.layers)
    for x in (given, again):  # what a call leaves in memory doesn't matter to the next
        program(x, step, cache.layers)
        np.testing.assert_array_equal(x, expected)


HIDDEN, VOCABULARY = 8, 11
TABLE = np.random.default_rng(5).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def embedding() -> Any:
    packed = cpu_embedding.PackedTable(_native.Embedding("f32", TABLE, HIDDEN, None, None, 1), None)
    return cpu_embedding.bind([packed])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted), min_size=1, max_size=3),
    st.sampled_from(("all", "named", "among")),
)
def test_the_last_rows_go_on_alone(sizes: list[list[int]], names: str) -> None:
    """Of each sequence some or none, from tokens to tokens; by a program, operation by operation, and as NumPy says."""
    ops, rows = CpuOps(), embedding()
    ids = {"all": None, "named": np.arange(HIDDEN) * 3, "among": np.array([1, 4, 6])}[names]
    cache = KVCache([CacheLayer(1, 16, "f32")], max_pages=8)
    tokens = np.random.default_rng(len(sizes)).integers(0, VOCABULARY, sum(size for _, size in sizes)).tolist()
    parts, begin = [], 0
    for sequence, (wanted, size) in enumerate(sizes):
        parts.append(Part(sequence, tokens[begin : begin + size], wanted))
        begin += size
    batch = cache.batch(parts)

    def block(tokens: Any, to: Any, before: Any, after: Any, x: Any, step: Any, caches: Any) -> None:
        ops.add(rows(tokens), x)
        both = ops.beside(x, x)
        step, x, both = ops.narrow(step, x, both)
        ops.add(ops.cut(both, HIDDEN, 2 * HIDDEN), x)
        ops.best_tokens(ops.computed(x), ids, names == "among", to, before, after)

    program = ops.fused(block, (0, 0, 1, 1, HIDDEN), 1)
    assert program is not None
    given = random(len(tokens), HIDDEN)
    doubled = 2 * (TABLE[batch.token_ids] + given)[batch.logit_rows]
    columns = doubled if names != "among" else doubled[:, ids]
    best = columns.argmax(axis=1) if len(columns) else np.empty(0, np.int64)
    exponentials = np.exp(columns.astype(np.float64))
    share = exponentials.max(axis=1, initial=0) / exponentials.sum(axis=1)
    for run in (block, program):
        x, to = given.copy(), np.full(len(batch.logit_rows), -1)
        before, after = np.full(len(to), 0.5, np.float32), np.empty(len(to), np.float32)
        run(batch.token_ids, to, before, after, x, ops.begin(batch), cache.layers)
        np.testing.assert_array_equal(x[: len(to)], doubled)
        np.testing.assert_array_equal(to, best if ids is None else ids[best])
        np.testing.assert_allclose(after, 0.5 * share, rtol=1e-5)


def test_a_chain_goes_on_with_what_it_made() -> None:
    """Each step's tokens are the next one's, for fewer and fewer rows."""
    ops, rows = CpuOps(), embedding()
    cache = KVCache([CacheLayer(1, 16, "f32")], max_pages=8)
    first = cache.batch([Part(sequence, [1] * (1 + sequence), ahead=3 - sequence) for sequence in range(3)])

    def block(tokens: Any, to: Any, before: Any, after: Any, x: Any, step: Any, caches: Any) -> None:
        ops.add(rows(tokens), x)
        ops.best_tokens(x, None, False, to, before, after)

    counts = [3, 2, 1]
    begun = ops.begin(first)
    steps = ops.ahead(begun, counts, cache.page_size)
    assert [step.T for step in steps] == counts and [step.highest for step in steps] == [3, 3, 3]
    program = ops.fused(block, (0, 0, 1, 1, HIDDEN), 1)
    assert program is not None
    before = ops.fused(lambda a, b, c, d, step, caches: None, (1, 1, 1, 1), 1)
    states, tokens = random(3, HIDDEN), np.array([2, 5, 7])

    def run(least: float) -> tuple[int, list[np.ndarray], list[np.ndarray], np.ndarray]:
        x, made, chances = states.copy(), np.full((4, 3), -1), np.ones((4, 3), np.float32)
        made[0] = tokens
        each = (made, made[1:], chances, chances[1:])
        sure = [np.ones((6, 1), np.float32)] * 4
        done = program.chain(before, Chain(sure, each, (x,), counts, 3, least), begun, cache.layers)
        rows = [(made[1 + place, :count], chances[1 + place, :count]) for place, count in enumerate(counts)]
        return done - 1, [one for one, _ in rows], [one for _, one in rows], x

    done, made, chances, x = run(0.0)
    assert done == 3
    expected, known, chance = states.copy(), tokens, np.ones(3)
    for to, found in zip(made, chances, strict=True):
        known, chance = known[: len(to)], chance[: len(to)]
        expected[: len(to)] += TABLE[known]
        known = expected[: len(to)].argmax(axis=1)
        exponentials = np.exp(expected[: len(to)].astype(np.float64))
        chance = chance * exponentials.max(axis=1) / exponentials.sum(axis=1)
        np.testing.assert_array_equal(to, known)
        np.testing.assert_allclose(found, chance, rtol=1e-5)
    np.testing.assert_array_equal(x, expected)
    # It ends behind the first pass of which no row is sure enough.
    for least, passes in ((1.5 * chances[0].max(), 1), (chances[1].max(), 3), (1.01 * chances[1].max(), 2)):
        done, ended, _, _ = run(float(least))
        assert done == passes
        assert all((one == -1).all() for one in ended[passes:])
        assert all(np.array_equal(*both) for both in zip(ended[:passes], made, strict=False))


def test_what_a_pass_cannot_be_narrowed_to() -> None:
    ops = CpuOps()
    cache = KVCache([CacheLayer(1, 16, "f32")], max_pages=8)
    batch = cache.batch([Part(0, [1, 2, 3])])
    for wanted in ([0], [0, 2], [2, 2], [3], [1]):
        step = ops.begin(replace(batch, logit_rows=np.array(wanted)))
        with pytest.raises(ValueError, match="aren't the last of their sequences"):
            ops.narrow(step, random(3, 8))
    masked = ops.begin(replace(batch, mask=np.tril(np.ones((3, 3), np.uint8))))
    with pytest.raises(ValueError, match="or a mask says what they see"):
        ops.narrow(masked, random(3, 8))


def test_a_token_that_no_table_has_is_refused() -> None:
    rows = embedding()
    program = CpuOps().fused(lambda tokens, x, step, caches: CpuOps().assign(rows(tokens), x), (0, HIDDEN), 0)
    assert program is not None
    step, _ = step_of(CpuOps(), 2)
    with pytest.raises(ValueError, match="token id 11 is not among the 11 rows"):
        program(np.array([3, VOCABULARY]), random(2, HIDDEN), step, [])


def looks(x: Any, step: Any, caches: Any) -> None:
    if x[0, 0] > 0:
        CpuOps().add(x, x)


def converts(x: Any, step: Any, caches: Any) -> None:
    CpuOps().add(np.asarray(x), x)


def converts_a_norm(x: Any, step: Any, caches: Any) -> None:
    norm = CpuOps().norm(np.ones(8, np.float32), 1e-5, 0.0)
    CpuOps().add(np.asarray(norm(x)), x)


def computes(x: Any, step: Any, caches: Any) -> None:
    CpuOps().add(x * np.float32(2), x)


def mixes(x: Any, step: Any, caches: Any) -> None:
    CpuOps().scale_by_sigmoid(x, np.ones((3, 1), np.float32))


def copies(x: Any, step: Any, caches: Any) -> None:
    CpuOps().add(CpuOps().copy(x), x)


@pytest.mark.parametrize("block", [looks, converts, converts_a_norm, computes, mixes, copies])
def test_a_block_that_looks_into_numbers_is_no_program(block: Callable[..., None]) -> None:
    assert CpuOps().fused(block, (8,), 0) is None
    block(random(3, 8), None, [])  # but runs


def test_routing_is_a_step() -> None:
    ops, results = CpuOps(), []
    route = ops.route(Routing(2), ops.vector([0.5, 0, 0, 0, 0, 0, 0, 0]))

    def block(x: Any, step: Any, caches: Any) -> None:
        chosen = route(x)
        assert isinstance(chosen, Chosen)
        results.append(chosen)
        ops.add(ops.cut(ops.beside(chosen.weights, chosen.weights, chosen.weights, chosen.weights), 0, 8), x)

    program = ops.fused(block, (8,), 0)
    assert program is not None
    step, _ = step_of(ops, 5)
    x = random(5, 8)
    expected = x.copy()
    program(x, step, [])
    block(expected, step, [])
    np.testing.assert_array_equal(x, expected)
    assert len(results) == 2


def test_steps_are_timed_by_their_labels() -> None:
    ops = CpuOps()

    def block(x: Any, step: Any, caches: Any) -> None:
        with labelled("twice"):
            ops.add(x, x)
            ops.add(x, x)
        ops.scale_by_sigmoid(x, ops.cut(x, 0, 1))

    program = ops.fused(block, (64,), 0)
    assert program is not None and program.labels == ["twice", "twice", "", ""]
    nanoseconds = program.timed()
    step, _ = step_of(ops, 100)
    program(random(100, 64), step, [])
    assert (nanoseconds > 0).all()


def test_a_signal_ends_a_program_that_takes_long() -> None:
    ops = CpuOps()

    def block(x: Any, step: Any, caches: Any) -> None:
        for _ in range(20000):
            ops.add(x, x)

    program = ops.fused(block, (4096,), 0)
    assert program is not None
    step, _ = step_of(ops, 100)
    x = np.zeros((100, 4096), np.float32)

    class Rang(Exception):
        pass

    def ring(number: int, frame: Any) -> None:
        raise Rang

    before = signal.signal(signal.SIGALRM, ring)
    begin = time.perf_counter()
    try:
        program(x, step, [])
        whole = time.perf_counter() - begin
        signal.setitimer(signal.ITIMER_REAL, whole / 10)
        with pytest.raises(Rang):
            for _ in range(3):
                program(x, step, [])
                pytest.fail("the program ran to its end")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
