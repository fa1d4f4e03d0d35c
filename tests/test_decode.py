"""Every producer-written fixture decodes bit for bit to what the owner's library makes of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fewbits.checkpoint.files import TensorReader, read_header
from fewbits.load import decode, inspect

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))


def expected_weights(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "expected.safetensors"
    tensors, _ = read_header(path, 0)
    with TensorReader([path], tensors) as reader:
        return {name.removesuffix(".weight"): reader.read(name) for name in tensors if name.endswith(".weight")}


@pytest.mark.parametrize("name", FOLDERS)
def test_decodes_to_the_owners_numbers(name: str) -> None:
    """All quantized modules by their hash; those whose numbers are in the tree number by number first."""
    folder = FIXTURES / name
    weights = expected_weights(folder)
    hashes = json.loads((folder / "expected.json").read_text()).get("decoded", {})
    planned = inspect(folder)
    assert planned.checkpoint is not None and planned.format is not None
    assert not planned.errors
    rows = {row.name: row for row in planned.rows}
    quantized = {row.name for row in planned.rows if row.spec.weight.quantized and not row.tied}
    assert quantized == hashes.keys()
    with planned.checkpoint.reader() as reader:
        for module, expected in hashes.items():
            linear, notices = decode(planned, rows[module], reader)
            assert not notices
            ours = linear.weight.dequantize(rounding="producer")
            assert (ours.dtype.name, list(ours.shape)) == (expected["dtype"], expected["shape"]), module
            if module in weights:
                different = np.nonzero(ours.astype(np.float64) != weights[module].astype(np.float64))
                assert different[0].size == 0, f"{module}: {different}"
            digest = hashlib.sha256(np.ascontiguousarray(ours).tobytes()).hexdigest()
            assert digest == expected["sha256"], module
