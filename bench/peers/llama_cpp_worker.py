"""llama.cpp, through the low-level functions of llama-cpp-python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as C
import worker

SEQUENCES, CONTEXT, BATCH = 16, 4096, 2048
Token = tuple[int, int, int]  # sequence, position, id


class Engine:
    def __init__(self, model: Path, threads: int) -> None:
        self._path = model
        self._quiet = C.llama_log_callback(lambda *_: None)  # must live as long as it may be called
        C.llama_log_set(self._quiet, None)
        C.llama_backend_init()
        loaded = C.llama_model_load_from_file(str(model).encode(), C.llama_model_default_params())
        if not loaded:
            raise RuntimeError(f"llama.cpp can't load {model.name}")
        wishes = C.llama_context_default_params()
        wishes.n_ctx, wishes.n_seq_max, wishes.kv_unified = CONTEXT, SEQUENCES, True
        wishes.n_batch = BATCH
        wishes.n_threads = wishes.n_threads_batch = threads
        self._context = C.llama_init_from_model(loaded, wishes)
        self._memory = C.llama_get_memory(self._context)
        self._batch = C.llama_batch_init(BATCH, 0, 1)
        self._sampler = C.llama_sampler_init_greedy()

    def about(self) -> dict[str, Any]:
        import gguf

        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(self._path).tensors}
        kinds = {part: tensors[name].tensor_type.name for part, name in LAYERS_AND_HEAD.items()}
        return {
            "version": C.__version__,
            "activations": ACTIVATIONS[kinds["layers"]],
            **{part: "bf16" if kind == "BF16" else "int8" for part, kind in kinds.items()},
            "bytes": sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name != "token_embd.weight"),
            "cache": 2,
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        latest = []
        C.llama_memory_clear(self._memory, True)
        for sequence, prompt in enumerate(prompts):
            latest += self._compute(_tokens(sequence, prompt), {len(prompt) - 1})
        length = len(prompts[0])
        for position in range(length, length + tokens - 1):
            begin = time.perf_counter()
            part = [(sequence, position, token) for sequence, token in enumerate(latest)]
            latest = self._compute(part, set(range(len(part))))
            yield time.perf_counter() - begin

    def prefill(self, prompt: list[int]) -> float:
        C.llama_memory_clear(self._memory, True)
        begin = time.perf_counter()
        self._compute(_tokens(0, prompt), {len(prompt) - 1})
        return time.perf_counter() - begin

    def _compute(self, tokens: list[Token], wanted: set[int]) -> list[int]:
        """The most probable tokens after the wanted ones."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (sequence, position, token) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in wanted
        if C.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [int(C.llama_sampler_sample(self._sampler, self._context, index)) for index in sorted(wanted)]


LAYERS_AND_HEAD = {"layers": "blk.0.ffn_down.weight", "head": "output.weight"}
ACTIVATIONS = {"Q4_0": "int8, a scale per 32", "Q8_0": "int8, a scale per 32", "BF16": "bfloat16"}


def _tokens(sequence: int, prompt: list[int]) -> list[Token]:
    return [(sequence, position, token) for position, token in enumerate(prompt)]


if __name__ == "__main__":
    worker.main(Engine)
