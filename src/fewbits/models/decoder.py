"""The one decoder, and the description of it that each family fills in.

    x = embedding(token_ids)
    per layer:  x += attention(norm(x));  x += feed_forward(norm(x))
    logits = head(norm(x[logit_rows]))

Layers are a list, so whatever differs between layers (heads, windows, rotations) needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbits.kernels.batch import Batch, Cache, CacheDtype, CacheLayer
from fewbits.kernels.ops import Ops
from fewbits.models.feed_forward import MoeConfig
from fewbits.models.layer import Layer, LayerConfig, Stack
from fewbits.models.mtp import MtpConfig
from fewbits.models.needs import Need
from fewbits.nn.embedding import Embedding, Head

_LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """`max_positions` is the context that the checkpoint states, None where it states none. `mtp_layers` follow the
    last layer in the file: they predict tokens further ahead, and aren't part of the model. `mtp` describes them where
    fewbits can draft with them, and they are loaded where the model `drafts`.

    Where the file has no head the embedding is the head, also against `tied`, which the plan then warns of.
    """

    vocab: int
    hidden: int
    layers: tuple[LayerConfig, ...]
    tied: bool
    norm_eps: float
    norm_offset: float = 0.0
    max_positions: int | None = None
    mtp_layers: int = 0
    mtp: MtpConfig | None = None
    drafts: bool = False

    def modules(self, stored: Container[str] = ()) -> list[Need]:
        """Every module, in the order of the forward pass, by the checkpoint's names: where families have several, those
        that are among the `stored`.
        """
        embedding = "model.embed_tokens"
        table = (self.vocab, self.hidden)
        needs = [Need(embedding, "embedding", table)]
        for index, layer in enumerate(self.layers):
            needs += layer.modules(f"{_LAYERS}{index}", self.hidden, stored)
        needs.append(Need("model.norm", "norm", (self.hidden,)))
        needs.append(Need("lm_head", "head", table, tied_to=embedding))
        if self.drafts and self.mtp is not None:
            needs += self.mtp.modules(stored)
        return needs

    def why_not(self, name: str) -> str:
        """Why a stored module isn't run, "" where there is nothing to say but that the model doesn't have it."""
        if self.mtp_layers and len(self.layers) <= _layer_of(name) < len(self.layers) + self.mtp_layers:
            how = "--draft mtp drafts with it" if self.mtp is not None else "fewbits doesn't draft with it yet"
            return f"multi-token prediction (MTP), which guesses tokens further ahead; {how}"
        return ""

    def share_of_tokens(self, expert: str) -> float:
        """Which share of all tokens a module of an expert gets, if its router prefers none."""
        block = self.layers[_layer_of(expert)].feed_forward
        return block.routing.top_k / block.experts if isinstance(block, MoeConfig) else 1.0

    def attention_name(self, layer: int, stored: Container[str] = ()) -> str:
        """The module whose keys and values a layer of the cache holds, by the checkpoint's names."""
        return f"{_LAYERS}{layer}.self_attn"

    def cache_layers(
        self,
        dtype: CacheDtype,
        scales: Mapping[int, tuple[Sequence[float], Sequence[float]]] | None = None,
    ) -> tuple[CacheLayer, ...]:
        """What each layer keeps, in `dtype`; in fp8 where `scales` has the layer's (k_scale, v_scale).

        A scale is one multiplier for the layer or one per key/value head.
        """
        layers = []
        for index, layer in enumerate(self.layers):
            kept = layer.attention.cache_layer(dtype)
            if scales and index in scales:
                k_scale, v_scale = (_per_head(scale, kept.heads) for scale in scales[index])
                kept = replace(kept, dtype="fp8", k_scale=k_scale, v_scale=v_scale)
            layers.append(kept)
        return tuple(layers)


def _layer_of(name: str) -> int:
    """The layer that a module belongs to, -1 where it is none's."""
    number = name[len(_LAYERS) :].partition(".")[0] if name.startswith(_LAYERS) else ""
    return int(number) if number.isdecimal() and len(number) < 5 else -1


def _per_head(scale: Sequence[float], heads: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in scale)
    if len(values) not in (1, heads):
        raise ValueError(f"{len(values)} scales for {heads} heads")
    return values * heads if len(values) == 1 else values


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """`logits` float32 [R, V]; `taps` one [T, H] for each boundary asked for, in that order."""

    logits: Any
    taps: list[Any]


class Decoder:
    """A model, ready to run.

    `params` has an entry for every module of `config.modules(params)`: (kernel, packed weight) for linear layers,
    the embedding and the head (a tied head is packed separately), a vector of `ops.vector` for norms and the like.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any], ops: Ops) -> None:
        self.config = config
        self.ops = ops
        self._embedding = Embedding(params["model.embed_tokens"])
        norm = (config.norm_eps, config.norm_offset)
        self._layers = [
            Layer(layer, f"{_LAYERS}{index}", norm, params, ops) for index, layer in enumerate(config.layers)
        ]
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._norm = ops.norm(params["model.norm"], *norm)
        self._head = Head(params["lm_head"])

    def forward(self, batch: Batch, cache: Cache, taps: Sequence[int] = ()) -> Output:
        """Run a batch whose slots are allocated in `cache`; its keys and values are stored there.

        `taps` are layer boundaries whose states are wanted: 0 is the embedding, i the output of layer i - 1.
        They are copies of the residual stream, before the next norm.
        """
        ops = self.ops
        step = ops.begin(batch)
        x = self._embedding(batch.token_ids)
        boundaries = tuple(sorted(set(taps)))
        states = {boundary: ops.copy(x) for boundary in boundaries}
        self._stack(boundaries)(x, step, cache.layers, list(states.values()))
        logits = self._head(self._norm(ops.take(x, batch.logit_rows)))
        return Output(logits, [states[boundary] for boundary in taps])

    def _stack(self, taps: tuple[int, ...]) -> Stack:
        """All layers, tapped at these boundaries."""
        found = self._stacks.get(taps)
        if found is None:
            found = self._stacks[taps] = Stack(self._layers, self.config.hidden, self.ops, taps)
        return found
