"""Drafters for tests: those of tests/exports/drafters, and what is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

TESTS = Path(__file__).parent
DRAFTERS = TESTS / "exports" / "drafters"
TARGET = TESTS / "fixtures" / "w4a16-asym-g32-head-f32"
NAMES = sorted(path.parent.name for path in DRAFTERS.glob("*/expected.safetensors"))

Tensors = dict[str, np.ndarray]


def expected(name: str) -> Tensors:
    return load_file(DRAFTERS / name / "expected.safetensors")


def changed(
    folder: Path,
    name: str = "bf16",
    change: Callable[[Tensors], Mapping[str, np.ndarray] | None] = lambda tensors: None,
    **config: Any,
) -> Path:
    """A copy of a drafter with other tensors, which `change` edits or returns, and other keys in its config; None takes
    a key out.
    """
    shutil.copytree(DRAFTERS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(change(tensors) or tensors), folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in written.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder
