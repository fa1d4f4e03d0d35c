"""Mistral: Llama without biases; every layer slides where `sliding_window` is set."""

from __future__ import annotations

from fewbits.checkpoint.config import Config
from fewbits.models.configure import decoder, dense, layer_types, unsupported
from fewbits.models.decoder import DecoderConfig


def window_types(config: Config) -> list[str]:
    """Every layer slides where `sliding_window` is set; Mixtral shares the rule."""
    slides = "sliding_window" in config
    return layer_types(config, slides=lambda index: slides)


def configure(config: Config) -> DecoderConfig:
    # Newer models multiply queries by a function of the position; without it they go wrong at length only.
    for owner, key in ((config, "llama_4_scaling"), (config.sub("rope_parameters"), "llama_4_scaling_beta")):
        if owner is not None and key in owner:
            raise unsupported(owner, key, "(a query multiplier by position) isn't supported")
    types = window_types(config)
    return decoder(config, types, [dense(config)] * len(types))
