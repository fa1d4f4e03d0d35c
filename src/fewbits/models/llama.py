"""Llama 2 and 3: biases by flag, llama3 rotary scaling, windows only where `layer_types` says so."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import decoder, dense, flag, layer_types
from fewbits.models.decoder import DecoderConfig


def configure(config: Config) -> DecoderConfig:
    types = layer_types(config, slides=lambda index: False)
    return decoder(
        config,
        types,
        [dense(config, flag(config, "mlp_bias"))] * len(types),
        qkv_bias=flag(config, "attention_bias", "qkv_bias"),
        output_bias=flag(config, "attention_bias"),
    )
