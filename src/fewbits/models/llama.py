"""Llama 2 and 3: biases by flag, llama3 rotary scaling, windows only where `layer_types` says so."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import dense_decoder, flag, layer_types
from fewbits.models.decoder import DecoderConfig


def configure(config: Config) -> DecoderConfig:
    output_bias = flag(config, "attention_bias")
    return dense_decoder(
        config,
        layer_types(config, slides=lambda index: False),
        qkv_bias=flag(config, "attention_bias", "qkv_bias"),
        output_bias=output_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
