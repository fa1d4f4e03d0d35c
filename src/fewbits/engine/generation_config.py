"""generation_config.json: where a text ends, and how the checkpoint's makers would sample."""

from __future__ import annotations

from typing import Any

from fewbits.checkpoint import Checkpoint, Config
from fewbits.errors import CheckpointError

_SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}


def end_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """Ids after which nothing follows: `eos_token_id` of config.json and generation_config.json together."""
    found: set[int] = set()
    for config in (checkpoint.config, Config(checkpoint.generation_config, "generation_config.json")):
        if "eos_token_id" not in config:
            continue
        try:
            found.add(config.get("eos_token_id", int))
        except CheckpointError:
            found.update(token for token in config.get("eos_token_id", list) if isinstance(token, int))
    return frozenset(found)


def sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampling that generation_config.json asks for, by the names of SamplingParams; {} for greedy.

    `do_sample` false is greedy whatever else stands there; where it is true or absent, a temperature that
    isn't given is 1. Raises CheckpointError for values of another type.
    """
    config = Config(checkpoint.generation_config, "generation_config.json")
    given = {name: config.get(name, kind) for name, kind in _SAMPLING.items() if name in config}
    penalty = {name: given.pop(name) for name in ("repetition_penalty",) if name in given}
    if not config.get("do_sample", bool, bool(given)):
        return penalty
    return {"temperature": 1.0} | given | penalty
