"""`fewbits bench` on small checkpoints: figures hang together; the profile times the whole pass and changes nothing."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits import LLM
from fewbits.bench import Benchmark, bench, decode, prefill
from fewbits.bench.passes import CONTEXT, Passes
from fewbits.bench.profile import OPERATIONS, _TimedModel, profile
from fewbits.cli import main
from fewbits.engine.kvcache import KVCache, Part

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stdlib-lm" / "w4a16-asym"
CASES = (decode(1), decode(4), prefill(64), prefill(2048))

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(EXAMPLE)


@pytest.fixture(scope="module")
def found(llm: LLM) -> Benchmark:
    steps: list[tuple[int, int]] = []
    result = bench(llm, CASES, 2, lambda done, total: steps.append((done, total)))
    totals = {total for _, total in steps}
    assert len(totals) == 1 and steps[-1][0] == totals.pop()
    return result


def test_every_case_is_measured_as_often_as_asked(found: Benchmark) -> None:
    assert [one.case for one in found.measured] == list(CASES[:3])
    for one in found.measured:
        assert len(one.times) == len(one.limits) == 2 and min(one.times) > 0
        assert one.tokens_per_s == one.case.tokens / statistics.median(one.times)
        assert one.spread >= 0


def test_a_prompt_beyond_the_context_is_skipped_with_the_reason(found: Benchmark) -> None:
    assert found.skipped == {prefill(2048): "the model's context is 1024 tokens"}


def test_a_small_model_is_in_cache(found: Benchmark) -> None:
    assert found.in_cache


def test_no_pass_is_faster_than_the_limit_by_more_than_noise(found: Benchmark) -> None:
    for one in found.measured:
        if one.case.kind == "prefill" and one.share is not None:
            assert 0 < one.share < 1.2


def test_passes_leave_the_cache_as_it_was(llm: LLM) -> None:
    passes = Passes(llm, decode(2))
    for _ in range(2):
        passes.seconds()
        assert [passes.cache.length(sequence) for sequence in range(2)] == [CONTEXT, CONTEXT]


LATENTS = "norm, q_b, kv_b"


def test_the_profile_names_every_operation_and_adds_up(llm: LLM) -> None:
    operations = profile(llm, decode(1), 1)
    dense = [name for name in OPERATIONS if name not in ("router", "experts", LATENTS)]
    assert [operation.name for operation in operations] == dense
    assert all(operation.seconds > 0 for operation in operations)
    assert sum(operation.share for operation in operations) == pytest.approx(1)


@pytest.mark.parametrize(("folder", "without"), [("qwen3-moe-f32", {LATENTS}), ("deepseek-v2-f32", set())])
def test_the_profile_of_experts_names_router_and_experts(folder: str, without: set[str]) -> None:
    llm = LLM(Path(__file__).resolve().parents[1] / "fixtures" / folder)
    seconds = {operation.name: operation.seconds for operation in profile(llm, decode(1), 1)}
    assert seconds.keys() == OPERATIONS.keys() - without and min(seconds.values()) > 0


def test_the_timed_decoder_computes_the_same_bits(llm: LLM) -> None:
    def logits(model: object) -> np.ndarray:
        cache = KVCache(llm._loaded.cache_layers, max_pages=8)
        result: np.ndarray = model.forward(cache.batch([Part(0, list(range(1, 40)), logits=39)]), cache).logits  # type: ignore[attr-defined]
        return result

    np.testing.assert_array_equal(logits(llm._loaded.decoder), logits(_TimedModel(llm)))


def test_what_is_timed_is_what_takes_the_time(tmp_path: Path) -> None:
    """A head of 32,768 rows over one small layer takes more than half of a decode step, and qkv nearly none."""
    from make_synthetic import Shape, make

    shape = Shape(layers=1, hidden=256, heads=4, kv_heads=2, intermediate=256, vocab=32_768, context=512)
    make(tmp_path / "made", "bf16", shape)
    shares = {one.name: one.share for one in profile(LLM(tmp_path / "made"), decode(1), 1)}
    assert max(shares, key=lambda name: shares[name]) == "norm, head"
    assert shares["norm, qkv"] < shares["norm, head"] / 2


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(EXAMPLE), "--json", "--repeats", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["batch"] for one in printed["decode"]] == [1, 2, 4, 8, 16]
    assert [one["tokens"] for one in printed["prefill"]] == [128, 512]
    assert printed["in_cache"] and {one["share"] for one in printed["decode"]} == {None}
    assert [one["case"] for one in printed["profiles"]] == ["decode, batch 1", "decode, batch 16", "prefill 512"]
    assert printed["limits"]["read_gb_s"] > 0
    assert [*printed["skipped"]] == ["prefill 2048"]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(EXAMPLE), "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decode, batch 16") and line.endswith("in cache") for line in lines)
    assert sum(line.startswith("norm, gate, up") for line in lines) == 3


def test_no_repeats_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(EXAMPLE), "--repeats", "0"]) == 2
    assert "measure nothing" in capsys.readouterr().err
