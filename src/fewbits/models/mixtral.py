"""Mixtral: Mistral with experts in every layer, of which the chosen ones' weights add up to 1."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import MAX_EXPERTS, decoder, routing, size
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import MoeConfig, names_of
from fewbits.models.mistral import window_types


def configure(config: Config) -> DecoderConfig:
    config.ignore("router_aux_loss_coef", "router_jitter_noise")  # of training
    experts = size(config, "num_local_experts", most=MAX_EXPERTS)
    how = routing(config, experts, "num_experts_per_tok")
    names = (*names_of("block_sparse_moe"), *names_of("mlp"))  # the latter as transformers 5 has it
    moe = MoeConfig(experts, size(config, "intermediate_size"), how, names)
    types = window_types(config)
    return decoder(config, types, [moe] * len(types))
