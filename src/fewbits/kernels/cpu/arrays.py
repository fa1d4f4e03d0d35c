"""Memory for activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_POOLED = 1 << 16  # numbers; arrays of fewer stay in malloc's heap between calls


def empty(rows: int, columns: int) -> NDArray[Any]:
    """An uninitialized float32 [rows, columns]. Large ones come from a pool: malloc gives their pages back to the
    system, and the next one's would be faulted in anew.
    """
    if rows * columns < _POOLED:
        return np.empty((rows, columns), np.float32)
    from fewbits import _native

    return _native.pooled(rows, columns)
