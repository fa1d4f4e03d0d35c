"""The perplexity table: how text is scored, and that the committed results are whole and within their bounds.

That README and plot are made from these results is checked by tests/test_docs.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits import LLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import heldout
import perplexity_report as report
from perplexity_plot import Mark, plot
from svg import ticks

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = ROOT / "examples" / "stdlib-lm" / "bf16"
VARIANTS = [(scheme, head) for scheme in report.SCHEMES for head in report.HEADS]


def test_each_token_but_the_first_of_a_text_is_predicted_once() -> None:
    texts = ["abcdefg", "hi", ""]
    windows = list(heldout.windows(texts, lambda text: [1, *map(ord, text)], end_id=0, positions=4))
    assert [len(window) for window in windows] == [5, 5, 4, 2]
    predicted = [token for window in windows for token in window[1:]]
    assert predicted == [*map(ord, "abcdefg"), 0, *map(ord, "hi"), 0, 0]
    assert windows[1][0] == windows[0][-1]


def test_first_takes_whole_windows() -> None:
    windows = [[1, 2, 3], [3, 4, 5], [5, 6]]
    assert heldout.first(windows, 3) == windows[:2]
    assert heldout.first(windows, 4) == windows[:2]
    assert heldout.first(windows, 100) == windows


def test_nats() -> None:
    assert heldout.nats(np.zeros((2, 8), np.float32), [0, 3, 7]) == pytest.approx(2 * math.log(8))
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32)) + np.float32(90)
    assert heldout.nats(logits, [2, 1, 2]) == pytest.approx(-math.log(0.25) - math.log(0.7), abs=1e-5)


def result(program: str, *windows: tuple[int, float]) -> report.Result:
    return report.Result.of([*windows], scheme="w8a8", head="bf16", program=program, bytes=1, model="m", how="")


def test_difference_and_its_standard_error() -> None:
    one, other = result("one", (100, 203.0), (100, 201.0)), result("other", (100, 200.0), (100, 200.0))
    found = report.difference(one, other)
    assert found.relative == pytest.approx(math.exp(0.02) - 1)
    assert found.relative == pytest.approx(one.perplexity / other.perplexity - 1)
    # Two windows at 0.03 and 0.01 nats a token: their mean is known to 0.01.
    assert found.error == pytest.approx(0.01)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [result("one", (100, 203.25), (7, 1.5)), result("other", (100, 200.0), (7, 2.0))]
    for row in rows:
        report.append(tmp_path / "results.csv", row)
    for row, read in zip(rows, report.read(tmp_path / "results.csv"), strict=True):
        assert read.windows == row.windows and read.tokens == 107
        assert read.perplexity == pytest.approx(row.perplexity, abs=1e-6)
        assert (read.scheme, read.head, read.program, read.bytes) == (row.scheme, row.head, row.program, row.bytes)


def test_ticks_enclose_the_values() -> None:
    assert ticks(20.3, 25.9) == [20, 21, 22, 23, 24, 25, 26]
    assert ticks(9.98, 10.42) == [9.9, 10.0, 10.1, 10.2, 10.3, 10.4, 10.5]


def test_marks_stand_where_their_values_are() -> None:
    marks = [Mark("a & b", 20.0, 21.0, "bf16"), Mark("a & b", 22.0, 24.0, "int4")]
    drawn = plot(marks, ["a & b"], ("bf16", "int4"), 1024)
    assert "a &amp; b" in drawn
    at = [float(line.split('"')[1]) for line in drawn.splitlines() if line.startswith("<circle")][-4:]
    peer, own, peer_int4, own_int4 = at
    assert own < peer < own_int4 < peer_int4
    assert peer_int4 - peer == pytest.approx(3 * (peer - own), abs=0.2)


ROWS = report.read()


def test_every_variant_is_there_once_over_the_same_text_of_one_model() -> None:
    keys = [(row.scheme, row.head, row.program) for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert {(*variant, program) for variant in VARIANTS for program in (report.FEWBITS, report.PEER)} <= set(keys)
    asked = {(scheme, head, report.FEWBITS_INT8) for scheme in report.INTEGER_WEIGHTS for head in report.HEADS}
    assert asked <= set(keys)
    assert {(scheme, "bf16", report.CONTROL) for scheme in report.QUANTIZED_ACTIVATIONS} <= set(keys)
    assert len({(row.model, row.tokens) for row in ROWS}) == 1
    assert len({tuple(count for count, _ in row.windows) for row in ROWS}) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.scheme}-{row.head}-{row.program}")
def test_perplexity_is_that_of_its_windows(row: report.Result) -> None:
    again = report.Result.of([*row.windows], scheme="", head="", program="", bytes=0, model="", how="")
    assert (row.tokens, row.perplexity) == (again.tokens, pytest.approx(again.perplexity, rel=1e-6))
    if row.program in (report.FEWBITS, report.FEWBITS_INT8):
        assert row.how == "99 of 99 products native"
    else:
        quantized = 98 if row.scheme in report.QUANTIZED_ACTIVATIONS else 0  # 14 layers of 7; the head never
        assert row.how.endswith(f"; {quantized} inputs quantized")


@pytest.mark.parametrize(("scheme", "head"), VARIANTS)
def test_fewbits_and_transformers_agree(scheme: str, head: str) -> None:
    """Within the bound, or within it of transformers with a bfloat16 cache, as fewbits has one."""
    results = report.Results(ROWS)
    found = results.difference(scheme, head)
    if (scheme, head) in results.beyond():
        found = results.difference(scheme, head, other=report.CONTROL)
    assert abs(found.relative) <= report.bound(scheme), found


def test_the_example_still_has_the_perplexity_of_the_table() -> None:
    [row] = [row for row in ROWS if (row.scheme, row.head, row.program) == ("bf16", "bf16", report.FEWBITS)]
    weights = (ORIGINAL / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] == row.model, "tools/perplexity.py measured another model"
    llm = LLM(ORIGINAL)
    config = json.loads((ORIGINAL / "config.json").read_text())
    windows = heldout.windows(heldout.texts(), llm.encode, config["eos_token_id"], config["max_position_embeddings"])
    window, (count, nats) = next(windows), row.windows[0]
    assert heldout.predicted(window) == count
    assert heldout.nats(llm.logits(window[:-1]), window) == pytest.approx(nats, rel=5e-4)
