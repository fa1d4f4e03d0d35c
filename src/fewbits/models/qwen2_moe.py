"""Qwen2-MoE: Qwen2 with experts and one more for all tokens, behind a gate; Qwen3-MoE shares which layers have them."""

from __future__ import annotations

from collections.abc import Sequence

from fewbits.checkpoint.config import Config
from fewbits.models.configure import MAX_EXPERTS, decoder, dense, layer_types, present, routing, size, unsupported
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import FeedForward, MlpConfig, MoeConfig, SharedConfig, names_of
from fewbits.models.needs import Bias


def blocks(config: Config, layers: int, shared: SharedConfig | None) -> Sequence[FeedForward]:
    """Experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    config.ignore("router_aux_loss_coef", "intermediate_size")  # of training; the width where a layer has no experts
    experts = size(config, present(config, "num_experts", "num_local_experts"), most=MAX_EXPERTS)
    how = routing(config, experts, "num_experts_per_tok", normalize=config.get("norm_topk_prob", bool, False))
    moe = MoeConfig(experts, size(config, "moe_intermediate_size"), how, names_of("mlp"), shared=shared)
    step, without = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers", list, [])
    sparse = [index not in without and (index + 1) % step == 0 for index in range(layers)]
    return [moe if has_experts else dense(config) for has_experts in sparse]


def configure(config: Config) -> DecoderConfig:
    if config.get("use_sliding_window", bool, False) and "layer_types" not in config:
        raise unsupported(config, "use_sliding_window", "without layer_types: writers disagree on which layers slide")
    config.ignore("max_window_layers", "sliding_window")
    types = layer_types(config, slides=lambda index: False)
    mlp = MlpConfig(size(config, "shared_expert_intermediate_size"), name="mlp.shared_expert")
    shared = SharedConfig(mlp, gate="mlp.shared_expert_gate")
    bias: Bias = "yes" if config.get("qkv_bias", bool, True) else "no"
    return decoder(config, types, blocks(config, len(types), shared), qkv_bias=bias)
