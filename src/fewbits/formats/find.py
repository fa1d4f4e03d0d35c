"""Where a checkpoint keeps its quantization block."""

from __future__ import annotations

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import Config


def find_config(checkpoint: Checkpoint) -> Config | None:
    """The quantization block, from every place where it is found in the wild; None where there is none."""
    top = checkpoint.config.fallback or checkpoint.config
    for outer in (top, checkpoint.config, *_nested(top)):
        for key in ("quantization_config", "compression_config", "quantization"):
            # params.json's `quantization` may be anything; under the other keys only an object is one.
            fits = key != "quantization" or isinstance(outer.data.get(key), dict)
            block = outer.sub(key) if fits else None
            if block is None:
                continue
            inner = block.sub("quantization_config") if "quantization_config" in block else None
            if inner is not None:
                block.ignore("sparsity_config", "quant_method")
            return inner or block
    return None


def _nested(top: Config) -> list[Config]:
    subs = []
    for key, value in top.data.items():
        places = ("quantization_config", "compression_config")
        if isinstance(value, dict) and key not in places and any(place in value for place in places):
            sub = top.sub(key)
            if sub is not None:
                sub.ignore(*(name for name in sub.data if name not in places))
                subs.append(sub)
    return subs
