"""Qwen3: norms on query and key heads, no biases unless `attention_bias`."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import decoder, dense, flag
from fewbits.models.decoder import DecoderConfig
from fewbits.models.qwen2 import window_types


def configure(config: Config) -> DecoderConfig:
    types, bias = window_types(config), flag(config, "attention_bias")
    return decoder(config, types, [dense(config)] * len(types), qkv_bias=bias, output_bias=bias, qk_norm=True)
