"""The example's drafters, trained and quantized by llm-compressor, on text that neither they nor their target have
seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits.engine.llm import LLM
from fewbits.engine.request import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "stdlib-lm"
sys.path.append(str(ROOT / "tools"))

from heldout import texts  # noqa: E402

DRAFTERS = ("drafter-w4a8", "drafter-w4a16-asym", "drafter-w8a8", "drafter-fp8")
PROMPTS, PROMPT, ANSWER = 200, 32, 64


@pytest.fixture(scope="module", params=["w4a16-asym", "bf16"])
def target(request: pytest.FixtureRequest) -> tuple[Path, LLM]:
    return EXAMPLE / request.param, LLM(EXAMPLE / request.param)


def prompts(llm: LLM) -> list[list[int]]:
    ids = np.array([token for text in texts() for token in llm.encode(text)])
    starts = np.random.default_rng(0).integers(0, len(ids) - PROMPT, PROMPTS)
    return [ids[start : start + PROMPT].tolist() for start in starts]


@pytest.fixture(scope="module")
def answers(target: tuple[Path, LLM]) -> list[list[int]]:
    _, llm = target
    results = llm.generate(prompts(llm), SamplingParams(max_tokens=ANSWER, ignore_eos=True))
    return [result.token_ids for result in results]


@pytest.mark.parametrize("name", DRAFTERS)
def test_200_answers_are_those_without_it(name: str, target: tuple[Path, LLM], answers: list[list[int]]) -> None:
    """Greedy; and with four draft tokens a pass gives 2.8 and more of the target that it was made for, the bonus token
    counted.
    """
    folder, plain = target
    llm = LLM(folder, draft=EXAMPLE / name, draft_tokens=4)
    results = llm.generate(prompts(plain), SamplingParams(max_tokens=ANSWER, ignore_eos=True))
    assert [result.token_ids for result in results] == answers
    assert llm._driver is not None
    summary = llm._driver.total.summary()
    assert summary["mean_tokens_per_pass"] >= (2.8 if folder.name == "w4a16-asym" else 2.5)
    assert llm.doubt is None


def test_sampled_answers_are_those_without_it(target: tuple[Path, LLM]) -> None:
    folder, plain = target
    wish = SamplingParams(max_tokens=ANSWER, temperature=0.8, top_p=0.95, seed=3, ignore_eos=True)
    llm = LLM(folder, draft=EXAMPLE / DRAFTERS[0], draft_tokens=4)
    some = prompts(plain)[:50]
    expected = [result.token_ids for result in plain.generate(some, wish)]
    assert [result.token_ids for result in llm.generate(some, wish)] == expected


def test_every_module_of_it_is_quantized_and_its_embedding_the_targets() -> None:
    for name in DRAFTERS:
        llm = LLM(EXAMPLE / "w4a16-asym", draft=EXAMPLE / name)
        assert llm.drafter is not None and llm.warnings == []
        rows = {row.name: row for row in llm.drafter.planned.plan.rows}
        linears = [row for row in rows.values() if row.kind in ("linear", "head")]
        assert len(linears) == 9 and all(row.spec.weight.quantized for row in linears)
        assert {"fc", "lm_head"} <= {row.name for row in linears}
        assert llm.drafter.planned.of_target == {"embedding": "it isn't stored"} and llm.drafter.planned.boundaries == (
            2,
            7,
            11,
        )
