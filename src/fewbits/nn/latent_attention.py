"""Multi-head latent attention: what all heads' keys and values are made of is one narrow latent a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbits.kernels import Param
from fewbits.kernels.batch import LayerCache
from fewbits.kernels.ops import AttentionSpec, Ops
from fewbits.nn.linear import Linear

FromLatent = tuple[Callable[[Any], Any], Param]  # the norm of a latent, and the product that takes it


class LatentAttention:
    """The straight form: keys and values of every head are made of the latent once, when it is new, and cached.

    `kv_latent` makes of x the latent [kv_rank] and behind it the part [rope_dim] that all heads' keys share; `kv` makes
    of the latent each head's own part of its key, and behind it its value. `query` makes the queries, or with
    `from_query` the latent that they are made of.
    """

    __slots__ = ("_attention", "_kv", "_kv_norm", "_latents", "_ops", "_output", "_queries", "_rank", "_rope", "_spec")

    def __init__(
        self,
        spec: AttentionSpec,
        kv_rank: int,
        rope_dim: int,
        query: Param,
        from_query: FromLatent | None,
        kv_latent: Param,
        kv: FromLatent,
        output: Param,
        ops: Ops,
    ) -> None:
        self._spec, self._rank, self._rope, self._ops = spec, kv_rank, rope_dim, ops
        self._latents = Linear(query, kv_latent)
        self._queries = None if from_query is None else (from_query[0], Linear(from_query[1]))
        self._kv_norm, self._kv = kv[0], Linear(kv[1])
        self._attention = ops.attention(spec)
        self._output = Linear(output)

    def __call__(self, x: Any, residual: Any, step: Any, cache: LayerCache) -> None:
        """residual += attention(x), in place. Appends the batch's keys and values to the cache."""
        ops, heads = self._ops, self._spec.heads
        own, value = self._spec.head_dim - self._rope, self._spec.value_dim
        q, latent = self._latents(x)
        if self._queries is not None:
            norm, product = self._queries
            (q,) = product(norm(q))
        (kv,) = self._kv(self._kv_norm(ops.cut(latent, 0, self._rank)))
        shared = ops.cut(latent, self._rank, self._rank + self._rope)
        k = ops.with_shared(ops.cut(kv, 0, own, heads), shared, heads)
        v = ops.cut(kv, own, own + value, heads)
        self._attention.rope_and_append(q, k, v, step, cache)
        self._output.add_to(self._attention.attend(q, step, cache), residual)
