"""Codes decoded as a whole, or a block of rows at a time where they are still in their file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class _Blocks:
    """`blocks[begin:end]` are the decoded codes of these rows, good until the same thread asks for the next."""

    def __init__(self, stored: Any, decode: Callable[[Array, int], Array]) -> None:
        self._stored, self._decode = stored, decode

    def __getitem__(self, rows: slice) -> Array:
        return self._decode(self._stored[rows], rows.indices(self._stored.shape[0])[0])


def decoded(stored: Array, decode: Callable[[Array, int], Array]) -> Array:
    """`decode(rows, index of the first)` of an array, at once. Of a StoredTensor: what QWeight.codes may be instead of
    an array, with slices of rows and nothing else.
    """
    if isinstance(stored, np.ndarray):
        return decode(stored, 0)
    return cast(Array, _Blocks(stored, decode))
