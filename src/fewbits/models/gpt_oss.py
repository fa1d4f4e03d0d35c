"""gpt-oss: sliding layers in turn with full ones, sinks, biases everywhere, experts of gates and ups in turn.

A router takes the best logits and a softmax of these, which is a softmax of all, divided by the sum of those chosen.
"""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.kernels.ops import Activation
from fewbits.models.configure import MAX_EXPERTS, decoder, layer_types, present, routing, size, unsupported
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import MoeConfig, names_of


def configure(config: Config) -> DecoderConfig:
    types = layer_types(config, slides=lambda index: index % 2 == 0)
    config.ignore("initial_context_length", "router_aux_loss_coef")  # of the rotation's settings; of training
    experts = size(config, present(config, "num_local_experts", "num_experts"), most=MAX_EXPERTS)
    top_k = present(config, "num_experts_per_tok", "experts_per_token")
    config.ignore("num_experts_per_tok", "experts_per_token", "num_local_experts", "num_experts")
    limit = config.get("swiglu_limit", float, 7.0)
    if limit < 0:
        raise unsupported(config, "swiglu_limit", f"must not be negative, as {limit} is")
    block = MoeConfig(
        experts,
        size(config, "intermediate_size"),
        routing(config, experts, top_k),
        names_of("mlp", router="router"),
        Activation("swiglu_oai", limit),
        bias="yes",
        in_turn=True,
        transposed=True,
    )
    config.expect("attention_bias", True)
    config.expect("swiglu_alpha", 1.702)
    return decoder(config, types, [block] * len(types), qkv_bias="yes", output_bias="yes", sinks=True)
