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

    def __call__(self, x: Any, step: Any, cache: LayerCache, last: bool = False) -> Any:
        """x; of the `last` layer the batch's logit rows."""
        x = self._attention(self._input_norm(x), x, step, cache, last)
        self._feed_forward.add_to(self._post_norm(x), x)
        return x


class Stack:
    """Layers one after the other; as many as the back end can fuse are one call. x [T, hidden] is changed in place.

    `taps` are boundaries between them, 0 before the first, at which x is copied into arrays that the call gets.
    """

    __slots__ = ("_parts",)

    def __init__(self, layers: Sequence[Layer], hidden: int, ops: Ops, taps: Sequence[int] = ()) -> None:
        self._parts: list[tuple[slice, slice, Callable[..., None]]] = []
        tapped, begin = sorted(taps), 0
        first = 0  # of the taps that are left
        for fuses, neighbours in groupby(
            layers, lambda layer: ops.fused(_in_turn([layer], ops), (hidden,), 1) is not None
        ):
            some = list(neighbours)
            end = begin + len(some)
            last = len(tapped) if end == len(layers) else sum(tap < end for tap in tapped)
            own = [tap - begin for tap in tapped[first:last]]
            block = _in_turn(some, ops, own)
            fused = ops.fused(block, [hidden] * (1 + len(own)), len(some)) if fuses else None
            self._parts.append((slice(begin, end), slice(first, last), fused or block))
            begin, first = end, last

    def __call__(self, x: Any, step: Any, caches: Sequence[LayerCache], taps: Sequence[Any] = ()) -> None:
        """`taps` have an array for each, in the order of the boundaries."""
        for layers, own, run in self._parts:
            run(x, *taps[own], step, caches[layers])


def _in_turn(layers: Sequence[Layer], ops: Ops, taps: Sequence[int] = ()) -> Callable[..., None]:
    def run(x: Any, *arguments: Any) -> None:
        *tapped, step, caches = arguments
        waiting = list(zip(taps, tapped, strict=True))
        for boundary in range(len(layers) + 1):
            while waiting and waiting[0][0] == boundary:
                ops.assign(x, waiting.pop(0)[1])
            if boundary < len(layers):
                layers[boundary](x, step, caches[boundary])

    return run
