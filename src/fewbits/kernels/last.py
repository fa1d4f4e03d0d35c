"""Of a pass, the rows and tokens that are wanted: what back ends whose arrays are NumPy's share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.ops import Array, Ops


def closed_up(arrays: Sequence[Array], rows: Sequence[int]) -> list[Array]:
    """These rows of each array, which are put at its beginning."""
    for array in arrays:
        array[: len(rows)] = array[rows]
    return [array[: len(rows)] for array in arrays]


def best_tokens(
    ops: Ops, logits: Array, ids: NDArray[np.int64] | None, among: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`Ops.best_tokens` by an `argmax`: tokens int64 [R], their probabilities float32 [R]."""
    some = np.ascontiguousarray(logits[:, ids]) if among else logits
    found: NDArray[np.int64] = ops.argmax(some)
    largest = some[np.arange(len(some)), found]
    share = 1 / np.exp((some - largest[:, np.newaxis]).astype(np.float64)).sum(axis=1)
    return found if ids is None else ids[found], share.astype(np.float32)
