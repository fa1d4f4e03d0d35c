"""Qwen3: norms on query and key heads, no biases unless `attention_bias`."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import dense_decoder, flag
from fewbits.models.decoder import DecoderConfig
from fewbits.models.qwen2 import window_types


def configure(config: Config) -> DecoderConfig:
    bias = flag(config, "attention_bias")
    return dense_decoder(config, window_types(config), qkv_bias=bias, output_bias=bias, qk_norm=True)
