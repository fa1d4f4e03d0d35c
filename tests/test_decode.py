"""Every producer-written fixture decodes bit for bit to what the owner's library makes of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fewbits.checkpoint.files import TensorReader, read_header
from fewbits.errors import PlanError
from fewbits.formats.compressed_tensors.layouts import LAYOUTS
from fewbits.load import decode, inspect, load

FIXTURES = Path(__file__).parent / "fixtures"
DESCRIBED = {path.parent.name: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/expected.json"))}
REFUSED = {name: how["refused"] for name, how in DESCRIBED.items() if "refused" in how}
FOLDERS = sorted(DESCRIBED.keys() - REFUSED.keys())


def expected_weights(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "expected.safetensors"
    tensors, _ = read_header(path, 0)
    with TensorReader([path], tensors) as reader:
        return {name.removesuffix(".weight"): reader.read(name) for name in tensors if name.endswith(".weight")}


@pytest.mark.parametrize("name", FOLDERS)
def test_decodes_to_the_owners_numbers(name: str) -> None:
    """All quantized modules by their hash; those whose numbers are in the tree number by number first. So too what
    is dense but stored sparse.
    """
    folder = FIXTURES / name
    weights = expected_weights(folder)
    hashes = DESCRIBED[name].get("decoded", {})
    expanded = DESCRIBED[name].get("expanded", {})
    planned = inspect(folder)
    assert planned.checkpoint is not None and planned.format is not None
    assert not planned.errors and not planned.leftover_tensors
    rows = {row.name: row for row in planned.rows}
    quantized = {row.name for row in planned.rows if row.spec.weight.quantized and not row.tied}
    assert quantized == hashes.keys()
    with planned.checkpoint.reader() as reader:
        for module, expected in (hashes | expanded).items():
            linear, notices = decode(planned, rows[module], reader)
            assert not notices
            ours = linear.weight.dequantize(rounding="producer").reshape(expected["shape"])
            assert ours.dtype.name == expected["dtype"], module
            if module in weights:
                different = np.nonzero(ours.astype(np.float64) != weights[module].astype(np.float64))
                assert different[0].size == 0, f"{module}: {different}"
            digest = hashlib.sha256(np.ascontiguousarray(ours).tobytes()).hexdigest()
            assert digest == expected["sha256"], module


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_recognised_and_refused(name: str) -> None:
    """By the plan, by name; and nothing of it runs."""
    planned = inspect(FIXTURES / name)
    assert planned.errors and {error.code for error in planned.errors} == {REFUSED[name]}
    with pytest.raises(PlanError) as caught:
        load(FIXTURES / name, allow_reference=True)
    assert caught.value.code == REFUSED[name]
    assert planned.leftover_tensors == []


def granularity(block: tuple[int, int]) -> str:
    return {(0, 0): "tensor", (1, 0): "channel"}.get(block, "group" if block[0] == 1 else "block")


def test_every_storage_format_is_there() -> None:
    """What compressed-tensors can write on a CPU: number, scale and zero point of each layout, and each activation."""
    found: dict[str, set[str]] = {layout.name: set() for layout in LAYOUTS}
    heads, activations = set(), set()
    for name in FOLDERS:
        for row in inspect(FIXTURES / name).rows:
            weight = row.spec.weight
            if row.resolved is None or not weight.quantized or row.resolved.layout not in found:
                continue  # of another format
            zero = "sym" if weight.zero_point == "none" else "asym"
            number = weight.number.replace("uint", "int")
            found[row.resolved.layout].add(f"{number} {granularity(weight.block)} {zero}")
            activations.add(str(row.spec.act))
            if row.kind == "head":
                heads.add(row.resolved.layout)
    both = ("sym", "asym")
    packed = {f"int{bits} {block} {zero}" for bits in range(2, 9) for block in ("channel", "group") for zero in both}
    plain = {"int8 channel sym", "int8 channel asym", "int8 group asym", "int8 tensor sym", "int4 group sym"}
    fp8 = {f"fp8 {block} sym" for block in ("tensor", "channel", "group", "block")}
    assert found == {
        "pack-quantized": packed | {"int8 tensor sym", "int8 tensor asym"},
        "naive-quantized": plain | fp8,
        "fp4-pack-quantized": {"fp4 group sym"},
        "mxfp6-pack-quantized": {"fp6 group sym"},
        "dense": set(),
    }
    assert heads == found.keys() - {"dense"}
    assert activations == {
        "None",
        "int8 token dynamic",
        "int8 token dynamic asym",
        "int8 tensor dynamic",
        "int8 tensor static",
        "int8 tensor static asym",
        "fp8 token dynamic",
        "fp8 tensor dynamic",
        "fp8 tensor static",
        "fp8 g16 dynamic",
        "fp8 g32 dynamic",
        "fp8 g128 dynamic",
        "fp8 g32 e8m0 dynamic",
        "fp4 local",
        "fp4 g32 e8m0 dynamic",
    }
