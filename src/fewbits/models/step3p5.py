"""Step-3.5-Flash: full and sliding layers with their own heads and rotations, gated heads, experts beside a shared one.

Norms are stored less one. Lists with an entry for each layer go on behind the last: those entries are MTP's.
"""

from __future__ import annotations

from dataclasses import replace

from fewbits.checkpoint.config import Config
from fewbits.errors import PlanError
from fewbits.kernels.ops import Activation
from fewbits.kernels.rope import Rope
from fewbits.models.attention import AttentionConfig
from fewbits.models.configure import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    check_heads,
    layer_types,
    mtp_layers,
    of_each_layer,
    of_layers,
    present,
    routing,
    size,
    unsupported,
)
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import FeedForward, MlpConfig, MoeConfig, SharedConfig, names_of
from fewbits.models.layer import LayerConfig
from fewbits.models.mtp import MtpConfig
from fewbits.models.rope import OwnRope, rope

_EPSILON = 1e-20  # beside the sum that chosen weights are divided by


def configure(config: Config) -> DecoderConfig:
    config.get("layer_types", list)  # has no default
    types = layer_types(config, slides=lambda index: False)
    config.expect("sink", False)
    # A router is never rounded; what else these say is in lists, or meant for other programs.
    config.ignore("need_fp32_gate", "moe_every_n_layer", "moe_layer_offset", "max_seq_len")
    offset = 1.0 if config.get("zero_centered", bool) else 0.0
    layers = [
        LayerConfig(attention, feed_forward)
        for attention, feed_forward in zip(_attention(config, types), _feed_forward(config, len(types)), strict=True)
    ]
    mtp = mtp_layers(config)
    model = of_layers(config, layers, norm_offset=offset, mtp_layers=mtp)
    return replace(model, mtp=_mtp(config, model, types)) if mtp else model


def _mtp(config: Config, model: DecoderConfig, types: list[str]) -> MtpConfig | None:
    """Dense blocks without limits, heads of their own; states go on before the norms (vLLM, SGLang). None where the
    config's lists end with the model's layers: then nothing says what these are.
    """
    listed: list[str] = config.get("layer_types", list)
    every = listed[: len(types) + model.mtp_layers]
    try:
        attention = _attention(config, every)[len(types) :]
    except PlanError:
        return None
    if len(attention) != model.mtp_layers:
        return None
    block = MlpConfig(size(config, "intermediate_size"))
    layers = tuple(LayerConfig(one, block) for one in attention)
    names = ("transformer.shared_head.norm", "transformer.shared_head.output")
    norm = (model.norm_eps, model.norm_offset)
    return MtpConfig(model.hidden, model.vocab, len(model.layers), layers, *names, False, *norm)


def _attention(config: Config, types: list[str]) -> list[AttentionConfig]:
    config.expect("att_impl_type", "GQA")
    scaled_types = config.get("yarn_only_types", list, [])  # whatever the kind of scaling
    thetas = of_each_layer(config, "rope_theta", len(types), 10000.0)
    shares = of_each_layer(config, "partial_rotary_factors", len(types), 1.0)
    rotates = config.get("use_rope_layers", list, []) or [True] * len(types)
    if len(rotates) < len(types):
        raise unsupported(config, "use_rope_layers", f"has {len(rotates)} entries for {len(types)} layers")
    qk_norm = config.get("use_qk_norm", bool)
    head_gate = config.get("use_head_wise_attn_gate", bool)
    layers = []
    for index, kind in enumerate(types):
        heads, kv_heads, head_dim = _heads(config, kind)
        rotation = Rope(())
        if rotates[index]:
            scaled = not scaled_types or kind in scaled_types
            rotation = rope(config, head_dim, kind, OwnRope(thetas[index], shares[index], scaled))
        window = size(config, "sliding_window") if kind == "sliding_attention" else 0
        layers.append(
            AttentionConfig(heads, kv_heads, head_dim, rotation, window, qk_norm=qk_norm, head_gate=head_gate)
        )
    return layers


def _heads(config: Config, kind: str) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width in layers of a type; one type may have others than the rest."""
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, present(config, "num_attention_groups", "num_key_value_heads"))
    head_dim = size(config, "head_dim", most=MAX_HEAD_DIM)
    other = config.sub("attention_other_setting")
    if other is not None and other.get("attention_type", str) == kind:
        heads = size(other, "num_attention_heads", heads)
        kv_heads = size(other, "num_attention_groups", kv_heads)
        head_dim = size(other, "head_dim", head_dim, most=MAX_HEAD_DIM)
        other.expect("true_head_dim", head_dim)
    check_heads(config, heads, kv_heads)
    return heads, kv_heads, head_dim


def _feed_forward(config: Config, layers: int) -> list[FeedForward]:
    limits = of_each_layer(config, "swiglu_limits", layers, 0.0)
    limits_shared = of_each_layer(config, "swiglu_limits_shared", layers, 0.0)
    if min(*limits, *limits_shared, 0.0) < 0:
        raise unsupported(config, "swiglu_limits", "must not be negative")
    with_experts = _layers_of_experts(config)
    blocks: list[FeedForward] = []
    for index in range(layers):
        shared = Activation("silu", limits_shared[index])
        if index in with_experts:
            blocks.append(_moe(config, Activation("silu", limits[index]), shared))
        else:
            blocks.append(MlpConfig(size(config, "intermediate_size"), shared))
    return blocks


def _layers_of_experts(config: Config) -> set[int]:
    """A string of numbers, or a list; without it programs differ in what they assume."""
    listed = config.get("moe_layers_enum", object)
    parts = listed.split(",") if isinstance(listed, str) else listed
    try:
        return {int(part) for part in parts if str(part).strip()}
    except (TypeError, ValueError):
        raise unsupported(config, "moe_layers_enum", f"must list numbers of layers, not {str(listed)[:80]!r}") from None


def _moe(config: Config, activation: Activation, shared: Activation) -> MoeConfig:
    experts = size(config, "moe_num_experts", most=MAX_EXPERTS)
    config.get("moe_router_activation", str)  # programs differ in what it is by default
    how = routing(
        config,
        experts,
        "moe_top_k",
        score=config.expect("moe_router_activation", "sigmoid", "softmax"),
        normalize=config.get("norm_expert_weight", bool),
        epsilon=_EPSILON,
        scale=config.get("moe_router_scaling_factor", float, 1.0),
    )
    dim = size(config, present(config, "share_expert_dim", "share_expert_dims"))
    return MoeConfig(
        experts,
        size(config, "moe_intermediate_size"),
        how,
        names_of("moe", bias="router_bias"),
        activation,
        selection_bias=config.get("use_moe_router_bias", bool),
        shared=SharedConfig(MlpConfig(dim, shared, name="share_expert")),
    )
