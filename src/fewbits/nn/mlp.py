"""The gated feed-forward block."""

from __future__ import annotations

from typing import Any

from fewbits.kernels import Param
from fewbits.kernels.ops import Activation, Ops
from fewbits.nn.linear import Linear


class Mlp:
    """down(activation(gate(x), up(x)))."""

    __slots__ = ("_down", "_gate", "_gate_up")

    def __init__(self, activation: Activation, gate: Param, up: Param, down: Param, ops: Ops) -> None:
        self._gate_up = Linear(gate, up)
        self._down = Linear(down)
        self._gate = ops.gate(activation)

    def __call__(self, x: Any) -> Any:
        (y,) = self._down(self._gate(*self._gate_up(x)))
        return y

    def add_to(self, x: Any, residual: Any) -> None:
        """residual += its result, in place."""
        self._down.add_to(self._gate(*self._gate_up(x)), residual)
