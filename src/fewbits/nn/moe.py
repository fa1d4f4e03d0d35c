"""The feed-forward block of many experts: a router chooses some for each token, shared ones take every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbits.kernels import Param
from fewbits.kernels.ops import Activation, Chosen, Expert, Ops, Routing
from fewbits.nn.linear import Linear
from fewbits.nn.mlp import Mlp


class Router:
    """x [T, H] → who computes which token."""

    __slots__ = ("_linear", "_route")

    def __init__(self, routing: Routing, param: Param, bias: Any | None, ops: Ops) -> None:
        self._linear = Linear(param)
        self._route = ops.route(routing, bias)

    def __call__(self, x: Any) -> Chosen:
        (logits,) = self._linear(x)
        return self._route(logits)


class SharedExpert:
    """An expert of all tokens; with a gate its result is multiplied by a sigmoid [T, 1] of x."""

    __slots__ = ("_gate", "_mlp", "_ops")

    def __init__(self, mlp: Mlp, gate: Param | None, ops: Ops) -> None:
        self._mlp, self._gate, self._ops = mlp, None if gate is None else Linear(gate), ops

    def add_to(self, x: Any, residual: Any) -> None:
        if self._gate is None:
            self._mlp.add_to(x, residual)
            return
        y, (gate,) = self._mlp(x), self._gate(x)
        self._ops.scale_by_sigmoid(y, gate)
        self._ops.add(y, residual)


class Moe:
    __slots__ = ("_experts", "_ops", "_router", "_shared")

    def __init__(
        self, router: Router, experts: Sequence[Expert], activation: Activation, shared: SharedExpert | None, ops: Ops
    ) -> None:
        self._router, self._shared, self._ops = router, shared, ops
        self._experts = ops.experts(experts, activation)

    def add_to(self, x: Any, residual: Any) -> None:
        """residual += the chosen experts' weighted results and the shared one's, in place."""
        x = self._ops.computed(x)  # from the residual, before anything is added to it
        self._experts(x, self._router(x), residual)
        if self._shared is not None:
            self._shared.add_to(x, residual)
