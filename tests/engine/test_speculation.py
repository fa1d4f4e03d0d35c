"""Speculative decoding changes when tokens come, never which: greedy or sampled, alone or in company, with any
drafter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafters import DRAFTERS, NAMES, TARGET, changed, in_one_direction
from small_model import FIXTURES

from fewbits.engine import runner
from fewbits.engine.llm import LLM
from fewbits.engine.request import Request, Result, SamplingParams, Speculation
from fewbits.engine.sampler import distribution
from fewbits.engine.speculative.driver import Driver
from fewbits.engine.speculative.eagle import Eagle
from fewbits.engine.speculative.lengths import Fixed
from fewbits.engine.speculative.ngram import NGram
from fewbits.errors import Notice, UsageError

PROMPTS = [[5, 9, 33], [7], [60, 2, 2, 41, 8, 8, 19, 30], list(range(3, 90))]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
EVERYTHING = SamplingParams(
    max_tokens=24,
    min_tokens=3,
    temperature=1.3,
    top_k=40,
    top_p=0.97,
    min_p=0.001,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias={5: 1.5},
    seed=11,
)
WISHES = [GREEDY, EVERYTHING, SamplingParams(max_tokens=1), SamplingParams(max_tokens=24, stop_token_ids=(30, 41))]


class Oracle:
    """Knows what comes, and says so of each token, unless `wrong` says that it be mistaken there."""

    taps: Sequence[int] = ()

    def __init__(self, answers: Mapping[tuple[int, ...], list[int]], wrong: Sequence[bool] = (False,)) -> None:
        self.answers, self.wrong = answers, wrong

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        for request, count in wanted.values():
            known = len(request.output_ids)
            answer = self.answers[tuple(request.prompt_ids)][known : known + count]
            request.draft_ids = [
                token ^ 1 if self.wrong[(known + place) % len(self.wrong)] else token
                for place, token in enumerate(answer)
            ]

    def watch(self, request: Request, states: Sequence[Any], new: int) -> None:
        assert not states

    def forget(self, sequence: int) -> None:
        pass

    def doubt(self) -> Notice:
        return Notice("draft-rejected", "", "it was wrong on purpose")


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(TARGET)


@pytest.mark.parametrize("draft_tokens", [None, 1, 4])
@pytest.mark.parametrize("name", ["ngram", *NAMES])
def test_results_are_those_without_a_drafter(name: str, draft_tokens: int | None, plain: LLM) -> None:
    draft = name if name == "ngram" else DRAFTERS / name
    llm = LLM(TARGET, draft=draft, draft_tokens=draft_tokens, allow_reference=True)
    for wish in WISHES:
        alone = tokens(plain.generate(PROMPTS, wish))
        assert tokens(llm.generate(PROMPTS, wish)) == alone
        assert [llm.generate([prompt], wish)[0].token_ids for prompt in PROMPTS] == alone
    llm._scheduler.budget = 7  # prompts in chunks, drafts cut
    assert tokens(llm.generate(PROMPTS, EVERYTHING)) == tokens(plain.generate(PROMPTS, EVERYTHING))


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
@pytest.mark.parametrize(
    "target", ["w8a8-dynamic-head", "fp8-dynamic", "nvfp4", "mistral-window8-f32", "qwen3-moe-f32"]
)
def test_whatever_the_target_and_its_cache(target: str, kv_dtype: Any) -> None:
    wish = SamplingParams(max_tokens=40, ignore_eos=True)
    prompt = [3, 4, 5, 6] * 6
    plain = LLM(FIXTURES / target, kv_dtype=kv_dtype, allow_reference=True)
    expected = plain.generate([prompt], wish)[0].token_ids
    llm = LLM(FIXTURES / target, kv_dtype=kv_dtype, draft="ngram", draft_tokens=6, allow_reference=True)
    # As the n-grams of a random model's text seldom repeat, an oracle drafts, right and wrong in turns.
    llm._driver = Driver(Oracle({tuple(prompt): expected}, (False, False, False, True)), Fixed(6))
    result = llm.generate([prompt], wish)[0]
    assert result.token_ids == expected
    assert result.speculation is not None and result.speculation["accepted"] == 29


def test_what_is_drafted_and_accepted_is_counted(plain: LLM) -> None:
    wish = SamplingParams(max_tokens=13, ignore_eos=True)
    answers = {tuple(prompt): plain.generate([prompt], wish)[0].token_ids for prompt in PROMPTS}
    llm = LLM(TARGET, draft="ngram")
    # Token 0 comes from the prompt's pass. Then 1-3 and 4 follow at once; 5 is wrong, so 5 alone; 6-8, 9; 10; 11, 12.
    llm._driver = Driver(Oracle(answers, (False,) * 5 + (True,)), Fixed(3))
    result = llm.generate([PROMPTS[0]], wish)[0]
    assert result.token_ids == answers[tuple(PROMPTS[0])]
    speculation = result.speculation
    assert speculation is not None and llm._driver.total.summary() == speculation
    # passes: [1 2 3] → 4 tokens; [x] → 1; [6 7 8] → 4; [10 x] → 2 (11 is wrong); then 12 alone, without room for a
    # draft
    assert speculation["mean_tokens_per_pass"] == 12 / 5
    assert speculation["drafted"] == 3 + 3 + 3 + 2
    assert speculation["accepted"] == 3 + 0 + 3 + 1
    assert speculation["per_position"] == [3 / 4, 2 / 4, 2 / 4]


def test_statistics_of_several_requests_add_up() -> None:
    first, second = Speculation(), Speculation()
    first.count(drafted=3, accepted=2, tokens=3)
    second.count(drafted=4, accepted=4, tokens=5)
    second.count(drafted=0, accepted=0, tokens=1)
    first.add(second)
    assert first.summary() == {
        "drafted": 7,
        "accepted": 6,
        "acceptance": 6 / 7,
        "per_position": [1.0, 1.0, 0.5, 0.5],
        "mean_tokens_per_pass": 3.0,
    }
    assert Speculation().summary()["acceptance"] is None


# The distribution. Tokens are the same as without drafts, so this holds by construction; the rule is tested by itself
# all the same: what is kept and what comes instead, over many seeds, against what is to be sampled from.

SEEDS = 4000
DRAFTED = [1, 3, 0]  # of which the first is likely, the second less so, the third impossible


def _logits() -> np.ndarray:
    return np.log(
        np.array([[0.05, 0.6, 0.25, 0.1, 1e-9], [0.3, 0.1, 0.2, 0.4, 1e-9], [1e-9, 0.5, 0.2, 0.3, 0.1], [0.2] * 5])
    ).astype(np.float32)


def _emitted(seed: int, params: SamplingParams) -> tuple[int, ...]:
    wish = SamplingParams(temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, seed=seed)
    request = Request(0, [0], wish, frozenset(), 10, None, 0.0)
    logits = _logits()
    runner._verify(request, DRAFTED, logits, logits.argmax(1))
    return tuple(request.output_ids)


def _chi_square(params: SamplingParams) -> tuple[float, int]:
    """Of the first two tokens that come, against the product of the distributions; and its degrees of freedom."""
    first, second = (distribution(row, params) for row in _logits()[:2])
    expected: dict[tuple[int, ...], float] = {}
    for token, p in enumerate(first):
        if token != DRAFTED[0]:
            expected[(token,)] = p
        else:  # the draft is accepted: the next row is seen too
            expected |= {(token, other): p * q for other, q in enumerate(second)}
    seen: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    for seed in range(SEEDS):
        seen[_emitted(seed, params)[:2]] += 1
    likely = [key for key, p in expected.items() if p * SEEDS >= 5]
    assert sum(seen[key] for key in expected if expected[key] < 1e-6) == 0
    statistic = sum((seen[key] - SEEDS * expected[key]) ** 2 / (SEEDS * expected[key]) for key in likely)
    return statistic, len(likely) - 1


# The 0.999 quantiles of chi-square with 3 … 8 degrees of freedom.
QUANTILES = {3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.9)])
def test_sampled_tokens_have_the_distribution_of_plain_sampling(params: SamplingParams) -> None:
    statistic, freedom = _chi_square(params)
    assert statistic < QUANTILES[freedom]


def test_the_test_of_the_distribution_fails_when_drafts_are_kept_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.sample

    def eager(logits: np.ndarray, best: int, request: Request) -> int:
        """Keeps a draft token whenever it isn't far from the best: what "typical acceptance" does."""
        draft = DRAFTED[len(request.output_ids)] if len(request.output_ids) < len(DRAFTED) else best
        return (
            draft
            if logits[draft] > logits[best] - 2 and request.generator.random() < 0.2
            else right(logits, best, request)
        )

    monkeypatch.setattr(runner, "sample", eager)
    statistic, freedom = _chi_square(SamplingParams(temperature=1.0))
    assert statistic > QUANTILES[freedom]


# Looking up


def test_ngrams_follow_the_latest_occurrence_of_the_longest_suffix() -> None:
    ngram = NGram(longest=3, shortest=2)
    assert ngram.continuation([1, 2, 3, 4, 2, 3], 0, 2) == [4, 2]
    assert ngram.continuation([1, 2, 3, 4, 2, 3, 9, 2, 3], 0, 3) == [9, 2, 3]
    assert ngram.continuation([1, 2, 3, 4, 2, 3, 9, 2, 3, 5], 0, 3) == []
    assert ngram.continuation([7, 8, 1, 7, 8, 2, 1, 7, 8], 1, 1) == [2]  # "1 7 8" goes before "7 8"
    assert ngram.continuation([5, 5, 5], 2, 4) == [5, 5, 5, 5]  # the text ends first, and repeats
    assert ngram.continuation([1], 3, 4) == [] and ngram.continuation([1, 2], 4, 4) == []


def test_ngrams_of_a_sequence_are_forgotten_with_it() -> None:
    ngram = NGram()
    ngram.continuation([1, 2, 3, 1, 2], 0, 2)
    ngram.forget(0)
    assert ngram.continuation([1, 2], 0, 2) == [] and not ngram._seen[0].places


# What goes wrong


def test_acceptance_near_zero_is_said_with_what_to_look_at(plain: LLM, tmp_path: Any) -> None:
    llm = LLM(TARGET, draft=changed(tmp_path / "drafter"), draft_tokens=2)
    assert llm.doubt is None
    llm.generate(PROMPTS, SamplingParams(max_tokens=60, temperature=1.5, ignore_eos=True))
    doubt = llm.doubt
    assert doubt is not None and doubt.code == "draft-rejected"  # it is random
    for part in ("first draft tokens were accepted", "behind layers 0, 1, 2", "boundaries", "lm_head bfloat16"):
        assert part in doubt.text


def test_wrong_layers_give_the_warning_and_the_right_ones_none(tmp_path: Path) -> None:
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    for build, folder in zip(in_one_direction(), (target, drafter), strict=True):
        build(folder)
    for layers, accepted in ((None, 1.0), ((1, 1, 0), 0.0)):
        llm = LLM(target, draft=drafter, draft_tokens=1, draft_layers=layers)
        results = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=40, ignore_eos=True))
        assert {token for result in results for token in result.token_ids} == {7}
        assert llm._driver is not None and llm._driver.total.acceptance == accepted
        doubt = llm.doubt
        assert (doubt is None) == (layers is None)
        if doubt is not None:
            for part in ("behind layers 1, 1, 0 (as asked)", "--draft-layers", "fc float32"):
                assert part in doubt.text


def test_where_nobody_asks_for_a_number_only_likely_guesses_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain ends where the drafter isn't sure, but for its first token; of each request by itself."""
    drafted: list[list[int]] = []
    propose = Eagle.propose

    def seen(self: Eagle, wanted: Any) -> None:
        propose(self, wanted)
        drafted.extend(request.draft_ids for request, _ in wanted.values())

    monkeypatch.setattr(Eagle, "propose", seen)
    lengths = []
    for least in (0.0, 0.02, 0.5, 1.5):
        llm = LLM(TARGET, draft=DRAFTERS / "bf16")
        assert llm.drafter is not None
        llm._driver = Driver(Eagle(llm.drafter, llm._cache.max_pages, least), Fixed(6))
        drafted.clear()
        llm.generate(PROMPTS[:3], replace(GREEDY, max_tokens=20))
        lengths.append([len(draft) for draft in drafted])
    everything, some, few, first = lengths
    assert max(everything) == max(some) == 6 and set(first) == {1}
    assert sum(everything) / len(everything) > sum(some) / len(some) > sum(few) / len(few) > 1
    assert len(set(some)) > 2


def test_a_drafter_that_is_right_is_not_doubted(plain: LLM) -> None:
    answers = {tuple(prompt): plain.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS}
    llm = LLM(TARGET, draft="ngram")
    llm._driver = Driver(Oracle(answers), Fixed(2))
    llm.generate(PROMPTS * 3, GREEDY)
    assert llm.doubt is None


@pytest.mark.parametrize("name", ["ngram", "bf16"])
def test_an_interrupt_loses_nothing(name: str, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: in the target's pass, in the drafter's."""
    expected = plain.generate([PROMPTS[2]], GREEDY)[0].token_ids
    llm = LLM(TARGET, draft="ngram" if name == "ngram" else DRAFTERS / name, draft_tokens=3)
    models: list[tuple[Any, str]] = [(llm._loaded.decoder, "forward")]
    if llm.drafter is not None:
        models.append((llm.drafter.drafter, "draft"))
    for model, method in models:
        for at in range(1, 9):
            calls, forward = 0, getattr(type(model), method)

            def interrupted(
                self: Any, *arguments: Any, forward: Any = forward, model: Any = model, at: int = at
            ) -> Any:
                nonlocal calls
                result = forward(self, *arguments)
                calls += self is model
                if self is model and calls == at:
                    raise KeyboardInterrupt
                return result

            with monkeypatch.context() as patch:
                patch.setattr(type(model), method, interrupted)
                stream = llm.stream(PROMPTS[2], GREEDY)
                with pytest.raises(KeyboardInterrupt):
                    list(stream)
            for _ in stream:
                pass
            while not stream._request.done:
                llm._step()
            assert stream.result.token_ids == expected
            stream.close()


def test_draft_tokens_are_in_range() -> None:
    for wrong in (0, -1, 1000):
        with pytest.raises(UsageError):
            LLM(TARGET, draft="ngram", draft_tokens=wrong)


def test_the_drafters_cache_is_freed_with_its_requests(plain: LLM) -> None:
    llm = LLM(TARGET, draft=DRAFTERS / "bf16", draft_tokens=3)
    llm.generate(PROMPTS, GREEDY)
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    assert proposer._sequences == {} and proposer._cache._sequences == {}
    assert llm._cache._sequences == {}


# Every scheme, over 200 prompts

CORPUS = 200
RUNNABLE = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))


@pytest.mark.parametrize("target", RUNNABLE)
def test_200_prompts_for_every_scheme_of_a_target(target: str) -> None:
    """Drafts of four, each token right with a chance of two in three, so that every pass accepts some and rejects
    some.
    """
    llm = LLM(FIXTURES / target, allow_reference=True)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, llm.vocabulary, random.integers(1, 9)).tolist() for _ in range(CORPUS)]
    wish = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = tokens(llm.generate(prompts, wish))
    answers = {tuple(prompt): answer for prompt, answer in zip(prompts, expected, strict=True)}
    llm._driver = Driver(Oracle(answers, (False, True, False, False, True, False, False, False, True)), Fixed(4))
    assert tokens(llm.generate(prompts, wish)) == expected
    assert llm._driver.total.rounds > CORPUS and 0.2 < (llm._driver.total.acceptance or 0) < 0.9


def test_where_drafting_does_not_pay_the_drafter_rests_and_starts_anew(plain: LLM) -> None:
    """Its states aren't even watched; what it then knows of the text begins behind the gap."""
    wish = SamplingParams(max_tokens=400, ignore_eos=True)
    llm = LLM(TARGET, draft=DRAFTERS / "bf16")
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    seen: list[tuple[bool, int]] = []
    step = llm._step

    def watched() -> None:
        step()
        sequences = list(proposer._sequences.values())
        seen.append((bool(llm._driver.taps), sequences[0].begin if sequences else 0))  # type: ignore[union-attr]

    llm._step = watched  # type: ignore[method-assign]
    assert llm.generate([PROMPTS[2]], wish)[0].token_ids == plain.generate([PROMPTS[2]], wish)[0].token_ids
    assert 30 < sum(not taps for taps, _ in seen) < 400
    assert len({begin for _, begin in seen}) >= 2
