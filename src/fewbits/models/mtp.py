"""Multi-token prediction (MTP): layers behind a model's last one that guess tokens further ahead.

Module m of a token t_P reads the token m places further on and what the module before it made of t_P (the first one the
model's own last state), and guesses the token behind:

    u = eh_proj([enorm(embedding(t_(P+m))) ; hnorm(state)]);  x = layer(u);  logits = head(norm(x))
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.kernels.batch import Batch, CacheDtype, CacheLayer, LayerCache
from fewbits.kernels.ops import Ops
from fewbits.models.layer import Layer, LayerConfig, Stack
from fewbits.models.needs import Need
from fewbits.nn.embedding import Embedding, Head
from fewbits.nn.linear import Linear


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """`layers`, one a module, stand in the file from number `first` on; `norm` and `head` are what a module calls
    these. `normed`: states are read and handed on behind the norm before the head, else before it.
    """

    hidden: int
    vocab: int
    first: int
    layers: tuple[LayerConfig, ...]
    norm: str
    head: str
    normed: bool
    norm_eps: float
    norm_offset: float

    def modules(self, stored: Container[str]) -> Iterator[Need]:
        for index, layer in enumerate(self.layers):
            yield from self._module(self.name(index), layer, stored)

    def _module(self, name: str, layer: LayerConfig, stored: Container[str]) -> Iterator[Need]:
        H = self.hidden
        instead = "the model's takes its place"
        for norm in ("enorm", "hnorm"):
            yield Need(f"{name}.{norm}", "norm", (H,))
        yield Need(f"{name}.eh_proj", "linear", (H, 2 * H))
        yield from layer.modules(name, H, stored)
        yield Need(f"{name}.{self.norm}", "norm", (H,))
        yield Need(f"{name}.{self.head}", "head", (self.vocab, H), optional=True, instead=instead)

    def name(self, index: int) -> str:
        return f"model.layers.{self.first + index}"

    def cache_layer(self, index: int, dtype: CacheDtype) -> CacheLayer:
        return self.layers[index].attention.cache_layer(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """`logits` float32 [R, V] of the logit rows; `states` [T, H] of all, which the next module reads."""

    logits: Any
    states: Any


class MtpModule:
    """One module. `params` has the model's, and the module's own."""

    def __init__(self, config: MtpConfig, index: int, params: Mapping[str, Any], ops: Ops) -> None:
        name, norm = config.name(index), (config.norm_eps, config.norm_offset)
        self._ops, self._normed = ops, config.normed
        self._embedding = Embedding(params["model.embed_tokens"])
        self._embedding_norm = ops.norm(params[f"{name}.enorm"], *norm)
        self._state_norm = ops.norm(params[f"{name}.hnorm"], *norm)
        self._projection = Linear(params[f"{name}.eh_proj"])
        self._layer = Stack([Layer(config.layers[index], name, norm, params, ops)], config.hidden, ops)
        self._norm = ops.norm(params[f"{name}.{config.norm}"], *norm)
        self._head = Head(params.get(f"{name}.{config.head}", params["lm_head"]))

    def forward(self, batch: Batch, states: Any, cache: LayerCache) -> Guess:
        """Run a batch whose slots are allocated in `cache`; `states` [T, H] are those that belong to its tokens."""
        ops = self._ops
        embedded = self._embedding_norm(self._embedding(batch.token_ids))
        (x,) = self._projection(ops.beside(embedded, self._state_norm(states)))
        self._layer(x, ops.begin(batch), [cache])
        if self._normed:
            x = ops.computed(self._norm(x))
            return Guess(self._head(ops.take(x, batch.logit_rows)), x)
        return Guess(self._head(self._norm(ops.take(x, batch.logit_rows))), x)
