"""Projections that share an input: one call, each weight with its own spec and scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from fewbits.kernels import Kernel, LinearRunner

Param = tuple[Kernel, Any]  # a kernel and a weight that it packed


class Linear:
    """x float32 [M, K] → a tuple of float32 [M, N_i], one per weight."""

    __slots__ = ("_run",)

    def __init__(self, *params: Param) -> None:
        self._run = bind(params)

    def __call__(self, x: Any) -> tuple[Any, ...]:
        return self._run(x)

    def add_to(self, x: Any, residual: Any) -> None:
        """residual += the product, in place; for a single weight."""
        self._run(x, residual)


def bind(params: Sequence[Param]) -> LinearRunner:
    """One runner for the weights; neighbours of the same kernel are one call of it."""
    runs = [
        kernel.bind([packed for _, packed in group]) for kernel, group in groupby(params, key=lambda param: param[0])
    ]
    if len(runs) == 1:
        only: LinearRunner = runs[0]
        return only

    def chain(x: Any, add_to: Any = None) -> tuple[Any, ...]:
        if add_to is not None:
            raise ValueError("only a single weight can be added to a residual")
        return tuple(y for run in runs for y in run(x))

    return chain
