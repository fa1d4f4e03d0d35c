"""bench/compare.py without peers: its worker protocol with fewbits' own, limits, CSV, tables and plot."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewbits import LLM
from fewbits.bench import pass_cost
from fewbits.bench.cost import Span

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "peers"))

from compare import Comparison, Turns
from comparison import (
    CASES,
    FEWBITS,
    FIRST_TOKEN,
    Case,
    Fact,
    Result,
    Variant,
    cost,
    read,
    read_machine,
    shape_of,
    write,
)
from comparison_plot import plot
from comparison_table import tables
from make_synthetic import Shape, make
from peers.process import Worker, WorkerError
from worker import prompts, stored_bytes

SHAPE = Shape(layers=2, hidden=256, heads=4, kv_heads=2, intermediate=512, vocab=1004, context=4096)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and no peer."""
    folder = tmp_path_factory.mktemp("peers")
    for scheme in ("bf16", "w4a16"):
        make(folder / "models" / scheme, scheme, SHAPE)
    return folder


def variant(program: str = FEWBITS, worker: str = "fewbits", model: str = "w4a16", scheme: str = "W4A16") -> Variant:
    return Variant("4 bits", program, scheme, worker, model)


def test_a_group_is_measured_and_who_is_missing_is_named(peers: Path) -> None:
    cases = (Case("decode", 2), Case("prefill", 32))
    one, no_model, no_program = variant(), variant(model="none"), variant("llama.cpp", "llama_cpp", "w4a16", "Q4_0")
    rounds = [*Comparison(peers, 1, 2, Turns(peers / "lock")).group([one, no_model, no_program], cases)]
    assert len(rounds) == 2
    rows, facts = rounds[-1]
    assert [row.case for row in rows] == ["decode, batch 2", "prefill 32", FIRST_TOKEN, "", ""]
    assert [row.note for row in rows] == ["", "", "", "there is no model for it", "there is no environment for it"]
    for row in rows[:2]:
        assert len(row.seconds) == len(row.limits) == 2 and min(row.seconds) > 0
        assert row.activations == "bfloat16" and row.share is not None
    assert len(rows[2].seconds) == 3 and min(rows[2].seconds) > 0.05
    assert {fact.name: fact.value for fact in facts}["threads"] == "1"
    assert any(fact.name == "read GB/s" and float(fact.low) <= float(fact.value) <= float(fact.high) for fact in facts)


def test_what_a_worker_cannot_do_is_an_error_and_the_next_question_works(peers: Path) -> None:
    worker = Worker(Path(sys.executable), "fewbits", peers / "models" / "w4a16", 1)
    try:
        assert not worker.wait(0.001)
        assert worker.wait() and worker.started > 0.05
        with pytest.raises(WorkerError, match="UsageError.*5000 tokens"):
            worker.ask({"kind": "prefill", "tokens": 5000})
        assert worker.ask({"kind": "prefill", "tokens": 8})["seconds"] > 0
        worker.ask({"kind": "decode", "batch": 1, "context": 4, "steps": 1})
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [("fewbits", "none", "CheckpointError"), ("llama_cpp", "w4a16", "it ended: ModuleNotFoundError.*llama_cpp")],
)
def test_what_does_not_start_says_why(peers: Path, name: str, model: str, words: str) -> None:
    worker = Worker(Path(sys.executable), name, peers / "models" / model, 1)
    try:
        with pytest.raises(WorkerError, match=words):
            worker.wait()
    finally:
        worker.close()


def test_decoding_yields_a_time_for_each_token_but_the_first(peers: Path) -> None:
    from fewbits_worker import Engine

    engine = Engine(peers / "models" / "w4a16", 1)
    steps = engine.decode(prompts(3, 5), 7)
    assert len([*steps]) == 6
    assert min(engine.decode(prompts(1, 5), 3)) > 0


def test_prompts_are_the_same_every_time_and_share_their_beginning() -> None:
    assert prompts(2, 5) == prompts(3, 5)[:2]
    assert prompts(2, 5)[0] != prompts(2, 5)[1]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scheme", ["bf16", "w4a16"])
def test_the_limit_is_that_of_fewbits_bench(peers: Path, scheme: str, case: Case) -> None:
    from fewbits_worker import Engine

    engine = Engine(peers / "models" / scheme, 1)
    llm: LLM = engine._llm
    spans = [Span(1 if case.kind == "decode" else case.tokens, case.seen[-1])] * case.sequences
    expected = pass_cost(llm.plan, llm._loaded.cache_layers, spans, "bf16")
    assert cost(shape_of(peers / "models" / scheme), engine.about(), case, "bf16") == expected


def test_stored_bytes_leave_out_the_embedding(peers: Path) -> None:
    linears = sum(N * K for _, N, K in SHAPE.linears()) * SHAPE.layers + SHAPE.vocab * SHAPE.hidden
    norms = (2 * SHAPE.layers + 1) * SHAPE.hidden
    assert stored_bytes(peers / "models" / "bf16") == 2 * (linears + norms)


def row(program: str, case: str, tokens: int, seconds: list[float], limits: list[float], note: str = "") -> Result:
    return Result("4 bits", program, "a & b", "1.0", "int8", case, tokens, seconds, limits, note)


ROWS = [
    row(FEWBITS, "decode, batch 1", 1, [0.02, 0.025, 0.04], [0.02, 0.02, 0.02]),
    row(FEWBITS, FIRST_TOKEN, 1, [0.5, 0.75, 2.0], []),
    row("llama.cpp", "decode, batch 1", 1, [0.05, 0.05, 0.05], [0.04, 0.03, 0.02]),
    row("llama.cpp", "prefill 512", 512, [], [], "RuntimeError: no"),
    Result("4 bits", "vLLM", "W4", note="there is no model for it"),
]


def test_figures_are_medians() -> None:
    assert ROWS[0].per_second == (40, 25, 50)
    assert ROWS[0].share == pytest.approx(0.8) and ROWS[2].share == pytest.approx(0.6)
    assert ROWS[0].limit_per_second == 50


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "results.csv", ROWS)
    assert read(tmp_path / "results.csv") == ROWS
    facts = [Fact("4 bits", "processor", "one, of many"), Fact("4 bits", "read GB/s", "40.1", "39.0", "41.0")]
    write(tmp_path / "machine.csv", facts)
    assert read_machine(tmp_path / "machine.csv") == facts


def test_tables_say_all_of_it() -> None:
    lines = tables(ROWS, [Fact("4 bits", "read GB/s", "40.1", "39.0", "41.0")]).splitlines()
    assert "| 4 bits | read GB/s 40.1 (39.0 – 41.0) |" in lines
    assert "| fewbits a & b | 40.0 (25.0 – 50.0) | – | – | – | – | – | – | 0.75 s (0.50 – 2.00) |" in lines
    assert "| llama.cpp a & b | 60 % | – | – | – | – | – | – |" in lines
    assert "| llama.cpp | 1.0 | a & b | int8 |" in lines
    assert lines[-2:] == [
        "- llama.cpp a & b, prefill 512: RuntimeError: no",
        "- vLLM W4: there is no model for it",
    ]


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(plot(ROWS))
    bars = [float(one.get("width", "")) for one in root.iter(f"{SVG}rect") if one.get("height") == "12"][2:]
    assert bars[0] / bars[1] == pytest.approx(40 / 20, rel=0.01)
    words = [one.text for one in root.iter(f"{SVG}text")]
    assert "fewbits a & b" in words and "llama.cpp a & b" in words
    assert "vLLM W4" not in words
