"""Eagle3 drafters: one layer (seldom more) that reads states of a target and the newest token, and guesses the next
one.

    h = fc(states of the target at some boundaries, side by side), or what the drafter gave for the token before
    x = h + attention([norm(embedding) ; norm(h)]);  x += feed_forward(norm(x));  further layers as any decoder's
    logits = head(norm(x)), over a draft vocabulary;  x goes on to the next token

Two styles of files: the Eagle authors' (`midlayer`, what SGLang, SpecForge and ModelOpt write) and the speculators
library's (`layers.0`, the layer's config in an object of its own). Nothing of the target's config is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import PlanError
from fewbits.kernels.batch import Batch, Cache, CacheDtype, CacheLayer, LayerCache
from fewbits.kernels.ops import Chain, Ops
from fewbits.models.configure import decoder, dense, flag, layer_types, size, unsupported
from fewbits.models.decoder import DecoderConfig
from fewbits.models.layer import Layer, LayerConfig
from fewbits.models.needs import Need
from fewbits.nn.embedding import Embedding, Head
from fewbits.nn.linear import Linear

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Qwen3ForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
)
_OF_LISTS = "eagle_aux_hidden_state_layer_ids"
_CHANCES = 3  # number of that array among those of a pass
_PARALLEL = "of drafting several tokens at once (P-EAGLE), which fewbits doesn't"


@dataclass(frozen=True, slots=True)
class LayerIds:
    """Which states of the target are read, as the config says it: None where it says nothing.

    A boundary b is the state behind b layers. Files count these, or layers whose output is read, which is one less.
    """

    given: tuple[int, ...] | None
    speculators: bool
    in_eagle_config: bool

    def boundaries(self, layers: int, states: int) -> tuple[tuple[int, ...], str]:
        """For a target of so many layers, and as many states as `fc` takes in: the boundaries, and why these.

        Raises PlanError where they aren't the target's.
        """
        default: tuple[int, ...] = (2, layers // 2, layers - 3)
        found, why = default, "Eagle3's own choice, as the config names none"
        if self.given is not None:
            outputs = tuple(index + 1 for index in self.given)
            if self.speculators:
                found, why = self.given, "the config's, boundaries as in all files of speculators"
            elif max(self.given, default=0) == layers:
                found, why = self.given, "the config's, boundaries, as the last one is that behind all layers"
            elif self.given == default:
                found, why = self.given, "the config's, which are Eagle3's own choice of boundaries"
            elif outputs == default:
                found, why = outputs, "the config's, numbers of layers whose output is read: Eagle3's own choice"
            elif self.in_eagle_config:
                found, why = outputs, "the config's, taken for numbers of layers whose output is read (eagle_config)"
            else:
                found, why = self.given, "the config's, taken for boundaries"
        if len(found) != states:
            raise PlanError("draft-mismatch", f"fc takes in {states} states, the config names {len(found)}")
        check_boundaries(found, layers)
        return found, why


def check_boundaries(boundaries: Sequence[int], layers: int) -> None:
    """Raises PlanError where a target of so many layers doesn't have them."""
    for boundary in boundaries:
        if not 0 <= boundary <= layers:
            text = f"reads the state behind {boundary} layers, of which the target has {layers}"
            raise PlanError("draft-mismatch", text)


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """`vocab`, `target_hidden` are the target's; `draft_vocab` the rows of the head. `base` describes the layers.

    `norm_before_residual`: what the first layer adds to is the normed state, else the state itself. `norm_before_fc`: a
    norm of all states together, `fc_norm`: one of each, before `fc`. `norm_output`: what goes on is behind the last
    norm.
    """

    base: DecoderConfig
    draft_vocab: int
    target_hidden: int
    layer_ids: LayerIds
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    tied: bool = False  # a head that isn't stored is the target's

    @property
    def vocab(self) -> int:
        return self.base.vocab

    @property
    def hidden(self) -> int:
        return self.base.hidden

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.base.layers

    @property
    def reduced(self) -> bool:
        return self.draft_vocab != self.vocab

    def modules(self, stored: Container[str] = ()) -> list[Need]:
        """Every module, in the order of the forward pass, by the checkpoint's names."""
        names, H = Names(stored), self.hidden
        instead = "the target's takes its place"
        needs = [Need(names.embedding, "embedding", (self.vocab, H), optional=True, instead=instead)]
        if self.norm_before_fc:
            needs.append(Need(names.input_norm, "norm", (None,)))
        needs += [Need(name, "norm", (self.target_hidden,)) for name in self._fc_norms(names, stored)]
        needs.append(Need(names.fc, "linear", (H, None), bias="optional"))
        for index, layer in enumerate(self.layers):
            needs += self._layer(names.layer(index), layer, first=index == 0, stored=stored)
        needs.append(Need(names.norm, "norm", (H,)))
        needs.append(Need(names.head, "head", (self.draft_vocab, H), optional=True, instead=instead))
        if self.reduced:
            needs.append(Need(names.offsets, "other", (self.draft_vocab,), integers=True))
        return needs

    def _layer(self, name: str, layer: LayerConfig, first: bool, stored: Container[str]) -> Iterator[Need]:
        H = self.hidden
        yield Need(f"{name}.input_layernorm", "norm", (H,))
        if first:
            yield Need(f"{name}.hidden_norm", "norm", (H,))
        yield from layer.attention.modules(f"{name}.self_attn", 2 * H if first else H, H)
        yield Need(f"{name}.post_attention_layernorm", "norm", (H,))
        yield from layer.feed_forward.modules(name, H, stored)

    def _fc_norms(self, names: Names, stored: Container[str]) -> list[str]:
        if not self.fc_norm:
            return []
        found = [name for name in (f"{names.fc}_norm.{index}" for index in range(64)) if name in stored]
        return found or [f"{names.fc}_norm.0"]

    def why_not(self, name: str) -> str:
        """Why a stored module isn't run, "" where there is nothing to say but that the drafter doesn't have it."""
        return {
            "t2d": "which tokens of the target can be drafted: for training, d2t says it too",
            "mask_hidden": f"part {_PARALLEL}",
            "d2t": "the draft vocabulary is the whole one",
        }.get(name.rpartition(".")[2], "")

    def share_of_tokens(self, expert: str) -> float:
        return 1.0

    def attention_name(self, layer: int, stored: Container[str] = ()) -> str:
        return f"{Names(stored).layer(layer)}.self_attn"

    def cache_layers(self, dtype: CacheDtype, scales: Any = None) -> tuple[CacheLayer, ...]:
        return self.base.cache_layers(dtype, scales)


class Names:
    """What a file calls its modules, which depends on what is stored."""

    def __init__(self, stored: Container[str]) -> None:
        self._root = root = "model." if "model.fc" in stored else ""
        self._first = f"{root}midlayer" if f"{root}midlayer.hidden_norm" in stored else f"{root}layers.0"
        self.fc, self.norm, self.input_norm = f"{root}fc", f"{root}norm", f"{root}input_norm"
        self.embedding = f"{root}embed_tokens"
        self.head = "lm_head" if "lm_head" in stored or f"{root}lm_head" not in stored else f"{root}lm_head"
        self.offsets = "d2t" if "d2t" in stored or f"{root}d2t" not in stored else f"{root}d2t"

    def layer(self, index: int) -> str:
        return self._first if index == 0 else f"{self._root}layers.{index}"


def is_drafter(config: Config) -> bool:
    """Whether a config.json is a drafter's: some call themselves a plain LlamaForCausalLM."""
    architectures = config.get("architectures", list, [])
    named = bool(architectures) and architectures[0] in ARCHITECTURES
    return named or any(key in config for key in ("speculators_model_type", "eagle_config", "draft_vocab_size"))


def configure(config: Config) -> Eagle3Config:
    config.expect("speculators_model_type", "eagle3")
    speculators = "speculators_model_type" in config or "speculators_config" in config
    layer = config
    if speculators:
        own = config.sub("transformer_layer_config")
        if own is None:
            raise unsupported(config, "transformer_layer_config", "is missing")
        layer = own.over(config)
        config.ignore("speculators_config", "speculators_version", "embed_requires_grad")
    eagle = config.sub("eagle_config") or Config({}, config.source, "eagle_config")
    if "parallel_drafting" in eagle or config.get("parallel_drafting", bool, False):
        raise unsupported(config, "parallel_drafting", f"is a way {_PARALLEL}")
    eagle.expect("use_aux_hidden_state", True)
    config.ignore("num_aux_hidden_states", "verifier", "has_own_embed_tokens")  # tensors say it
    qwen = "qwen3" in f"{layer.get('model_type', str, '')} {config.get('architectures', list, [])}".lower()
    types = layer_types(layer, slides=lambda index: False)
    bias = flag(layer, "attention_bias", "qkv_bias")
    blocks = [dense(layer, flag(layer, "mlp_bias"))] * len(types)
    base = decoder(layer, types, blocks, qkv_bias=bias, output_bias=flag(layer, "attention_bias"), qk_norm=qwen)
    knobs = [config.get(name, bool, False) or eagle.get(name, bool, False) for name in _KNOBS]
    if speculators and config.data.get("norm_before_residual") is None:
        text = "norm_before_residual is missing: engines take it for true, the library that writes such files for false"
        raise PlanError("config-unsupported", text, source=config.where("norm_before_residual"))
    if knobs[1] and knobs[2]:
        raise unsupported(config, "fc_norm", "and norm_before_fc exclude each other")
    draft_vocab = size(config, "draft_vocab_size", base.vocab)
    if draft_vocab > base.vocab:
        raise unsupported(config, "draft_vocab_size", f"{draft_vocab} is more than the target's {base.vocab}")
    return Eagle3Config(
        base,
        draft_vocab,
        size(config, "target_hidden_size", base.hidden),
        _layer_ids(config, eagle, speculators),
        *knobs,
    )


_KNOBS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def _layer_ids(config: Config, eagle: Config, speculators: bool) -> LayerIds:
    given, owner = config.get(_OF_LISTS, list, []), config
    in_eagle_config = not given
    if not given:
        given, owner = eagle.get(_OF_LISTS, list, []), eagle
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        raise unsupported(owner, _OF_LISTS, f"must hold numbers of layers, not {shorten(given)}")
    return LayerIds(tuple(given) or None, speculators, in_eagle_config and bool(given))


@dataclass(frozen=True, slots=True, eq=False)
class DraftHead:
    """`ids` int64 [draft vocabulary] are the target's ids of what it guesses, None where they are the same. A head
    that is the target's has logits of the `whole` vocabulary, of which those at `ids` are the drafter's.
    """

    param: Any
    ids: Any | None
    whole: bool


@dataclass(slots=True, eq=False)
class Draft:
    """`tokens` int64 and `chances` float32 [places, R], the latter of a token with all before it; in each place as many
    are filled as were wanted. `states` [T, H] begin with those that the last place's tokens are made of.
    """

    tokens: Any
    chances: Any
    states: Any


class Drafter:
    """A drafter, ready to run. `params` has an entry for every module of `config.modules(params)`, `embedding` is the
    target's or its own.

    What it is told of tokens and what it guesses are the target's ids.
    """

    def __init__(
        self, config: Eagle3Config, params: Mapping[str, Any], embedding: Any, head: DraftHead, states: int, ops: Ops
    ) -> None:
        """It reads so many `states` of the target."""
        names, norm = Names(params), (config.base.norm_eps, config.base.norm_offset)
        self.config, self.ops = config, ops
        self._embedding = Embedding(embedding)
        self._before_fc = ops.norm(params[names.input_norm], *norm) if config.norm_before_fc else None
        self._norms = [ops.norm(params[name], *norm) for name in config._fc_norms(names, params)]
        self._fc = Linear(params[names.fc])
        first = names.layer(0)
        self._embedding_norm = ops.norm(params[f"{first}.input_layernorm"], *norm)
        self._state_norm = ops.norm(params[f"{first}.hidden_norm"], *norm)
        self._attention = config.layers[0].attention.make(f"{first}.self_attn", norm, params, ops)
        self._post_norm = ops.norm(params[f"{first}.post_attention_layernorm"], *norm)
        self._feed_forward = config.layers[0].feed_forward.make(first, params, ops)
        further = enumerate(config.layers[1:], 1)
        self._layers = [Layer(layer, names.layer(index), norm, params, ops) for index, layer in further]
        self._norm = ops.norm(params[names.norm], *norm)
        self._head, self._draft_head = Head(head.param), head
        arrays, layers = (0, 0, 1, 1, config.hidden), len(config.layers)
        self._fused = ops.fused(self._run, arrays, layers)
        self._fused_start = ops.fused(self._run_start, (*arrays, *[config.target_hidden] * states), layers)

    def draft(
        self, batch: Batch, states: Sequence[Any], rows: Sequence[int], cache: Cache, least: float = 0.0
    ) -> Draft:
        """Guess the tokens behind the logit rows of a batch, one of each sequence or more, and tokens behind these: of
        place i in a chain so many `rows`, the first of those before; until none has a probability of `least` together
        with all before it.

        `states` are the target's of the tokens before those of the batch, one [T, target_hidden] for each boundary.
        Entries are allocated in `cache`, for further places too.
        """
        ops, first = self.ops, rows[0]
        step, x = ops.begin(batch), ops.empty(len(batch.token_ids), self.config.hidden)
        tokens, chances = ops.tokens(len(rows), first), ops.empty(len(rows) + 1, first)
        chances[0] = 1
        given = (batch.token_ids, tokens[0], chances[0], chances[1], x, *states)
        each = (tokens, tokens[1:], chances[1:], chances[2:])
        chain = Chain(given, each, (x,), rows[1:], _CHANCES, least)
        if self._fused is None or self._fused_start is None:
            done = self._one_by_one(chain, step, cache)
        elif chain.rows:
            done = self._fused.chain(self._fused_start, chain, step, cache.layers)
        else:
            done = 1
            self._fused_start(*given, step, cache.layers)
        return Draft(tokens[:done], chances[1 : 1 + done], x)

    def _one_by_one(self, chain: Chain, step: Any, cache: Cache) -> int:
        """`Fused.chain` without it."""
        start: Callable[..., None] = self._run_start
        run: Callable[..., None] = self._run
        start(*chain.arrays, step, cache.layers)
        steps = self.ops.ahead(step, chain.rows, cache.layers[0].page_size)
        sure, done = chain.arrays[chain.chances], 1
        for place, (count, ahead) in enumerate(zip(chain.rows, steps, strict=True)):
            if chain.least and not sure.max() >= chain.least:
                break
            arrays = [array[place][:count] for array in chain.each]
            run(*arrays, *[array[:count] for array in chain.shared], ahead, cache.layers)
            sure, done = arrays[chain.chances], done + 1
        return done

    def _run_start(self, tokens: Any, guesses: Any, before: Any, after: Any, x: Any, *arguments: Any) -> None:
        """x is overwritten."""
        *states, step, caches = arguments
        if self._norms:
            states = [norm(state) for norm, state in zip(self._norms, states, strict=True)]
        together = self.ops.beside(*states)
        (state,) = self._fc(together if self._before_fc is None else self._before_fc(together))
        self.ops.assign(state, x)
        self._run(tokens, guesses, before, after, x, step, caches)

    def _run(
        self, tokens: Any, guesses: Any, before: Any, after: Any, x: Any, step: Any, caches: Sequence[LayerCache]
    ) -> None:
        """x holds the state, and afterwards that of the logit rows in front. The first layer's attention takes in the
        embedding beside the state's norm.
        """
        ops = self.ops
        embedded = self._embedding(tokens)
        if self.config.norm_before_residual:
            ops.assign(self._state_norm(x), x)
            both = ops.beside(self._embedding_norm(embedded), x)
        else:
            both = ops.beside(self._embedding_norm(embedded), self._state_norm(x))
        x = self._attention(both, x, step, caches[0], last=not self._layers)
        self._feed_forward.add_to(self._post_norm(x), x)
        for layer, cache in zip(self._layers, caches[1:], strict=True):
            x = layer(x, step, cache, last=layer is self._layers[-1])
        behind = self._norm(x)
        if self.config.norm_output:
            ops.assign(behind, x)
            behind = x
        ops.best_tokens(self._head(behind), self._draft_head.ids, self._draft_head.whole, guesses, before, after)
