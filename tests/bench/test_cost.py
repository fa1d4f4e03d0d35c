"""What a pass costs, counted by hand, and the limit that follows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fewbits
from fewbits.bench.cost import Cost, Rates, Span, pass_cost
from fewbits.kernels.batch import CacheLayer
from fewbits.plan import LoadPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from make_synthetic import Shape, make

SHAPE = Shape(layers=2, hidden=256, heads=4, kv_heads=2, intermediate=512, vocab=1024, context=512)
LAYER = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512  # q and o, k and v, the feed-forward's three
HEAD = 1024 * 256


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> LoadPlan:
    folder = tmp_path_factory.mktemp("synthetic") / "bf16"
    make(folder, "bf16", SHAPE)
    return fewbits.inspect(folder)


def layers(window: int = 0) -> list[CacheLayer]:
    return [CacheLayer(2, 64, "bf16", window)] * 2


def total(cost: Cost) -> int:
    return sum(cost.macs.values())


def test_decoding_reads_every_weight_but_the_embedding_once_and_each_cache(planned: LoadPlan) -> None:
    spans = [Span(1, 100), Span(1, 30)]
    cost = pass_cost(planned, layers(), spans, "int8")
    assert cost.nbytes == 2 * (2 * LAYER + HEAD) + 2 * (130 * 2 * 2 * 64 * 2)
    # Attention is given a dot that this model's products don't use, to be seen apart: q k and p v of four heads.
    assert cost.macs["int8"] == 2 * 2 * 4 * 64 * 130
    assert total(cost) - cost.macs["int8"] == 2 * (2 * LAYER + HEAD)


def test_a_prefill_computes_one_row_of_logits_and_half_a_square_of_attention(planned: LoadPlan) -> None:
    cost = pass_cost(planned, layers(), [Span(100, 100)], "int8")
    assert total(cost) - cost.macs["int8"] == 100 * 2 * LAYER + HEAD
    assert cost.macs["int8"] == 2 * 2 * 4 * 64 * (100 * 101 // 2)
    assert cost.nbytes == 2 * (2 * LAYER + HEAD) + 2 * (100 * 2 * 2 * 64 * 2)


def test_a_window_hides_what_is_before_it(planned: LoadPlan) -> None:
    far, near = (pass_cost(planned, layers(window), [Span(1, 100)], "int8") for window in (0, 8))
    assert far.nbytes - near.nbytes == 2 * (92 * 2 * 2 * 64 * 2)


def test_experts_are_read_if_a_token_goes_to_them() -> None:
    """The router and two of five experts for one token; for many, nearly all of them once, and two for each token."""
    planned = fewbits.inspect(Path(__file__).resolve().parents[1] / "fixtures" / "qwen3-moe-stacked-bf16")
    expert, kv = 3 * 16 * 32, planned.model.cache_layers("bf16")
    experts = [row for row in planned.rows if row.kind == "expert"]
    packed = sum(row.execution.packed_bytes for row in experts)
    without = LoadPlan(model=planned.model, rows=[row for row in planned.rows if row.kind != "expert"])
    router = next(row for row in planned.rows if row.kind == "router")
    assert str(router.spec) == "bfloat16" and str(router.runs_as) == "float32"
    for tokens in (1, 7):
        cost, rest = (pass_cost(one, kv, [Span(tokens, tokens)], "int8") for one in (planned, without))
        assert total(cost) - total(rest) == tokens * 2 * expert
        assert cost.nbytes - rest.nbytes == round(packed * (1 - 0.6**tokens))


def test_latents_are_read_once_and_counted_for_every_head() -> None:
    """Latents of R numbers and 8 rotated ones, three layers, four heads; the products with latents are rows."""
    planned = fewbits.inspect(Path(__file__).resolve().parents[1] / "fixtures" / "deepseek-v2-f32")
    kv = planned.model.cache_layers("bf16")
    short, long = (pass_cost(planned, kv, [Span(1, entries)], "int8") for entries in (10, 110))
    rank = planned.model.layers[0].attention.kv_rank
    assert long.nbytes - short.nbytes == 100 * 3 * (rank + 8) * 2
    assert long.macs["int8"] - short.macs["int8"] == 100 * 3 * 4 * (2 * rank + 8)


def test_the_limit_is_the_larger_of_two_times() -> None:
    cost = Cost(1000, {"bf16": 600, "int8": 800})
    assert cost.limit(Rates(10.0, {"bf16": 100.0, "int8": 200.0})) == 100
    assert cost.limit(Rates(1000.0, {"bf16": 100.0, "int8": 200.0})) == 6 + 4
    assert cost.limit(Rates(None, {"bf16": 100.0, "int8": 200.0})) is None
    assert cost.limit(Rates(10.0, {"bf16": 100.0})) is None
