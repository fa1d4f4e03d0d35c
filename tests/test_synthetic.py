"""tools/make_synthetic.py: what it makes is what it says, planned without a warning, and runs natively."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.load import decode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from make_synthetic import SHARD, DrafterShape, Shape, make
from synthetic_schemes import SCHEMES, STD

TINY = Shape(layers=2, hidden=256, heads=4, kv_heads=2, intermediate=512, vocab=1004, context=512)
SPECS = {
    "bf16": "bfloat16",
    "w4a16": "int4 g128 × a16",
    "w4a16-asym": "uint4 g128 asym × a16",
    "w8a8": "int8 channel × int8 token dynamic",
    "fp8": "fp8 channel × fp8 token dynamic",
    "fp8a16": "fp8 channel × a16",
    "nvfp4": "fp4 g16+global × fp4 local",
    "nvfp4a16": "fp4 g16+global × a16",
    "mxfp4": "fp4 g32 e8m0 × fp4 g32 e8m0 dynamic",
    "mxfp4a16": "fp4 g32 e8m0 × a16",
}


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_planned_without_a_warning_and_runs(tmp_path: Path, scheme: str, head: bool) -> None:
    make(tmp_path / "made", scheme, TINY, head)
    llm = fewbits.LLM(tmp_path / "made")
    assert llm.warnings == [] and llm.plan.leftover_tensors == []
    specs = {row.name: str(row.spec) for row in llm.plan.rows if row.kind in ("linear", "head")}
    assert specs.pop("lm_head") == SPECS[scheme if head else "bf16"]
    assert set(specs.values()) == {SPECS[scheme]} and len(specs) == 14
    prompt = "def read(path): é"
    assert llm.tokenizer.decode(llm.encode(prompt)) == prompt
    logits = llm.logits(llm.encode(prompt))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 3
    [result] = llm.generate([prompt], fewbits.SamplingParams(max_tokens=4, ignore_eos=True))
    assert result.generated_tokens == 4


@pytest.mark.parametrize("scheme", ["bf16", "w4a16", "w8a8", "nvfp4"])
def test_experts_are_planned_without_a_warning_and_run(tmp_path: Path, scheme: str) -> None:
    shape = replace(TINY, experts=6, experts_per_token=2, intermediate=128)
    make(tmp_path / "made", scheme, shape, head=scheme != "bf16")
    llm = fewbits.LLM(tmp_path / "made")
    assert llm.warnings == [] and llm.plan.leftover_tensors == []
    experts = [row for row in llm.plan.rows if row.kind == "expert"]
    assert len(experts) == 2 * 6 * 3 and {str(row.spec) for row in experts} == {SPECS[scheme]}
    assert np.isfinite(llm.logits(llm.encode("def read(path): é"))).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_as_wide_as_real_ones(tmp_path: Path, scheme: str) -> None:
    make(tmp_path / "made", scheme, TINY)
    plan = fewbits.inspect(tmp_path / "made")
    [row] = [row for row in plan.rows if row.name == "model.layers.1.mlp.down_proj"]
    assert plan.checkpoint is not None
    with plan.checkpoint.reader() as reader:
        linear, notices = decode(plan, row, reader)
        weight = linear.weight.dequantize()
    assert not notices
    assert weight.std() == pytest.approx(STD, rel=0.1)
    assert abs(weight.mean()) < 0.1 * STD
    assert 2 * STD < abs(weight).max() < 6 * STD


def test_the_whole_model_is_llama_3_2_1b(tmp_path: Path) -> None:
    """Meta's model card counts 1.23 billion, head and embedding being one; here they are two."""
    count = sum(N * (K or 1) for _, N, K, _ in Shape().modules(head=False))
    assert count == 1_235_814_400 + 128_256 * 2048


def test_large_ones_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make.__globals__, "SHARD", 500_000)
    make(tmp_path / "made", "w4a16", TINY)
    assert len(list((tmp_path / "made").glob("model-*-of-*.safetensors"))) > 2
    assert fewbits.inspect(tmp_path / "made").warnings == []
    assert SHARD > 500_000


def test_a_shape_that_a_scheme_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        make(tmp_path / "made", "w4a16", Shape(layers=1, hidden=64, vocab=300))
    with pytest.raises(ValueError, match="at least 258"):
        make(tmp_path / "made", "bf16", Shape(layers=1, hidden=64, intermediate=64, vocab=200))


@pytest.mark.parametrize("scheme", ["bf16", "w4a16", "w8a8"])
def test_a_drafter_runs_beside_its_target(scheme: str, tmp_path: Path) -> None:
    sizes = {"layers": 6, "hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocab": 1024, "context": 256}
    make(tmp_path / "target", "w4a16", Shape(**sizes), head=True)
    make(tmp_path / "drafter", scheme, DrafterShape(**sizes, draft_vocab=512), head=scheme != "bf16")
    planned = fewbits.inspect(tmp_path / "drafter")
    assert planned.errors == [] and planned.warnings == [] and planned.leftover_tensors == []
    llm = fewbits.LLM(tmp_path / "target", draft=tmp_path / "drafter", draft_tokens=3)
    [result] = llm.generate([[1, 2, 3]], fewbits.SamplingParams(max_tokens=16, ignore_eos=True))
    assert result.speculation is not None and result.speculation["drafted"] > 16
