"""docs/gallery.md means what it says: each case is planned as its text claims. tests/test_docs.py has its freshness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import fewbits
from fewbits.errors import FewbitsError
from fewbits.load import decode, load
from fewbits.plan import LoadPlan

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import gallery  # noqa: E402
from gallery_cases import ATTENTION, CASES, MLP  # noqa: E402

Q, K, V, O = (f"{ATTENTION}.{name}_proj" for name in "qkvo")  # noqa: E741


class Meaning(NamedTuple):
    """Module → its spec; those in `refused` and `not_run` don't run. Codes of all the plan's warnings and errors.
    `said` and `unsaid`: of a drafter, what is and isn't said of it beside its target.
    """

    specs: dict[str, str]
    codes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ("warning", "error", "its head is the model's", "its own is equal to it")


INT4 = "int4 g32 × a16"
STEP = "model.layers.3"
MEANINGS: dict[str, Meaning] = {
    "A quantized lm_head taken for an unquantized one": Meaning({"lm_head": INT4}),
    "A head that the config ignores and the file holds packed": Meaning({"lm_head": INT4}, ("ignored-but-quantized",)),
    "A drafter with a quantized head and projection of its own": Meaning(
        {"fc": INT4, "lm_head": INT4, "midlayer.self_attn.q_proj": "bfloat16"},
        said=("its embedding is the model's (it isn't stored)",),
    ),
    "A drafter and a target that are quantized differently": Meaning(
        {"fc": INT4, "lm_head": INT4}, said=("int8 channel × a16  cpu.dot_int16", "int4 g32 × a16  cpu.dot_int16")
    ),
    "A drafter with a head of its own, beside a target whose head has no `.weight`": Meaning(
        {"fc": INT4, "lm_head": "bfloat16"}, said=("int4 g32 × a16  cpu.dot_int16", "bfloat16   cpu.dot_bf16")
    ),
    "A drafter without a head, beside a target whose head is packed": Meaning(
        {"fc": INT4, "lm_head": "bfloat16"},
        not_run=("lm_head",),
        said=("its head is the model's (it isn't stored)",),
        unsaid=("warning", "error"),
    ),
    "A drafter without an embedding": Meaning(
        {"embed_tokens": "bfloat16"},
        not_run=("embed_tokens",),
        said=("its embedding is the model's (it isn't stored)",),
    ),
    "A drafter whose tables are equal to the target's": Meaning(
        {"embed_tokens": "bfloat16", "lm_head": "bfloat16"},
        said=(
            "its embedding is the model's (its own is equal to it)",
            "its head is the model's (its own is equal to it)",
            "not_run: bfloat16: the target's takes its place: its own is equal to it",
        ),
        unsaid=("warning", "error"),
    ),
    "A drafter with another embedding than the target's": Meaning(
        {"embed_tokens": "bfloat16", "lm_head": INT4},
        said=("warning: draft-embedding: embed_tokens: differs from the target's",),
        unsaid=("error", "is the model's"),
    ),
    "A drafter narrower than its target, and without a head": Meaning(
        {"embed_tokens": "bfloat16", "lm_head": "bfloat16"},
        not_run=("lm_head",),
        said=("draft-mismatch: lm_head: isn't stored, and the target's is 64 wide, the drafter 32",),
        unsaid=("warning",),
    ),
    "A drafter that reads other layers than it was trained on": Meaning(
        {"fc": "float32"},
        said=("warning: draft-rejected: 0 of 3", "behind layers 1, 1, 0 (the config's", "--draft-layers"),
        unsaid=("error",),
    ),
    "A scale a row, stored [N] where a kernel wants [N, 1]": Meaning(dict.fromkeys((Q, K, V), "fp8 channel × a16")),
    "An ignore list of fused names": Meaning(
        dict.fromkeys((Q, K, V), "bfloat16") | {O: INT4}, ("pattern-no-match", "targeted-but-dense")
    ),
    "Asymmetric experts": Meaning(
        {f"{MLP}.experts.0.up_proj": "bfloat16", f"{MLP}.experts.1.up_proj": "uint4 g32 asym × a16"},
        ("family-unknown",),
    ),
    "One weight, with and without quantized activations": Meaning({Q: INT4, O: "int4 g32 × int8 token dynamic"}),
    "NVFP4 shards under different global scales": Meaning(dict.fromkeys((Q, K, V), "fp4 g16+global × a16")),
    "A global scale of zero": Meaning({Q: "fp4 g16+global × a16"}),
    "An ignore list of another tool's patterns": Meaning(
        {Q: INT4, f"{MLP}.up_proj": "bfloat16"}, ("pattern-no-match", "targeted-but-dense")
    ),
    "A pattern that hits more than was meant": Meaning(
        {f"{MLP}.gate_proj": INT4, f"{MLP}.up_proj": INT4}, ("ignored-but-quantized",)
    ),
    "Several config groups": Meaning({Q: "fp8 channel × a16", O: INT4, "lm_head": "int8 channel × a16"}),
    "FP8 weights in a file whose status is frozen": Meaning({Q: "fp8 channel × a16"}),
    "A weight's scale that was lost": Meaning({Q: "unknown"}, ("module-incomplete",), refused=(Q,)),
    "A static input scale that was lost": Meaning(
        {Q: "fp8 channel × fp8 tensor static"}, ("scale-missing",), refused=(Q,)
    ),
    "A config that stands in text_config": Meaning({Q: INT4, O: INT4, K: "bfloat16"}),
    "MTP layers that aren't in the ignore list": Meaning(
        {"mtp.fc": "bfloat16", Q: INT4}, ("targeted-but-dense",), not_run=("mtp.fc",)
    ),
    "An activation order": Meaning({Q: "int4 g32 act-order × a16"}),
    "A quantized cache without its scales": Meaning({Q: INT4}, ("kv-scales-missing",)),
    "A dense sparsity_config": Meaning({Q: INT4}),
    "AMD Quark's INT8, with a shared expert that is excluded in part": Meaning(
        dict.fromkeys((f"{STEP}.self_attn.q_proj", f"{STEP}.share_expert.gate_proj"), "bfloat16")
        | dict.fromkeys(
            (f"{STEP}.self_attn.k_proj", f"{STEP}.share_expert.up_proj", f"{STEP}.share_expert.down_proj"),
            "int8 channel × int8 token dynamic",
        ),
        ("family-unknown",),
    ),
    "AMD Quark's AWQ mode, symmetric": Meaning(
        {Q: INT4, "model.layers.0.input_layernorm": "bfloat16", "lm_head": "bfloat16"}
    ),
    "A packed embedding that is the head too": Meaning({"model.embed_tokens": INT4, "lm_head": INT4}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "case"


def built(title: str, folder: Path) -> LoadPlan:
    next(case for case in CASES if case.title == title).build(folder)
    return fewbits.inspect(folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_it_is_planned_as_the_page_says(case: gallery.Case, folder: Path) -> None:
    meaning, plan = MEANINGS[case.title], built(case.title, folder)
    rows = {row.name: row for row in plan.rows}
    assert {name: str(rows[name].spec) for name in meaning.specs} == meaning.specs
    assert {notice.code for notice in (*plan.warnings, *plan.errors)} == set(meaning.codes)
    for name in meaning.specs:
        expected = "refused" if name in meaning.refused else "not_run" if name in meaning.not_run else "runs"
        assert expected == ("runs" if rows[name].runs else rows[name].executed_as), name
    assert plan.kv_cache is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_what_is_shown_is_the_commands_own(case: gallery.Case, folder: Path) -> None:
    case.build(folder)
    text = "\n".join(gallery.shown(case, folder))
    assert str(folder) not in text
    for code in MEANINGS[case.title].codes:
        assert f"  {code}: " in text
    for word in case.modules:
        assert word in text
    meaning = MEANINGS[case.title]
    unwrapped = text.replace("\n  ", " ")
    assert all(phrase in unwrapped for phrase in meaning.said)
    if case.target is not None:
        assert meaning.said and not [phrase for phrase in meaning.unsaid if phrase in unwrapped]


def decoded(title: str, folder: Path) -> dict[str, np.ndarray]:
    plan = built(title, folder)
    assert plan.checkpoint is not None
    with plan.checkpoint.reader() as reader:
        rows = [row for row in plan.rows if row.spec.weight.quantized]
        return {row.name: decode(plan, row, reader)[0].weight for row in rows}


def test_each_shard_keeps_its_global_scale(folder: Path) -> None:
    weights = decoded("NVFP4 shards under different global scales", folder)
    assert [weights[name].global_scale for name in (Q, K, V)] == [1 / 12343, 1 / 5334, 1 / 8001]


def test_scales_of_every_shape_are_one_a_row(folder: Path) -> None:
    weights = decoded("A scale a row, stored [N] where a kernel wants [N, 1]", folder)
    for name, rows in {Q: 64, K: 32, V: 32}.items():
        weight = weights[name]
        assert weight.scale.shape == (rows, 1)
        assert np.ptp(weight.scale.astype(np.float32)) > 0
    assert weights[K].dequantize().tolist() == weights[V].dequantize().tolist()


def test_a_zero_global_scale_is_named(folder: Path) -> None:
    built("A global scale of zero", folder)
    with pytest.raises(FewbitsError) as caught:
        load(folder, allow_reference=True)
    assert (caught.value.code, caught.value.module) == ("scale-invalid", f"{Q}.weight_global_scale")


def test_cases_without_a_fault_run(folder: Path) -> None:
    """A token each, so that nothing on the page is a promise."""
    for number, case in enumerate(CASES):
        plan = built(case.title, folder / str(number))
        if case.command == "run" or plan.errors or plan.family is None:
            continue
        if case.target is not None:
            target = folder / f"{number}-target"
            case.target(target)
            if any(phrase.startswith("draft-mismatch:") for phrase in MEANINGS[case.title].said):
                continue
            llm = fewbits.LLM(target, draft=folder / str(number), draft_tokens=2)
            [result] = llm.generate([[1, 2]], fewbits.SamplingParams(max_tokens=8, ignore_eos=True))
            assert result.speculation is not None and result.speculation["drafted"] > 0
            continue
        llm = fewbits.LLM(folder / str(number), allow_reference=True)
        assert llm.generate([[1, 2]], fewbits.SamplingParams(max_tokens=1))[0].generated_tokens == 1
