"""vLLM's engine on the CPU, step by step in this process."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import worker

SEQUENCES, CONTEXT = 16, 4096


class Engine:
    def __init__(self, model: Path, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        self._vllm = vllm
        self._model = model
        self._numbers = itertools.count()
        llm = vllm.LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=CONTEXT,
            enable_prefix_caching=False,
        )
        self._engine = llm.llm_engine

    def about(self) -> dict[str, Any]:
        name = self._model.name
        return {
            "version": self._vllm.__version__,
            "activations": "int8, a scale per token" if name == "w8a8" else "bfloat16",
            "layers": "int8" if name == "w8a8" else "bf16",
            "head": "bf16",
            "bytes": worker.stored_bytes(self._model),
            "cache": 2,
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        for prompt in prompts:
            self._add(prompt, tokens)
        given = [0] * len(prompts)
        while self._engine.has_unfinished_requests():
            begin = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - begin
            before, given = given, [len(output.outputs[0].token_ids) for output in outputs]
            if min(before, default=0) > 0:
                yield seconds

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - begin

    def _add(self, prompt: list[int], tokens: int) -> None:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(next(self._numbers)), {"prompt_token_ids": prompt}, params)


if __name__ == "__main__":
    worker.main(Engine)
