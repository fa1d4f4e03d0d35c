"""The operations that models are written against, beside the linear and embedding kernels.

One implementation is a back end: `reference.ops` in NumPy, `cpu.ops` in native code. Arrays are opaque to
`nn` and `models`: float32 `[T, width]`, made and consumed here. What a layer needs every time (weights, head
counts, scales) is bound once, when the model is built; a call gets activations and the step.

Every row of every result has the same bits whatever other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from fewbits.kernels import Param
from fewbits.kernels.batch import Batch, LayerCache
from fewbits.kernels.rope import Rope

Array = Any  # an activation or a weight vector: whatever the back end's arrays are


ActivationName = Literal["silu", "swiglu_oai"]


@dataclass(frozen=True, slots=True)
class Activation:
    """How gate and up become one. A `limit` other than 0 bounds factors from above, and up from below too.

    silu: silu(gate) x up; the limit is for silu(gate) and up. swiglu_oai: gate x sigmoid(1.702 gate) x (up + 1); the
    limit is for gate and up, before anything else.
    """

    name: ActivationName = "silu"
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts follow from its logits.

    The `top_k` best scores (softmax or sigmoid of the logits) are chosen, of equals the lower number; where there is a
    bias, it is added for the choice alone. A weight is its score, divided by `epsilon` plus the sum of those chosen
    where `normalize`, times `scale`.

    Experts are `groups` of neighbours: only those of the `kept_groups` best are chosen, a group being as good as the
    sum of its `group_best` best experts, bias included; of equals the lower number again.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1


class Chosen(NamedTuple):
    """Numbers of experts int32 [T, top_k], best first, and their weights float32 [T, top_k]."""

    experts: Any
    weights: Any


class Expert(NamedTuple):
    """The packed weights of one expert, each with its own spec and scales: gate and up, or one that has gate's rows and
    behind them up's; and down.
    """

    inputs: tuple[Param, ...]
    down: Param


class Experts(Protocol):
    """Experts, bound."""

    def __call__(self, x: Array, chosen: Chosen, add_to: Array) -> None:
        """add_to += the sum over a row's chosen experts of weight x down(activation(gate(x), up(x))), in place.

        The sum is float32 and in the order of the experts' numbers; `add_to` may not be what x is computed from.
        """


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """One layer's attention: grouped queries, rotary embedding, optional per-head norms, window and sinks.

    Query head h reads key/value head h // (heads / kv_heads). Values are `value_dim` wide, by default as keys are.
    `window`: a token sees an entry only if its
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
    value_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)


class Attention(Protocol):
    """An `AttentionSpec`, bound. `q` is [T, heads x head_dim], `k` [T, kv_heads x head_dim], `v` [T, kv_heads x
    value_dim]; None where the cache keeps latents: values are the first `value_dim` numbers of keys.
    """

    def rope_and_append(self, q: Array, k: Array, v: Array | None, step: Any, cache: LayerCache) -> None:
        """Norm and rotate q (in place) and k; store k and v, rounded to the cache's dtype, at their slots."""

    def attend(self, q: Array, step: Any, cache: LayerCache) -> Array:
        """softmax(scale q K^T) V over what each token sees: [T, heads x value_dim]."""


class Latents(Protocol):
    """A product that makes keys and values of latents, in the halves of `kernels/latent.py`."""

    @property
    def taken(self) -> Callable[[Array], Array]:
        """Latents float32 [T, rank] → what the product takes of them: quantized, where it has its input so."""

    def bind(self) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """(queries [T, heads x key] → [T, heads x rank], [T, heads x rank] → values [T, heads x value])."""


class Chain(NamedTuple):
    """A pass on arrays and passes that follow it, each of so many `rows`: pass i gets array[i] of `each` and the
    `shared` arrays. They end behind one whose array number `chances`, float32 [T], is nowhere `least` or more.
    """

    arrays: Sequence[Any]
    each: Sequence[Any]
    shared: Sequence[Any]
    rows: Sequence[int]
    chances: int
    least: float


class Fused(Protocol):
    """A block that is one call."""

    def __call__(self, *arguments: Any) -> None: ...

    def chain(self, first: Any, chain: Chain, step: Any, caches: Sequence[LayerCache]) -> int:
        """A pass of `first`, another block of the same layers, and of this one those behind it, `ahead` of its step.
        Returns how many there were.
        """


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

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        """Bound routing: logits [T, experts] → who computes which token. `bias` is a vector [experts]."""

    def experts(self, experts: Sequence[Expert], activation: Activation) -> Experts: ...

    def scale_by_sigmoid(self, x: Array, gates: Array) -> None:
        """Multiply, in place, each of the `heads` equal parts of a row of x by the sigmoid of its gate [T, heads]."""

    def add(self, x: Array, to: Array) -> None:
        """to += x, in place."""

    def assign(self, x: Array, to: Array) -> None:
        """to = x, in place; x may be computed from what `to` holds by one norm."""

    def computed(self, x: Array) -> Array:
        """`norm`'s or `gate`'s result as an array, for those who take it in more than once."""

    def beside(self, *parts: Array, heads: int = 1) -> Array:
        """Rows of the parts, joined: [T, the sum of their widths]; head by head where a row is of several."""

    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> Fused | None:
        """A block of these operations and of kernels as one call, or None where the back end has none for it.

        `block(*arrays, step, caches)` changes arrays [T, width], which nothing but operations looks into, in place; a
        width of 0 is that of tokens, int64 [T]. `caches` is how many layers' it takes.
        """

    def begin(self, batch: Batch) -> Any:
        """The step: what one forward pass derives from its batch once, for all layers."""

    def empty(self, rows: int, width: int) -> Array:
        """An array to be filled."""

    def tokens(self, rows: int, width: int) -> Any:
        """As `empty`, int64."""

    def narrow(self, step: Any, *arrays: Array) -> tuple[Any, ...]:
        """From here on only the rows of the batch's `logit_rows`, which are the last of their sequences: the step that
        they are, and these rows of the arrays, in place at their beginning. Once in a block, and never before keys and
        values of all rows are stored.
        """

    def ahead(self, step: Any, rows: Sequence[int], page_size: int) -> list[Any]:
        """Steps behind one whose block table has the pages that they take: each of one token more of the first so many
        sequences, as many as before or fewer.
        """

    def take(self, x: Array, rows: Any) -> Array:
        """Rows of x as a new array; `rows` is int64 [R]."""

    def copy(self, x: Array) -> Array: ...

    def cut(self, x: Array, begin: int, end: int, heads: int = 1) -> Array:
        """Channels [begin, end) of each of the `heads` equal parts of a row of x: a new array [T, heads x width]."""

    def best_tokens(self, logits: Array, ids: Any | None, among: bool, to: Array, before: Array, after: Array) -> None:
        """to, int64 [R], = what `argmax` finds, as tokens: column j is token ids[j], or without `ids` j. `among`: of
        the columns `ids` alone, which have their tokens' numbers. after, float32 [R], = before x the probability that
        softmax gives the token.
        """

    def argmax(self, logits: Array) -> Any:
        """int64 [R]: of each row of logits [R, V] the first NaN, or else the first of the largest."""
