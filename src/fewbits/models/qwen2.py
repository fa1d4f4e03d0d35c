"""Qwen2 and Qwen2.5: q, k and v have biases whatever the config says; Qwen3 shares the window rule."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import decoder, dense, layer_types, size
from fewbits.models.decoder import DecoderConfig


def window_types(config: Config) -> list[str]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window`; `layer_types` overrides both."""
    config.ignore("max_window_layers", "sliding_window")
    if not config.get("use_sliding_window", bool, False):
        return layer_types(config, slides=lambda index: False)
    first = size(config, "max_window_layers")
    return layer_types(config, slides=lambda index: index >= first)


def configure(config: Config) -> DecoderConfig:
    types = window_types(config)
    return decoder(config, types, [dense(config)] * len(types), qkv_bias="yes")
