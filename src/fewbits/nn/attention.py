"""The attention block: projections, rotation, cache, softmax and, where there is one, a gate for each head."""

from __future__ import annotations

from typing import Any

from fewbits.kernels import Param
from fewbits.kernels.batch import LayerCache
from fewbits.kernels.ops import AttentionSpec, Ops
from fewbits.nn.linear import Linear


class Attention:
    """`gate` [heads, H] makes a sigmoid of x for each head, which its result is multiplied by."""

    __slots__ = ("_attention", "_ops", "_output", "_projections")

    def __init__(
        self, spec: AttentionSpec, q: Param, k: Param, v: Param, output: Param, gate: Param | None, ops: Ops
    ) -> None:
        self._projections = Linear(q, k, v) if gate is None else Linear(q, k, v, gate)
        self._output = Linear(output)
        self._attention = ops.attention(spec)
        self._ops = ops

    def __call__(self, x: Any, residual: Any, step: Any, cache: LayerCache, last: bool = False) -> Any:
        """residual += attention(x), in place. Appends the batch's keys and values to the cache.

        Behind it no other rows of the `last` layer are wanted than the batch's logit rows: it returns the residual, of
        these or all.
        """
        q, k, v, *gates = self._projections(x)
        self._attention.rope_and_append(q, k, v, step, cache)
        if last:
            step, residual, q, *gates = self._ops.narrow(step, residual, q, *gates)
        heads = self._attention.attend(q, step, cache)
        for gate in gates:
            self._ops.scale_by_sigmoid(heads, gate)
        self._output.add_to(heads, residual)
        return residual
