"""--activations int8: what a user may ask of activations, and how the plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits import LLM, SamplingParams
from fewbits.cli import main
from fewbits.spec import ActSpec

FIXTURES = Path(__file__).parent / "fixtures"
W4A16 = FIXTURES / "w4a16-asym-g32-untied-head"
W8A8 = FIXTURES / "w8a8-dynamic-head"
NVFP4A16 = FIXTURES / "nvfp4a16-head"


def projections(folder: Path, activations: str) -> list:
    plan = fewbits.inspect(folder, activations)
    return [row for row in plan.rows if row.kind in ("linear", "head")]


def test_integer_weights_take_int8_inputs_in_their_own_groups():
    rows = projections(W4A16, "int8")
    assert {row.spec.act for row in rows} == {ActSpec("int", 8, "group", True, 32)}
    assert {row.kernel.name for row in rows} == {"cpu.dot_int8"}
    assert all(row.decided_by.endswith("as asked") for row in rows)
    assert all(row.spec.act is None for row in fewbits.inspect(W4A16, "int8").rows if row.kind == "embedding")


def test_the_plan_warns_of_the_deviation():
    warnings = [str(warning) for warning in fewbits.inspect(W4A16, "int8").warnings]
    assert any(warning.startswith("activations-asked: ") for warning in warnings)
    assert not any("activations-asked" in str(warning) for warning in fewbits.inspect(W4A16).warnings)


@pytest.mark.parametrize("folder", [W8A8, NVFP4A16], ids=lambda folder: folder.name)
def test_what_is_published_with_activations_or_as_floats_stays_as_it_is(folder):
    plain, asked = projections(folder, "stored"), projections(folder, "int8")
    assert [row.spec for row in plain] == [row.spec for row in asked]


def test_generated_text_differs_by_little_and_is_its_own_in_any_batch():
    asked = LLM(W4A16, activations="int8")
    params = SamplingParams(max_tokens=6)
    [alone] = asked.generate([[1, 2, 3]], params)
    together = asked.generate([[1, 2, 3], [4, 5]], params)
    assert together[0].token_ids == alone.token_ids


def test_verify_says_what_it_costs(capsys):
    assert main(["verify", str(W4A16), "--activations", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["activations_cost"] < 0.1
    assert main(["verify", str(W4A16), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["activations_cost"] is None


def test_the_products_are_those_of_the_quantized_inputs(tmp_path):
    ids = "1,2,3,4,5,6,7,8"
    for name in ("stored", "int8"):
        out = str(tmp_path / f"{name}.npy")
        options = ["--prompt-ids", ids, "--max-tokens", "1", "--json", "--activations", name, "--logits", out]
        assert main(["run", str(W4A16), *options]) == 0
    stored, asked = (np.load(tmp_path / f"{name}.npy") for name in ("stored", "int8"))
    difference = np.linalg.norm(asked - stored) / np.linalg.norm(stored)
    assert 1e-4 < difference < 0.1
