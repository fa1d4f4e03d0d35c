"""The tests of native code, once more for every other instruction set tier that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits import _native

TESTS = Path(__file__).resolve().parents[1]
FILES = [
    "kernels/test_cpu_linear.py",
    "kernels/test_codes.py",
    "kernels/test_bound.py",
    "kernels/test_embedding.py",
    "kernels/test_ops.py",
    "models/test_decoder.py",
]


@pytest.mark.parametrize("tier", [tier for tier in _native.supported_tiers() if tier != _native.tier()])
def test_tier(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not reference"]
    result = subprocess.run(
        [*command, *(str(TESTS / file) for file in FILES)],
        env={**os.environ, "FEWBITS_ISA": tier},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
