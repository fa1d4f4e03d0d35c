"""transformers: the model's own forward pass in bfloat16, greedy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import worker


class Engine:
    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def about(self) -> dict[str, Any]:
        embedding = self._model.get_input_embeddings().weight.numel()
        return {
            "version": transformers.__version__,
            "activations": "bfloat16",
            "layers": "bf16",
            "head": "bf16",
            "bytes": 2 * (sum(weight.numel() for weight in self._model.parameters()) - embedding),
            "cache": 2,
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        cache = transformers.DynamicCache()
        latest = self._compute(torch.tensor(prompts), cache)
        for _ in range(tokens - 1):
            begin = time.perf_counter()
            latest = self._compute(latest, cache)
            yield time.perf_counter() - begin

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self._compute(torch.tensor([prompt]), transformers.DynamicCache())
        return time.perf_counter() - begin

    def _compute(self, ids: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        """The most probable next tokens, [B, 1]."""
        logits = self._model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)


if __name__ == "__main__":
    worker.main(Engine)
