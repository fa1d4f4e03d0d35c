"""Arrays for activations: whoever holds one, or a view of one, has its memory alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.kernels.cpu.arrays import empty


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
