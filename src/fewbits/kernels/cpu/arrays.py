"""Activations: memory for them, rows that are computed on the way into a product, and values of a program."""

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


class Untraceable(Exception):
    """Something was done to a value that a native program has no step for."""


class Traced:
    """A value float32 [T, width] of a program (`program.py`) that is being recorded: T is known when it runs.

    Whatever looks for numbers in it learns that there are none.
    """

    __slots__ = ("number", "program", "shape")
    dtype = np.dtype(np.float32)

    def __init__(self, program: Any, number: int, width: int) -> None:
        self.program, self.number, self.shape = program, number, (None, width)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(name)

    def _no_numbers(self, *_: Any, **__: Any) -> Any:
        raise Untraceable

    __array__ = __getitem__ = __setitem__ = __iter__ = __len__ = __iadd__ = __add__ = __radd__ = _no_numbers
    __mul__ = __rmul__ = __matmul__ = __bool__ = _no_numbers


Operand = Any  # of an operation: an Array or Rows, or a Traced


class Rows(ABC):
    """Rows, float32 [M, K], of what arrays hold when they are used: a product computes them as it takes them in, NumPy
    (`np.asarray`) gets an array.
    """

    dtype = np.dtype(np.float32)
    __slots__ = ("program", "shape")
    shape: tuple[int, int]
    program: Any  # that is being recorded, None where there are numbers

    @abstractmethod
    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        """What `gemm.run` does with an array."""

    @abstractmethod
    def source(self) -> Any:
        """The rows as a program's step takes them."""

    @abstractmethod
    def _store(self, y: Array) -> None: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self.program is not None:
            raise Untraceable
        y = empty(*self.shape)
        self._store(y)
        return y if dtype is None else y.astype(dtype, copy=False)


class Normed(Rows):
    """An RMS norm of the rows of x."""

    __slots__ = ("_eps", "_offset", "_weight", "_x")

    def __init__(self, x: Operand, weight: Array, eps: float, offset: float) -> None:
        self.shape, self.program = x.shape, program_of(x)
        self._x, self._weight, self._eps, self._offset = x, weight, eps, offset

    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        M, _ = self.shape
        gemm.run_norm(_address(self._x), _address(self._weight), self._eps, self._offset, M, y, add)

    def source(self) -> Any:
        self.program.keep(self._weight)
        return _native.Source.normed(self._x.number, _address(self._weight), self._eps, self._offset)

    def _store(self, y: Array) -> None:
        M, K = self.shape
        _native.rms_norm(_address(self._x), _address(self._weight), _address(y), M, K, self._eps, self._offset)


class Gated(Rows):
    """What an `ops.Activation`, as (name, limit), makes of gate and up."""

    __slots__ = ("_activation", "_gate", "_up")

    def __init__(self, gate: Operand, up: Operand, activation: tuple[str, float]) -> None:
        self.shape, self.program = gate.shape, program_of(gate)
        self._activation, self._gate, self._up = activation, gate, up

    def multiply(self, gemm: Any, y: Sequence[int], add: bool) -> None:
        M, _ = self.shape
        gemm.run_gated(_address(self._gate), _address(self._up), *self._activation, M, y, add)

    def source(self) -> Any:
        return _native.Source.gated(self._gate.number, self._up.number, *self._activation)

    def _store(self, y: Array) -> None:
        M, K = self.shape
        _native.gated(_address(self._gate), _address(self._up), _address(y), M, K, *self._activation)


def program_of(x: Any) -> Any:
    """The program that x is a value of, None where x has numbers."""
    return x.program if isinstance(x, (Traced, Rows)) else None
