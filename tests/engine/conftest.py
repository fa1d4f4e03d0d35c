from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_model import BOS, EOS, FIXTURES, MODEL, character_tokenizer

from fewbits.engine.llm import LLM


@pytest.fixture
def text_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of the fixture model with the character tokenizer; keywords go to tokenizer_config.json."""

    def make(name: str = MODEL, **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        character_tokenizer(size).save(str(folder / "tokenizer.json"))
        written = {"bos_token": BOS, "eos_token": {"content": EOS}} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(written))
        return folder

    return make


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The fixture model, without a tokenizer."""
    return LLM(FIXTURES / MODEL)
