"""OpenVINO GenAI's continuous batching, step by step, on a model that optimum-intel exported."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import worker

SEQUENCES, TOKENS = 16, 4096


class Engine:
    def __init__(self, model: Path, threads: int) -> None:
        self._model = model
        self._numbers = itertools.count()
        plan = openvino_genai.SchedulerConfig()
        plan.max_num_seqs, plan.max_num_batched_tokens, plan.cache_size = SEQUENCES, TOKENS, 1
        plan.enable_prefix_caching = plan.dynamic_split_fuse = False
        wishes = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), plan, "CPU", wishes)

    def about(self) -> dict[str, Any]:
        config = json.loads((self._model / "config.json").read_text())
        # The export keeps the embedding in uint8 with a zero point and a float16 scale per row.
        embedding = config["vocab_size"] * (config["hidden_size"] + 3)
        cpu = openvino.Core()
        group = cpu.get_property("CPU", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        cache = cpu.get_property("CPU", "KV_CACHE_PRECISION")
        return {
            "version": openvino.__version__.partition("-")[0],
            "activations": f"int8, a scale per {group}" if group else "bfloat16",
            "layers": "int8" if group else "bf16",
            "head": "int8" if group else "bf16",
            "bytes": (self._model / "openvino_model.bin").stat().st_size - embedding,
            "cache": cache.size,
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        handles = [self._add(prompt, tokens) for prompt in prompts]
        self._pipeline.step()
        while self._pipeline.has_non_finished_requests():
            begin = time.perf_counter()
            self._pipeline.step()
            yield time.perf_counter() - begin
        del handles

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        handle = self._add(prompt, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        del handle
        return time.perf_counter() - begin

    def _add(self, prompt: list[int], tokens: int) -> Any:
        """A handle: a request whose handle is gone is dropped."""
        params = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(next(self._numbers), ids, params)


if __name__ == "__main__":
    worker.main(Engine)
