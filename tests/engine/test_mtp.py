"""Drafting with a model's own MTP modules: what they guess, beside an implementation of the tests' own that computes
everything anew each time; and that the text is that of plain decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import write
from small_model import FIXTURES
from step3p5_checkpoint import SMALL, random_tensors
from step3p5_reference import Step

from fewbits.engine.llm import LLM
from fewbits.engine.request import Request, SamplingParams
from fewbits.errors import PlanError
from fewbits.load import inspect

PROMPTS = [[7], [3, 4], [5, 9, 33, 1, 2, 8, 30, 12], np.random.default_rng(3).integers(0, 38, 50).tolist()]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def with_modules(count: int) -> dict[str, Any]:
    """The small model with so many modules; what they are stands at the end of each list."""
    config = dict(SMALL) | {"num_nextn_predict_layers": count}
    layers = config["num_hidden_layers"]
    for key in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        config[key] = config[key][:layers] + [config[key][-1]] * count
    return config


@pytest.fixture(scope="module", params=[1, 2, 3])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Step]:
    config = with_modules(request.param)
    tensors = random_tensors(config)
    return write(tmp_path_factory.mktemp("step"), tensors, config), Step(config, tensors)


def test_what_is_guessed_is_what_all_modules_say_of_all_tokens(model: tuple[Path, Step]) -> None:
    """Also where rows were made of guesses that turned out wrong, and where states waited for a draft."""
    folder, reference = model
    modules = reference.config["num_nextn_predict_layers"]
    llm = LLM(folder, draft="mtp", draft_tokens=modules, kv_dtype="f32")
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    propose, seen, calls = proposer.propose, [], 0

    def recorded(wanted: Mapping[int, tuple[Request, int]]) -> None:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:  # nothing is drafted now and then, as `lengths` may decide
            return
        propose(wanted)
        for request, _ in wanted.values():
            seen.append(([*request.prompt_ids, *request.output_ids], list(request.draft_ids)))

    proposer.propose = recorded
    llm.generate(PROMPTS, GREEDY)
    assert len(seen) > 40
    for known, draft in seen:
        assert draft == reference.drafts(known)[: len(draft)], len(known)
    assert {len(draft) for _, draft in seen} >= {modules}


@pytest.mark.parametrize("draft_tokens", [None, 1, 4])
def test_the_text_is_that_of_plain_decoding(model: tuple[Path, Step], draft_tokens: int | None) -> None:
    folder, _ = model
    plain, llm = LLM(folder), LLM(folder, draft="mtp", draft_tokens=draft_tokens)
    for wish in (GREEDY, SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)):
        expected = [result.token_ids for result in plain.generate(PROMPTS, wish)]
        results = llm.generate(PROMPTS, wish)
        assert [result.token_ids for result in results] == expected
    llm._scheduler.budget = 9  # prompts in chunks
    assert [result.token_ids for result in llm.generate(PROMPTS, wish)] == expected
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    assert proposer._sequences == {} and all(cache._sequences == {} for cache in proposer._caches)


def test_a_single_module_guesses_on_from_its_own_guesses() -> None:
    llm = LLM(FIXTURES / "step3p5-bf16", draft="mtp", draft_tokens=3)
    plain = LLM(FIXTURES / "step3p5-bf16")
    [result], [expected] = llm.generate([PROMPTS[2]], GREEDY), plain.generate([PROMPTS[2]], GREEDY)
    assert result.token_ids == expected.token_ids and result.speculation is not None
    assert result.speculation["drafted"] > 2 * GREEDY.max_tokens


def test_modules_are_planned_as_what_they_are_for(model: tuple[Path, Step]) -> None:
    folder, reference = model
    rows = [row for row in inspect(folder).rows if row.executed_as == "not_run"]
    assert len(rows) == 17 * reference.config["num_nextn_predict_layers"]
    assert all("--draft mtp drafts with it" in row.reason for row in rows)
    drafting = LLM(folder, draft="mtp")
    assert [row.name for row in drafting.plan.rows if row.executed_as == "not_run"] == []


def test_lists_that_end_with_the_models_layers_leave_modules_undescribed(tmp_path: Path) -> None:
    config = with_modules(1)
    config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    folder = write(tmp_path, random_tensors(with_modules(1)), config)
    assert inspect(folder).errors == []
    LLM(folder).generate([[1, 2]], SamplingParams(max_tokens=2))
    with pytest.raises(PlanError) as caught:
        LLM(folder, draft="mtp")
    assert caught.value.code == "draft-no-mtp"


def test_a_model_without_modules_says_so() -> None:
    with pytest.raises(PlanError) as caught:
        LLM(FIXTURES / "llama-bf16", draft="mtp")
    assert caught.value.code == "draft-no-mtp"
