"""Arrays for activations: whoever holds one, or a view of one, has its memory alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_weights import WEIGHTS, random_linear

from fewbits.kernels.cpu import linear
from fewbits.kernels.cpu.arrays import Gated, Normed, empty


@pytest.mark.parametrize("shape", [(1, 3), (512, 2048), (1, 200_000), (0, 5)])
def test_an_array_is_what_was_asked_for(shape: tuple[int, int]) -> None:
    array = empty(*shape)
    assert (array.shape, array.dtype) == (shape, np.float32)
    assert array.flags.c_contiguous and array.flags.writeable


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=40))
def test_no_two_arrays_share_memory(requests: list[tuple[int, bool]]) -> None:
    held: list[tuple[int, np.ndarray]] = []
    for number, (rows, view) in zip(itertools.count(), requests):
        array = empty(rows, 70_000)
        array[:] = number
        held.append((number, array[-1:, :100] if view else array))
        if number % 3 == 2:
            del held[len(held) // 2]
        del array
    assert all((array == number).all() for number, array in held)


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    part = empty(64, 70_000)[1:2]
    others = {empty(64, 70_000).ctypes.data for _ in range(10)}
    assert len(others) == 1
    assert not others & {part.ctypes.data - 70_000 * 4}


@pytest.mark.parametrize("M", [1, 3, 300])
@pytest.mark.parametrize("add", [False, True])
def test_rows_computed_in_a_product_have_the_bits_of_those_computed_before(M: int, add: bool) -> None:
    random = np.random.default_rng(M)
    x, other = random.standard_normal((2, M, 64), np.float32)
    weight = random.standard_normal(64, np.float32)
    product = linear.bind([linear.pack(random_linear(WEIGHTS["int4-g32"], (40, 64)))])
    silu, bounded, oai = ("silu", 0.0), ("silu", 0.5), ("swiglu_oai", 0.5)
    for rows in (Normed(x, weight, 1e-5, 1.0), *(Gated(x, other, one) for one in (silu, bounded, oai))):
        sums = [np.ones((M, 40), np.float32) if add else None for _ in range(2)]
        (inside,), (before,) = product(rows, sums[0]), product(np.asarray(rows), sums[1])
        np.testing.assert_array_equal(inside, before)


def test_rows_are_those_of_the_definition() -> None:
    x, up = np.random.default_rng(0).standard_normal((2, 5, 70))
    x32, up32, weight = x.astype(np.float32), up.astype(np.float32), np.full(70, 0.5, np.float32)
    normed = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * 1.5
    np.testing.assert_allclose(np.asarray(Normed(x32, weight, 1e-5, 1.0)), normed, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(Gated(x32, up32, ("silu", 0.0))), x / (1 + np.exp(-x)) * up, rtol=1e-5)
