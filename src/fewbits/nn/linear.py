"""Projections that share an input: one call, each weight with its own spec and scales."""

from __future__ import annotations

from typing import Any

from fewbits.kernels import Param, bind


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
