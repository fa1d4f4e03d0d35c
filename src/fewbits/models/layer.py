"""A layer of a decoder: attention and feed-forward, each behind its norm; and layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fewbits.kernels.batch import LayerCache
from fewbits.kernels.ops import Ops
from fewbits.models.attention import AnyAttention
from fewbits.models.feed_forward import FeedForward
from fewbits.models.needs import Need


@dataclass(frozen=True, slots=True)
class LayerConfig:
    attention: AnyAttention
    feed_forward: FeedForward

    def modules(self, name: str, hidden: int, stored: Container[str]) -> Iterator[Need]:
        yield Need(f"{name}.input_layernorm", "norm", (hidden,))
        yield from self.attention.modules(f"{name}.self_attn", hidden, hidden)
        yield Need(f"{name}.post_attention_layernorm", "norm", (hidden,))
        yield from self.feed_forward.modules(name, hidden, stored)


class Layer:
    """Attention and feed-forward, each behind its norm; x is changed in place. `name` is its modules' in `params`."""

    __slots__ = ("_attention", "_feed_forward", "_input_norm", "_post_norm")

    def __init__(
        self, config: LayerConfig, name: str, norm: tuple[float, float], params: Mapping[str, Any], ops: Ops
    ) -> None:
        """`norm` has the epsilon of its norms and what is added to their weights."""
        self._input_norm = ops.norm(params[f"{name}.input_layernorm"], *norm)
        self._attention = config.attention.make(f"{name}.self_attn", norm, params, ops)
        self._post_norm = ops.norm(params[f"{name}.post_attention_layernorm"], *norm)
        self._feed_forward = config.feed_forward.make(name, params, ops)

    def __call__(self, x: Any, step: Any, cache: LayerCache) -> None:
        self._attention(self._input_norm(x), x, step, cache)
        self._feed_forward.add_to(self._post_norm(x), x)


class Stack:
    """Layers one after the other; as many as the back end can fuse are one call. x [T, hidden] is changed in place."""

    __slots__ = ("_parts",)

    def __init__(self, layers: Sequence[Layer], hidden: int, ops: Ops) -> None:
        def fused(some: Sequence[Layer]) -> Callable[..., None] | None:
            return ops.fused(_in_turn(some), (hidden,), len(some))

        self._parts: list[tuple[int, Callable[..., None]]] = []
        for fuses, neighbours in groupby(layers, lambda layer: fused([layer]) is not None):
            some = list(neighbours)
            self._parts.append((len(some), (fuses and fused(some)) or _in_turn(some)))

    def __call__(self, x: Any, step: Any, caches: Sequence[LayerCache]) -> None:
        begin = 0
        for count, run in self._parts:
            run(x, step, caches[begin : begin + count])
            begin += count


def _in_turn(layers: Sequence[Layer]) -> Callable[..., None]:
    def run(x: Any, step: Any, caches: Sequence[LayerCache]) -> None:
        for layer, cache in zip(layers, caches, strict=True):
            layer(x, step, cache)

    return run
