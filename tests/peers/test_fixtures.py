"""The committed fixtures are what the real tools write: made again, they are the same.

Needs tools/fixtures-requirements.txt (`make test-peers`). Stored tensors and configs are compared byte for
byte. Logits and calibrated scales come out of matrix products, whose last bits depend on the machine's
instruction set, and are compared as numbers; version strings are not compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "fixtures"
NAMES = sorted(path.name for path in COMMITTED.iterdir() if path.is_dir())
# Absolute tolerances by the end of a tensor's name. A calibrated scale that moves by its last bfloat16 bit
# flips activation codes, and each flip moves the producer's logits by a step.
COMPUTED = {
    "logits": 1e-4,
    "logits_weight_only": 1e-4,
    "logits_producer": 0.1,
    ".input_scale": 0.0,
    ".input_global_scale": 0.0,
    ".k_scale": 0.0,
    ".v_scale": 0.0,
    ".output_scale": 0.0,
}
RELATIVE = 1e-2  # more than one bit of a bfloat16
VERSIONS = ("version", "transformers_version", "tools")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fixtures, made again in a folder of their own."""
    out = tmp_path_factory.mktemp("fixtures")
    command = [sys.executable, str(ROOT / "tools" / "make_fixtures.py"), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return out


def without_versions(value: Any) -> Any:
    """A JSON value without the keys that name the tools' versions."""
    if isinstance(value, dict):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONS}
    return value


def test_same_folders(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir() if path.is_dir()) == NAMES
    for name in ("README.md", "matching.json"):
        assert (made / name).read_text() == (COMMITTED / name).read_text(), name


@pytest.mark.parametrize("name", NAMES)
def test_same_fixture(made: Path, name: str) -> None:
    committed, again = COMMITTED / name, made / name
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in committed.iterdir())
    for path in sorted(committed.glob("*.json")):
        ours, theirs = (json.loads((folder / path.name).read_text()) for folder in (committed, again))
        assert without_versions(theirs) == without_versions(ours), path.name
    for path in sorted(committed.glob("*.safetensors")):
        assert_same_tensors(load_file(path), load_file(again / path.name))


def tolerance(name: str) -> float | None:
    """The absolute tolerance of a computed tensor; None for one that is compared byte for byte."""
    return next((bound for end, bound in COMPUTED.items() if name.endswith(end)), None)


def assert_same_tensors(committed: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and shapes, and the same bytes but for what is computed."""
    assert again.keys() == committed.keys()
    for name, tensor in committed.items():
        other = again[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        bound = tolerance(name)
        if bound is None:
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        else:
            close = torch.isclose(other.float(), tensor.float(), rtol=RELATIVE, atol=bound)
            assert bool(close.all()), name
