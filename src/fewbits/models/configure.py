"""What the configs of Llama-like families have in common: sizes, windows, rotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import PlanError
from fewbits.kernels.ops import Routing
from fewbits.models.attention import AttentionConfig
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import FeedForward, MlpConfig, MoeConfig
from fewbits.models.layer import LayerConfig
from fewbits.models.needs import Bias
from fewbits.models.rope import rope

MAX_LAYERS = 1000  # far above any model; a hostile config must not make us build a list of a billion
MAX_HEAD_DIM = 1024  # what native attention is built for

MAX_EXPERTS = 150_000  # of all layers together, for the same reason

LAYER_TYPES = ("full_attention", "sliding_attention")


def size(config: Config, key: str, default: int | None = None, most: int = 1 << 31) -> int:
    """A positive integer."""
    value: int = config.get(key, int) if default is None else config.get(key, int, default)
    if not 0 < value <= most:
        raise unsupported(config, key, f"must be between 1 and {most}, not {value}")
    return value


def unsupported(config: Config, key: str, text: str) -> PlanError:
    return PlanError("config-unsupported", f"{key} {text}", source=config.where(key))


def _norm_eps(config: Config) -> float:
    value: float = config.get("rms_norm_eps", float, 1e-6)
    if value < 0:
        raise unsupported(config, "rms_norm_eps", f"must not be negative, as {value} is")
    return value


def flag(config: Config, *keys: str) -> Bias:
    """A bias that a flag of the config asks for; absent means no."""
    values = [config.get(key, bool, False) for key in keys]  # all of them: each must count as read
    return "yes" if any(values) else "no"


def layer_types(config: Config, slides: Callable[[int], bool]) -> list[str]:
    """The type of each layer: `layer_types` where the config has it, else by the family's own rule."""
    count = size(config, "num_hidden_layers", most=MAX_LAYERS)
    types: list[str] = config.get("layer_types", list, [])
    if not types:
        return [LAYER_TYPES[slides(index)] for index in range(count)]
    if len(types) < count:
        raise unsupported(config, "layer_types", f"has {len(types)} entries for {count} layers")
    for one in types[:count]:
        if one not in LAYER_TYPES:
            raise unsupported(config, "layer_types", f"has {one!r}; fewbits knows {', '.join(LAYER_TYPES)}")
    return types[:count]


def dense(config: Config, bias: Bias = "no") -> MlpConfig:
    """The feed-forward block of a layer without experts."""
    return MlpConfig(size(config, "intermediate_size"), bias=bias)


def routing(config: Config, experts: int, top_k_key: str, **how: Any) -> Routing:
    """How `experts` are chosen; `how` as in Routing."""
    top_k = size(config, top_k_key)
    if top_k > experts:
        raise unsupported(config, top_k_key, f"asks for {top_k} of {experts} experts")
    return Routing(top_k, **how)


def decoder(
    config: Config,
    types: Sequence[str],
    feed_forward: Sequence[FeedForward],
    *,
    qkv_bias: Bias = "no",
    output_bias: Bias = "no",
    qk_norm: bool = False,
    sinks: bool = False,
) -> DecoderConfig:
    """A decoder; `types` and `feed_forward` have each layer's type and block."""
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads)
    hidden = size(config, "hidden_size")
    check_heads(config, heads, kv_heads)
    if "head_dim" not in config and hidden % heads:
        raise unsupported(config, "hidden_size", f"{hidden} isn't a multiple of {heads} heads")
    head_dim = size(config, "head_dim", hidden // heads, most=MAX_HEAD_DIM)
    attention = {}
    for kind in dict.fromkeys(types):
        window = size(config, "sliding_window") if kind == "sliding_attention" else 0
        rotation = rope(config, head_dim, kind)
        sizes = (heads, kv_heads, head_dim)
        attention[kind] = AttentionConfig(*sizes, rotation, window, qkv_bias, output_bias, qk_norm, sinks=sinks)
    layers = [LayerConfig(attention[kind], block) for kind, block in zip(types, feed_forward, strict=True)]
    return of_layers(config, layers)


def present(config: Config, *keys: str) -> str:
    """The first of a value's names that the config has, or the first of all."""
    return next((key for key in keys if key in config), keys[0])


def of_each_layer(config: Config, key: str, layers: int, default: float) -> list[float]:
    """Numbers of layers: a list that may go on behind the last (for MTP), or one number for all; null is `default`."""
    value = config.get(key, object, default)
    values = value if isinstance(value, list) else [value] * layers
    values = [default if one is None else one for one in values[:layers]]
    if len(values) < layers:
        raise unsupported(config, key, f"has {len(values)} entries for {layers} layers")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        raise unsupported(config, key, f"must hold numbers, not {shorten(value)}")
    return [float(one) for one in values]


def check_heads(config: Config, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise unsupported(config, "num_attention_heads", f"{heads} isn't a multiple of {kv_heads} key/value heads")


def mtp_layers(config: Config) -> int:
    """How many layers for multi-token prediction the file may have behind the last."""
    count: int = config.get("num_nextn_predict_layers", int, 0)
    if not 0 <= count <= MAX_LAYERS:
        raise unsupported(config, "num_nextn_predict_layers", f"must be between 0 and {MAX_LAYERS}, not {count}")
    return count


def of_layers(config: Config, layers: Sequence[LayerConfig], **more: Any) -> DecoderConfig:
    """A decoder of these layers; what is left of the config is the same in all families. `more` as in DecoderConfig."""
    config.expect("hidden_act", "silu")
    experts = sum(one.feed_forward.experts for one in layers if isinstance(one.feed_forward, MoeConfig))
    if experts > MAX_EXPERTS:
        raise unsupported(config, "num_hidden_layers", f"makes {experts} experts in all, more than {MAX_EXPERTS}")
    return DecoderConfig(
        vocab=size(config, "vocab_size"),
        hidden=size(config, "hidden_size"),
        layers=tuple(layers),
        tied=config.get("tie_word_embeddings", bool, False),
        norm_eps=_norm_eps(config),
        max_positions=size(config, "max_position_embeddings") if "max_position_embeddings" in config else None,
        **more,
    )
