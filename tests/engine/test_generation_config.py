from pathlib import Path
from typing import Any

import pytest

from fewbits.checkpoint import Checkpoint, Config
from fewbits.engine import generation_config
from fewbits.errors import CheckpointError


def checkpoint(generation: dict[str, Any], config: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(Path(), Config(config or {}, "config.json"), {}, [], generation_config=generation)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"top_p": 0.9, "max_length": 20, "bos_token_id": 1}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 1, "top_k": None}, {"temperature": 1.0}),
    ],
)
def test_what_the_makers_would_sample(says: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation_config.sampling(checkpoint(says)) == expected


def test_a_value_of_another_type_is_explained() -> None:
    with pytest.raises(CheckpointError, match="temperature must be a number"):
        generation_config.sampling(checkpoint({"temperature": "hot"}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 9]}, {2, 7, 9}),
        ({"eos_token_id": None}, {}, set()),
        ({}, {"eos_token_id": 5}, {5}),
    ],
)
def test_end_tokens_of_both_files(config: dict[str, Any], generation: dict[str, Any], expected: set[int]) -> None:
    assert generation_config.end_ids(checkpoint(generation, config)) == expected
