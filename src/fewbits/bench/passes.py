"""Decode steps and prefills of a loaded model, timed: whole engine steps, from token ids to sampled tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewbits.bench.cost import Span
from fewbits.engine.kvcache import PAGE_SIZE, KVCache
from fewbits.engine.llm import LLM
from fewbits.engine.request import Request, SamplingParams
from fewbits.engine.runner import Model, step

CONTEXT = 64  # tokens in the cache of each sequence before decoding is timed
_SECONDS = 0.3  # that decode steps are timed for at a stretch
_STEPS = (4, 64)  # at least and at most


@dataclass(frozen=True, slots=True)
class Case:
    """Decoding: one token of each of `sequences` a step, after CONTEXT. Prefill: `tokens` of one sequence. Verifying:
    so many of one sequence after CONTEXT, all but the first a draft.
    """

    kind: Literal["decode", "prefill", "verify"]
    sequences: int
    tokens: int

    @property
    def spans(self) -> list[Span]:
        """What a pass does; of decoding, one in the middle of its steps."""
        if self.kind == "prefill":
            return [Span(self.tokens, self.tokens)]
        if self.kind == "verify":
            return [Span(self.tokens, CONTEXT + self.tokens, self.tokens)]
        return [Span(1, CONTEXT + 2)] * self.sequences

    def __str__(self) -> str:
        return f"decode, batch {self.sequences}" if self.kind == "decode" else f"{self.kind} {self.tokens}"


def decode(batch: int) -> Case:
    return Case("decode", batch, batch)


def prefill(tokens: int) -> Case:
    return Case("prefill", 1, tokens)


def verify(tokens: int) -> Case:
    return Case("verify", 1, tokens)


class Passes:
    """The sequences of one case in a cache of their own, to be timed again and again."""

    def __init__(self, llm: LLM, case: Case, model: Model | None = None) -> None:
        """`model` replaces the loaded one. Raises ValueError where the checkpoint's context is too short."""
        self.case = case
        self.model = model or llm._loaded.decoder
        length = case.tokens if case.kind == "prefill" else CONTEXT + _STEPS[1] + 2
        if llm.context is not None and length > llm.context:
            raise ValueError(f"the model's context is {llm.context} tokens")
        self.cache = KVCache(llm._loaded.cache_layers, max_pages=case.sequences * -(-length // PAGE_SIZE))
        self.steps: list[float] = []  # seconds of every step so far
        random = np.random.default_rng(0)
        self._prompts = random.integers(0, llm.vocabulary, (case.sequences, length)).tolist()
        self._prefill(min(case.tokens, PAGE_SIZE) if case.kind == "prefill" else CONTEXT)

    def seconds(self) -> float:
        """Of one pass; of decoding and verifying, one in the middle of as many steps as take 0.3 s."""
        if self.case.kind == "prefill":
            return self._prefill(self.case.tokens)
        if self.case.kind == "verify":
            return self._verify()
        requests = [self._request(index, CONTEXT + 1, CONTEXT) for index in range(self.case.sequences)]
        times: list[float] = []
        while len(times) < _STEPS[0] or (sum(times) < _SECONDS and len(times) < _STEPS[1]):
            times.append(self.step(requests, 1))
        for request in requests:
            self.cache.truncate(request.sequence, CONTEXT)
        return statistics.median(times)

    def _verify(self) -> float:
        """Drafts are drawn, so that next to none is accepted, and every step is over the same entries."""
        times: list[float] = []
        while len(times) < _STEPS[0] or (sum(times) < _SECONDS and len(times) < _STEPS[1]):
            request = self._request(0, CONTEXT + 1, CONTEXT)
            request.draft_ids = self._prompts[0][CONTEXT + 1 : CONTEXT + self.case.tokens]
            times.append(self.step([request], self.case.tokens))
            self.cache.truncate(request.sequence, CONTEXT)
        return statistics.median(times)

    def step(self, requests: Sequence[Request], tokens: int) -> float:
        """Computes `tokens` of each request and samples its next token. Seconds."""
        begin = time.perf_counter()
        step(self.model, self.cache, [(request, tokens) for request in requests])
        taken = time.perf_counter() - begin
        self.steps.append(taken)
        for request in requests:
            if request.error is not None:
                raise request.error
        return taken

    def _prefill(self, tokens: int) -> float:
        requests = [self._request(index, tokens, 0) for index in range(self.case.sequences)]
        for request in requests:
            self.cache.free(request.sequence)
        return self.step(requests, tokens)

    def _request(self, index: int, tokens: int, computed: int) -> Request:
        params = SamplingParams(max_tokens=_STEPS[1] + 2, ignore_eos=True)
        request = Request(index, self._prompts[index][:tokens], params, frozenset(), params.max_tokens, None, 0.0)
        request.computed = computed
        return request
