"""Drafting with a model's own MTP modules: what they guess, beside an implementation of the tests' own that computes
everything anew each time; and that the text is that of plain decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import write
from safetensors.numpy import load_file
from small_model import FIXTURES
from step3p5_checkpoint import SMALL, random_tensors
from step3p5_reference import Step

from fewbits.engine.kvcache import KVCache, Part
from fewbits.engine.llm import LLM
from fewbits.engine.request import Request, SamplingParams
from fewbits.errors import PlanError
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.load import inspect, load

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


def test_a_single_module_guesses_no_more_than_each_request_wants() -> None:
    """Near the end of its answer a request has no page for more."""
    llm = LLM(FIXTURES / "step3p5-bf16", draft="mtp", draft_tokens=6)
    wishes = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (4, 9, 15)]
    # Three pages each from the start, which end with the answer.
    prompts = [[5] * (16 * 3 - wish.max_tokens) for wish in wishes]
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    proposer._caches[0].max_pages = 9
    results = llm.generate(prompts, wishes)
    assert [result.generated_tokens for result in results] == [4, 9, 15]


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


# DeepSeek-V3's module reads and hands on states behind a norm, and its block has latent attention and experts.


def deepseek(folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    """The small V3 with a module behind its three layers, made of the last one's numbers in another order."""
    source = FIXTURES / "deepseek-v3-f32"
    tensors, random = load_file(source / "model.safetensors"), np.random.default_rng(0)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    for name, tensor in last.items():
        tensors[name.replace("layers.2.", "layers.3.")] = np.ascontiguousarray(tensor[::-1])
    module = "model.layers.3"
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{module}.{name}.weight"] = random.uniform(0.5, 1.5, 32).astype(np.float32)
    tensors[f"{module}.eh_proj.weight"] = (random.standard_normal((32, 64)) / 4).astype(np.float32)
    tensors[f"{module}.shared_head.head.weight"] = random.standard_normal((44, 32)).astype(np.float32)
    tensors[f"{module}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = json.loads((source / "config.json").read_text())
    return write(folder, tensors, config), tensors, config


class Alone:
    """The module's block as a model of one layer, whose embedding gives what the block is to read: the family itself is
    held to transformers elsewhere.
    """

    def __init__(self, folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        self.folder, self.tensors = folder, tensors
        self.config = config | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
        self.model = load(folder.parent / "model", ops=ReferenceOps(), kv_dtype="f32")

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        wide = x.astype(np.float64)
        weight = self.tensors[f"{name}.weight"].astype(np.float64)
        result: np.ndarray = (
            wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * weight
        )
        return result

    def drafts(self, ids: list[int], count: int) -> list[int]:
        module, tokens = "model.layers.3", list(ids)
        cache = KVCache(self.model.cache_layers, 8)
        batch = cache.batch([Part(0, ids[:-1])])
        state = self.norm(self.model.decoder.forward(batch, cache, taps=(3,)).taps[0], "model.norm")
        for step in range(count):
            embedded = self.tensors["model.embed_tokens.weight"][tokens[1 : 1 + len(state)]]
            both = np.concatenate((self.norm(embedded, f"{module}.enorm"), self.norm(state, f"{module}.hnorm")), axis=1)
            u = both @ self.tensors[f"{module}.eh_proj.weight"].astype(np.float64).T
            logits, x = self._block(u, step)
            tokens.append(int(logits[-1].argmax()))
            state = np.concatenate((state, self.norm(x[-1:], f"{module}.shared_head.norm")))
        return tokens[len(ids) :]

    def _block(self, u: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        table = np.zeros((44, 32), np.float32)
        table[: len(u)] = u
        tensors = {"model.embed_tokens.weight": table}
        for name, tensor in self.tensors.items():
            if name.startswith("model.layers.3."):
                tensors[name.replace("layers.3.", "layers.0.")] = tensor
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight"):
            del tensors[f"model.layers.0.{name}"]
        tensors["model.norm.weight"] = tensors.pop("model.layers.0.shared_head.norm.weight")
        tensors["lm_head.weight"] = tensors.pop("model.layers.0.shared_head.head.weight")
        loaded = load(write(self.folder, tensors, self.config), ops=ReferenceOps(), kv_dtype="f32")
        cache = KVCache(loaded.cache_layers, 8)
        output = loaded.decoder.forward(cache.batch([Part(0, list(range(len(u))), len(u))]), cache, taps=(1,))
        return output.logits, output.taps[0]


def test_deepseeks_module_guesses_what_its_block_says(tmp_path: Path) -> None:
    folder, tensors, config = deepseek(tmp_path / "model")
    alone = Alone(tmp_path / "alone", tensors, config)
    llm = LLM(folder, draft="mtp", draft_tokens=2, kv_dtype="f32")
    plain = LLM(folder, kv_dtype="f32")
    assert llm._driver is not None
    proposer: Any = llm._driver._proposer
    propose, seen = proposer.propose, []

    def recorded(wanted: Mapping[int, tuple[Request, int]]) -> None:
        propose(wanted)
        for request, _ in wanted.values():
            seen.append(([*request.prompt_ids, *request.output_ids], list(request.draft_ids)))

    proposer.propose = recorded
    prompt = [5, 9, 33, 1, 2]
    wish = SamplingParams(max_tokens=12, ignore_eos=True)
    assert llm.generate([prompt], wish)[0].token_ids == plain.generate([prompt], wish)[0].token_ids
    assert len(seen) >= 8
    for known, draft in seen:
        assert draft == alone.drafts(known, len(draft))
