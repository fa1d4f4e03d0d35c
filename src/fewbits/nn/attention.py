"""The attention block: projections, rotation, cache and softmax."""

from __future__ import annotations

from typing import Any

from fewbits.kernels.batch import LayerCache
from fewbits.kernels.ops import AttentionSpec, Ops
from fewbits.nn.linear import Linear, Param


class Attention:
    __slots__ = ("_attention", "_output", "_projections")

    def __init__(self, spec: AttentionSpec, q: Param, k: Param, v: Param, output: Param, ops: Ops) -> None:
        self._projections = Linear(q, k, v)
        self._output = Linear(output)
        self._attention = ops.attention(spec)

    def __call__(self, x: Any, residual: Any, step: Any, cache: LayerCache) -> None:
        """residual += attention(x), in place. Appends the batch's keys and values to the cache."""
        q, k, v = self._projections(x)
        self._attention.rope_and_append(q, k, v, step, cache)
        self._output.add_to(self._attention.attend(q, step, cache), residual)
