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


def best_tokens(ops: Ops, logits: Array, ids: NDArray[np.int64] | None, among: bool) -> NDArray[np.int64]:
    """`Ops.best_tokens` by an `argmax`; int64 [R]."""
    found: NDArray[np.int64] = ops.argmax(np.ascontiguousarray(logits[:, ids]) if among else logits)
    return found if ids is None else ids[found]
