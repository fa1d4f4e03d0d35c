"""The operations that models are written against, beside the linear and embedding kernels.

One implementation is a back end: `reference.ops` in NumPy, `cpu.ops` in native code. Arrays are opaque to
`nn` and `models`: float32 `[T, width]`, made and consumed here. What a layer needs every time (weights, head
counts, scales) is bound once, when the model is built; a call gets activations and the step.

Every row of every result has the same bits whatever other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fewbits.kernels.batch import Batch, LayerCache
from fewbits.kernels.rope import Rope

Array = Any  # an activation or a weight vector: whatever the back end's arrays are
Activation = Literal["silu"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """One layer's attention: grouped queries, rotary embedding, optional per-head norms, window and sinks.

    Query head h reads key/value head h // (heads / kv_heads). `window`: a token sees an entry only if its
    position is less than `window` away, 0 for no limit. `q_norm`, `k_norm` (vectors [head_dim]) are RMS norms
    of each head before the rotation. `sinks` (vector [heads]) are logits that take part in the softmax
    without a value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    window: int = 0
    q_norm: Array | None = None
    k_norm: Array | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0
    sinks: Array | None = None


class Attention(Protocol):
    """An `AttentionSpec`, bound. `q` is [T, heads x head_dim], `k` and `v` are [T, kv_heads x head_dim]."""

    def rope_and_append(self, q: Array, k: Array, v: Array, step: Any, cache: LayerCache) -> None:
        """Norm and rotate q (in place) and k; store k and v, rounded to the cache's dtype, at their slots."""

    def attend(self, q: Array, step: Any, cache: LayerCache) -> Array:
        """softmax(scale q K^T) V over what each token sees: [T, heads x head_dim]."""


class Ops(Protocol):
    """A back end."""

    name: str

    def vector(self, values: Any) -> Array:
        """A weight vector (a norm's, sinks) from any array of numbers."""

    def norm(self, weight: Array, eps: float, offset: float) -> Callable[[Array], Array]:
        """Bound RMS norm: y = x / sqrt(mean(x^2) + eps) x (weight + offset), over rows of x.

        A product's input, and perhaps computed no sooner than there: x must be as it was until then.
        """

    def gate(self, activation: Activation) -> Callable[[Array, Array], Array]:
        """Bound gated activation: (gate, up) → activation(gate) x up; a product's input, as `norm`'s result."""

    def attention(self, spec: AttentionSpec) -> Attention: ...

    def begin(self, batch: Batch) -> Any:
        """The step: what one forward pass derives from its batch once, for all layers."""

    def take(self, x: Array, rows: Any) -> Array:
        """Rows of x as a new array; `rows` is int64 [R]."""

    def copy(self, x: Array) -> Array: ...

    def argmax(self, logits: Array) -> Any:
        """int64 [R]: of each row of logits [R, V] the first NaN, or else the first of the largest."""
