"""fewbits, step by step through its engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import worker

import fewbits


class Engine:
    def __init__(self, model: Path, threads: int) -> None:
        self._llm = fewbits.LLM(model, threads=threads)

    def about(self) -> dict[str, Any]:
        rows = {row.kind: row for row in self._llm.plan.rows if row.kind in ("linear", "head")}
        dots = {kind: row.kernel.arithmetic(row.spec, row.matrix).dot for kind, row in rows.items() if row.kernel}
        layers = rows["linear"].spec.act
        return {
            "version": fewbits.__version__,
            "activations": "bfloat16" if layers is None else str(layers),
            "layers": dots["linear"],
            "head": dots["head"],
            "bytes": self._llm.bytes_per_token(0),
            "cache": 2,
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        params = fewbits.SamplingParams(max_tokens=tokens, ignore_eos=True)
        requests = [self._llm._request(prompt, params) for prompt in prompts]
        for request in requests:
            self._llm._submit(request)
        while any(request.pending > 1 for request in requests):
            self._llm._step()
        while not all(request.done for request in requests):
            begin = time.perf_counter()
            self._llm._step()
            yield time.perf_counter() - begin

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self._llm.generate([prompt], fewbits.SamplingParams(max_tokens=1, ignore_eos=True))
        return time.perf_counter() - begin


if __name__ == "__main__":
    worker.main(Engine)
