"""Multi-head latent attention: what all heads' keys and values are made of is one narrow latent a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbits.kernels import Param
from fewbits.kernels.batch import LayerCache
from fewbits.kernels.ops import AttentionSpec, Latents, Ops
from fewbits.nn.linear import Linear

Norm = Callable[[Any], Any]


class LatentAttention:
    """The absorbed form (`kernels/latent.py`): all heads look at the latents, one key of `spec.value_dim` numbers, and
    behind them the rotated part, which is theirs alone.

    `kv_latent` makes of x both parts. `query` makes the queries, or with `from_query`, a norm and a product, the latent
    that they are made of.
    """

    __slots__ = (
        "_attention",
        "_heads",
        "_into",
        "_kv_norm",
        "_of",
        "_ops",
        "_output",
        "_query",
        "_rank",
        "_taken",
        "_x",
    )

    def __init__(
        self,
        spec: AttentionSpec,
        query: Param,
        from_query: tuple[Norm, Param] | None,
        kv_latent: Param,
        kv: tuple[Norm, Latents],
        output: Param,
        ops: Ops,
    ) -> None:
        self._ops, self._heads, self._rank = ops, spec.heads, spec.value_dim
        self._x = Linear(query, kv_latent)
        self._query = None if from_query is None else (from_query[0], Linear(from_query[1]))
        self._kv_norm, latents = kv
        self._taken = latents.taken
        self._into, self._of = latents.bind()
        self._attention = ops.attention(spec)
        self._output = Linear(output)

    def __call__(self, x: Any, residual: Any, step: Any, cache: LayerCache, last: bool = False) -> Any:
        """As `Attention`'s; the cache gets the batch's latents."""
        ops, heads, rank = self._ops, self._heads, self._rank
        q, made = self._x(x)
        if self._query is not None:
            norm, product = self._query
            (q,) = product(norm(q))
        latent = self._taken(self._kv_norm(ops.cut(made, 0, rank)))
        turned = made.shape[1] - rank
        own = q.shape[1] // heads - turned
        q = ops.beside(self._into(ops.cut(q, 0, own, heads)), ops.cut(q, own, own + turned, heads), heads=heads)
        self._attention.rope_and_append(q, ops.beside(latent, ops.cut(made, rank, rank + turned)), None, step, cache)
        if last:
            step, residual, q = ops.narrow(step, residual, q)
        self._output.add_to(self._of(self._attention.attend(q, step, cache)), residual)
        return residual
