"""What every worker has in common. Standard library only: each runs in an environment of its own.

    python bench/peers/<program>_worker.py MODEL --threads N

A worker loads the model, continues a prompt of FIRST_PROMPT tokens by one and prints {"ready": true}; or {"error": …},
and ends. Then each line on its stdin is a question and gets a line:

    {"kind": "about"}                                        {"about": {…}}, see `Engine.about`
    {"kind": "decode", "batch": B, "context": C, "steps": S} {"seconds": …} of one step, the median of S
    {"kind": "prefill", "tokens": T}                         {"seconds": …} from the ids to the first token

or {"error": …}, after which the next question may work. It ends with its stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

FIRST_PROMPT = 8


class Engine(Protocol):
    """A loaded model."""

    def about(self) -> dict[str, Any]:
        """What figures and limits depend on.

        "version"; "activations": what they are when they are multiplied; "layers", "head": the dot that multiplies
        them, "f32", "bf16" or "int8"; "bytes" of the weights that a decode step reads; "cache": bytes of a number in
        the KV cache.
        """

    def decode(self, prompts: list[list[int]], tokens: int) -> Iterator[float]:
        """Continues the prompts by `tokens` each; yields the seconds of each step that gives every prompt one, which
        are all but the first tokens."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt's ids to its first token."""


class Load(Protocol):
    def __call__(self, model: Path, threads: int) -> Engine: ...


def main(load: Load) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        engine = load(arguments.model, arguments.threads)
        engine.prefill(prompts(1, FIRST_PROMPT)[0])
    except Exception as error:  # whatever a program raises is told, not judged
        print(json.dumps({"error": _words(error)}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:
            answer = {"error": _words(error)}
        print(json.dumps(answer), file=answers)


def prompts(count: int, length: int) -> list[list[int]]:
    """The same random ids for every program, none of them special."""
    draw = random.Random(length)
    return [[draw.randrange(256, 1000) for _ in range(length)] for _ in range(count)]


def stored_bytes(folder: Path) -> int:
    """Of a safetensors checkpoint's tensors, without the embedding."""
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and "embed_tokens" not in name:
                begin, end = tensor["data_offsets"]
                size += end - begin
    return size


def _answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    if question["kind"] == "about":
        return {"about": engine.about()}
    if question["kind"] == "prefill":
        return {"seconds": engine.prefill(prompts(1, question["tokens"])[0])}
    # One token comes from the prompt, and the first step after it finds the caches of the processor elsewhere.
    tokens = 1 + 1 + question["steps"]
    steps = list(islice(engine.decode(prompts(question["batch"], question["context"]), tokens), 1, None))
    return {"seconds": statistics.median(steps)}


def _words(error: Exception) -> str:
    """The first line: what comes after it is detail."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
