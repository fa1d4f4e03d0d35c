"""Qwen3-MoE: Qwen3 with experts; where windows are in use, every layer slides."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import decoder, flag, layer_types
from fewbits.models.decoder import DecoderConfig
from fewbits.models.qwen2_moe import blocks


def configure(config: Config) -> DecoderConfig:
    slides = config.get("use_sliding_window", bool, False)
    config.ignore("max_window_layers", "sliding_window")
    types = layer_types(config, slides=lambda index: slides)
    bias = flag(config, "attention_bias")
    feed_forward = blocks(config, len(types), None)
    return decoder(config, types, feed_forward, qkv_bias=bias, output_bias=bias, qk_norm=True)
