"""One native call for several weights that share x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewbits import _native
from fewbits.kernels.cpu.arrays import Operand, Traced, empty, program_of

_address = _native.address


class Runner:
    """Products of native weights with `N` rows each; x is an array or rows that are computed on the way."""

    __slots__ = ("_K", "_N", "_gemm")

    def __init__(self, products: Sequence[Any], N: Sequence[int], apart: bool) -> None:
        self._gemm = _native.Gemm(products, apart)
        self._K = self._gemm.K
        self._N = tuple(N)

    def __call__(self, x: Operand, add_to: Operand = None) -> tuple[Any, ...]:
        M, K = x.shape
        if K != self._K or x.dtype != np.float32:
            raise ValueError(f"x must be float32 [M, {self._K}], not {x.dtype} {list(x.shape)}")
        if add_to is not None and (len(self._N) > 1 or add_to.shape != (M, self._N[0]) or add_to.dtype != np.float32):
            raise ValueError(f"add_to must be float32 [{M}, {self._N[0]}] of a single weight")
        program = program_of(x)
        if program is not None:
            traced: tuple[Traced, ...] = program.multiply(self._gemm, x, self._N, add_to)
            return traced
        y = tuple([empty(M, N) for N in self._N]) if add_to is None else (add_to,)
        addresses = [_address(one) for one in y]
        if isinstance(x, np.ndarray):
            self._gemm.run(_address(x), M, addresses, add_to is not None)
        else:
            x.multiply(self._gemm, addresses, add_to is not None)
        return y
