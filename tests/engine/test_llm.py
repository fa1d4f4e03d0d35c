from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_model import FIXTURES, MODEL, character_tokenizer

import fewbits
from fewbits.engine.llm import LLM
from fewbits.engine.request import Result, SamplingParams
from fewbits.errors import FewbitsError, UsageError

PROMPTS = [[5, 9, 33], [7], [60, 2, 2, 41, 8, 8, 19, 30], list(range(3, 90))]
SAMPLED = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.95, seed=4, ignore_eos=True)


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.fixture
def scheduler(llm: LLM) -> Iterator[Any]:
    made = llm._scheduler
    budget, running = made.budget, made.max_running
    yield made
    made.budget, made.max_running = budget, running


def test_greedy_is_the_best_token_of_the_logits_of_all_before(llm: LLM) -> None:
    [result] = llm.generate([PROMPTS[2]], SamplingParams(max_tokens=10, ignore_eos=True))
    logits = llm.logits(PROMPTS[2] + result.token_ids)
    best = logits.argmax(-1)[len(PROMPTS[2]) - 1 : -1]
    assert result.token_ids == best.tolist()
    assert (result.prompt_tokens, result.generated_tokens, result.finish_reason) == (8, 10, "length")
    assert result.prefill_tokens_per_s is not None and result.prefill_tokens_per_s > 0
    assert result.decode_tokens_per_s is not None and result.decode_tokens_per_s > 0


@pytest.mark.parametrize("folder", [MODEL, "llama-sharded-bf16", "qwen3-f32"])
def test_logits_of_all_tokens_in_one_prefill_are_those_of_transformers(folder: str) -> None:
    expected = load_file(FIXTURES / folder / "expected.safetensors")
    model = LLM(FIXTURES / folder)
    ours, theirs = model.logits(expected["input_ids"]), expected["logits"].astype(np.float64)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize("wish", [SAMPLED, SamplingParams(max_tokens=12, repetition_penalty=1.3, ignore_eos=True)])
def test_a_result_does_not_depend_on_its_company(llm: LLM, scheduler: Any, wish: SamplingParams) -> None:
    alone = [llm.generate([prompt], wish)[0].token_ids for prompt in PROMPTS]
    assert tokens(llm.generate(PROMPTS, wish)) == alone
    assert tokens(llm.generate(PROMPTS[::-1], wish)) == alone[::-1]
    scheduler.budget = 5  # prompts in chunks, some of them cut by others
    assert tokens(llm.generate(PROMPTS, wish)) == alone
    scheduler.max_running = 2
    assert tokens(llm.generate(PROMPTS, wish)) == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    wishes = [SAMPLED, SamplingParams(max_tokens=3, ignore_eos=True)]
    both = llm.generate(PROMPTS[:2], wishes)
    assert tokens(both) == [llm.generate([p], w)[0].token_ids for p, w in zip(PROMPTS, wishes, strict=False)]
    with pytest.raises(UsageError):
        llm.generate(PROMPTS, wishes)


def test_seeds(llm: LLM) -> None:
    def of(seed: int | None) -> list[int]:
        wish = SamplingParams(max_tokens=30, temperature=3.0, seed=seed, ignore_eos=True)
        return llm.generate([PROMPTS[0]], wish)[0].token_ids

    assert of(1) == of(1) != of(2)
    assert of(None) != of(None)


@pytest.fixture
def speaking(text_model: Callable[..., Path]) -> LLM:
    return LLM(text_model())


def test_text_streams_as_it_is_generated(speaking: LLM) -> None:
    wish = SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True)
    [whole] = speaking.generate("hello", wish)
    stream = speaking.stream("hello", wish)
    pieces = list(stream)
    assert len(pieces) > 30
    assert "".join(pieces) == whole.text == speaking.tokenizer.decode(whole.token_ids)
    assert stream.result.token_ids == whole.token_ids


def test_stop_strings_end_the_text_and_keep_the_tokens(speaking: LLM) -> None:
    wish = SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True)
    [whole] = speaking.generate("hello", wish)
    stop = whole.text[20:23]
    at = whole.text.index(stop)
    [cut] = speaking.generate("hello", SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True, stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
    assert cut.token_ids == whole.token_ids[: cut.generated_tokens]
    assert speaking.tokenizer.decode(cut.token_ids).endswith(stop)


def test_the_end_token_is_not_part_of_the_answer(llm: LLM) -> None:
    [free] = llm.generate([PROMPTS[0]], SAMPLED)
    end = free.token_ids[4]
    at = free.token_ids.index(end)
    wish = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.95, seed=4, ignore_eos=True, stop_token_ids=(end,))
    [ended] = llm.generate([PROMPTS[0]], wish)
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[:at], "stop")


def test_pages_come_back(llm: LLM) -> None:
    free = llm._cache.free_pages
    llm.generate(PROMPTS, SAMPLED)
    stream = llm.stream(PROMPTS[0], SAMPLED)
    llm._step()
    assert llm._cache.free_pages < free
    stream.close()
    assert llm._cache.free_pages == free
    stream = llm.stream(PROMPTS[0], SAMPLED)
    llm._step()
    del stream  # a stream that is dropped closes itself
    assert llm._cache.free_pages == free and not llm._scheduler.running


def test_an_interrupted_step_leaves_other_requests_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([PROMPTS[0]], SAMPLED)[0].token_ids
    stream = llm.stream(PROMPTS[0], SAMPLED)
    llm._step()
    forward = llm._loaded.decoder.forward

    def interrupted(*arguments: Any) -> Any:
        forward(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._loaded.decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPTS[2]], SAMPLED)
    list(stream)
    assert stream.result.token_ids == expected


def test_logits_that_are_no_numbers_end_only_their_own_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([PROMPTS[0]], SAMPLED)[0].token_ids
    forward = llm._loaded.decoder.forward

    def damaged(batch: Any, cache: Any, taps: Any = ()) -> Any:
        out = forward(batch, cache, taps)
        out.logits[-1] = np.nan
        return out

    first = llm.stream(PROMPTS[0], SAMPLED)
    second = llm.stream(PROMPTS[2], SAMPLED)
    with monkeypatch.context() as patch:
        patch.setattr(llm._loaded.decoder, "forward", damaged)
        llm._step()
    with pytest.raises(FewbitsError) as caught:
        list(second)
    assert caught.value.code == "logits-not-finite"
    list(first)
    assert first.result.token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "prompt-empty"),
        ([5, 96], "token-out-of-range"),
        ([-1], "token-out-of-range"),
        ([5] * 513, "prompt-too-long"),
        ([5] * 512, "prompt-too-long"),  # no room for a token of the answer
        ("text", "tokenizer-missing"),
    ],
)
def test_prompts_that_can_not_be_continued(llm: LLM, prompt: Any, code: str) -> None:
    assert llm.vocabulary == 96 and llm.context == 512
    with pytest.raises(FewbitsError) as caught:
        llm.generate([prompt])
    assert caught.value.code == code
    assert not llm._scheduler.waiting and not llm._scheduler.running


def test_the_context_ends_the_answer(llm: LLM) -> None:
    [result] = llm.generate([[5] * 505], SamplingParams(max_tokens=100, ignore_eos=True))
    assert (result.generated_tokens, result.finish_reason) == (7, "length")


def test_no_tokens_at_all(llm: LLM) -> None:
    [result] = llm.generate([[5] * 512], SamplingParams(max_tokens=0))
    assert (result.token_ids, result.text, result.finish_reason) == ([], "", "length")
    assert result.decode_tokens_per_s is None


def test_more_than_the_cache_can_hold(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._cache, "max_pages", 4)
    with pytest.raises(UsageError) as caught:
        llm.generate([[5] * 60], SamplingParams(max_tokens=5))
    assert caught.value.code == "cache-too-small"


def test_a_tokenizer_of_another_model(text_model: Callable[..., Path]) -> None:
    folder = text_model()
    character_tokenizer(102).save(str(folder / "tokenizer.json"))
    with pytest.raises(FewbitsError) as caught:
        LLM(folder).encode("a\x0b")
    assert caught.value.code == "vocabulary-mismatch"


def test_what_is_public() -> None:
    assert fewbits.LLM is LLM
    assert fewbits.SamplingParams is SamplingParams
    assert set(dir(fewbits)) >= {"LLM", "SamplingParams", "inspect", "load_linear", "__version__"}
    assert fewbits.inspect(FIXTURES / MODEL).family == "llama"
    x = np.ones((2, 64), np.float32)
    assert fewbits.load_linear(FIXTURES / MODEL, "model.layers.0.mlp.up_proj")(x).shape == (2, 128)
    assert not hasattr(fewbits, "nothing")


# Steps between neighbouring numbers as a share of a row's largest (int8) or of each (floats); every key and value is
# rounded once, by half of it.
@pytest.mark.parametrize("dtype, step", [("f32", 2.0**-23), ("f16", 2.0**-10), ("bf16", 2.0**-7), ("int8", 1 / 127)])
def test_the_cache_may_be_kept_otherwise(dtype: Any, step: float) -> None:
    model = LLM(FIXTURES / MODEL, kv_dtype=dtype)
    assert {layer.dtype for layer in model._cache.specs} == {dtype}
    ids = PROMPTS[3]
    expected, ours = LLM(FIXTURES / MODEL, kv_dtype="f32").logits(ids), model.logits(ids)
    # Two layers, in each of which keys, values, queries and exponentials are rounded.
    assert np.linalg.norm(ours - expected) <= 8 * step * np.linalg.norm(expected)
    assert dtype == "f32" or not np.array_equal(ours, expected)
    wish = SamplingParams(max_tokens=20, ignore_eos=True)
    alone = [model.generate([prompt], wish)[0].token_ids for prompt in PROMPTS]
    assert tokens(model.generate(PROMPTS, wish)) == alone


def test_a_cache_dtype_that_takes_the_checkpoints_scales() -> None:
    with pytest.raises(UsageError, match="int8"):
        LLM(FIXTURES / MODEL, kv_dtype="fp8")


def test_threads() -> None:
    from fewbits import _native

    before = _native.thread_count()
    try:
        assert LLM(FIXTURES / MODEL, threads=1).threads == _native.thread_count() == 1
        with pytest.raises(UsageError):
            LLM(FIXTURES / MODEL, threads=0)
    finally:
        _native.set_thread_count(before)
