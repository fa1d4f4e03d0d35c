"""Activations: memory for them, and rows that are computed on the way into a product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits import _native

Array = NDArray[Any]

_POOLED = 1 << 16  # numbers; arrays of fewer stay in malloc's heap between calls
_address = _native.address


def empty(rows: int, columns: int) -> Array:
    """An uninitialized float32 [rows, columns]. Large ones come from a pool: malloc gives their pages back to the
    system, and the next one's would be faulted in anew.
    """
    if rows * columns < _POOLED:
        return np.empty((rows, columns), np.float32)
    return _native.pooled(rows, columns)


class Rows(ABC):
    """Rows, float32 [M, K], of what arrays hold when they are used: a product computes them as it takes them in, NumPy
    (`np.asarray`) gets an array.
    """

    dtype = np.dtype(np.float32)
    __slots__ = ("shape",)
    shape: tuple[int, int]

    @abstractmethod
    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        """What `gemm.run` does with an array."""

    @abstractmethod
    def _store(self, y: Array) -> None: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        y = empty(*self.shape)
        self._store(y)
        return y if dtype is None else y.astype(dtype, copy=False)


class Normed(Rows):
    """An RMS norm of the rows of x."""

    __slots__ = ("_eps", "_offset", "_weight", "_x")

    def __init__(self, x: Array, weight: Array, eps: float, offset: float) -> None:
        self.shape = x.shape
        self._x, self._weight, self._eps, self._offset = x, weight, eps, offset

    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        M, _ = self.shape
        gemm.run_norm(_address(self._x), _address(self._weight), self._eps, self._offset, M, y, add)

    def _store(self, y: Array) -> None:
        M, K = self.shape
        _native.rms_norm(_address(self._x), _address(self._weight), _address(y), M, K, self._eps, self._offset)


class Gated(Rows):
    """What an `ops.Activation`, as (name, limit), makes of gate and up."""

    __slots__ = ("_activation", "_gate", "_up")

    def __init__(self, gate: Array, up: Array, activation: tuple[str, float]) -> None:
        self.shape = gate.shape
        self._gate, self._up, self._activation = gate, up, activation

    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        M, _ = self.shape
        gemm.run_gated(_address(self._gate), _address(self._up), *self._activation, M, y, add)

    def _store(self, y: Array) -> None:
        M, K = self.shape
        _native.gated(_address(self._gate), _address(self._up), _address(y), M, K, *self._activation)
