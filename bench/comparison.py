"""What bench/compare.py compares: programs and their schemes, cases, what a pass costs; and the CSV of the results."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fewbits.bench import Cost
from fewbits.kernels.arithmetic import Dot

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from make_synthetic import Shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CSV, MACHINE = RESULTS / "comparison.csv", RESULTS / "machine.csv"
FEWBITS = "fewbits"
CONTEXT, STEPS = 32, 12  # tokens in each sequence's cache before decoding, and steps that are timed


@dataclass(frozen=True, slots=True)
class Variant:
    """A program and what it runs. `worker` names the script in bench/peers and the environment; `model` lies in the
    folder of models. Variants of a group take turns; groups follow one another, so that memory holds the models."""

    group: str
    program: str
    scheme: str
    worker: str
    model: str


VARIANTS = (
    Variant("4 bits", FEWBITS, "W4A16 g128", "fewbits", "w4a16"),
    Variant("4 bits", FEWBITS, "W4A16 g128, head too", "fewbits", "w4a16-head"),
    Variant("4 bits", FEWBITS, "NVFP4", "fewbits", "nvfp4"),
    Variant("4 bits", "llama.cpp", "Q4_0", "llama_cpp", "llama-q4_0.gguf"),
    Variant("4 bits", "OpenVINO GenAI", "int4 g128, int8 head", "openvino", "openvino-int4"),
    Variant("4 bits", "vLLM", "W4A16 g128", "vllm", "w4a16"),
    Variant("8 bits", FEWBITS, "W8A8", "fewbits", "w8a8"),
    Variant("8 bits", FEWBITS, "FP8", "fewbits", "fp8"),
    Variant("8 bits", "llama.cpp", "Q8_0", "llama_cpp", "llama-q8_0.gguf"),
    Variant("8 bits", "vLLM", "W8A8", "vllm", "w8a8"),
    Variant("16 bits", FEWBITS, "bfloat16", "fewbits", "bf16"),
    Variant("16 bits", "llama.cpp", "BF16", "llama_cpp", "llama-bf16.gguf"),
    Variant("16 bits", "transformers", "bfloat16", "transformers", "bf16"),
    Variant("16 bits", "vLLM", "bfloat16", "vllm", "bf16"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens` that a pass computes: one of each of so many sequences after CONTEXT, or so many of one sequence."""

    kind: str
    tokens: int

    def __str__(self) -> str:
        return f"decode, batch {self.tokens}" if self.kind == "decode" else f"prefill {self.tokens}"

    @property
    def question(self) -> dict[str, Any]:
        if self.kind == "decode":
            return {"kind": "decode", "batch": self.tokens, "context": CONTEXT, "steps": STEPS}
        return {"kind": "prefill", "tokens": self.tokens}

    @property
    def sequences(self) -> int:
        return self.tokens if self.kind == "decode" else 1

    @property
    def seen(self) -> list[int]:
        """Entries of the cache that each new token of a sequence sees, itself too; of a step in the middle of those
        that are timed. The first token comes from the prompt, the second from a step that isn't timed."""
        if self.kind == "decode":
            return [CONTEXT + 2 + STEPS // 2]
        return list(range(1, self.tokens + 1))


CASES = (*(Case("decode", batch) for batch in (1, 2, 4, 8, 16)), Case("prefill", 512), Case("prefill", 2048))
FIRST_TOKEN = "first token"


def shape_of(folder: Path) -> Shape:
    """Of the model in a folder with a config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["intermediate_size"],
        config["vocab_size"],
        config["max_position_embeddings"],
    )


def cost(shape: Shape, about: Mapping[str, Any], case: Case, attention: Dot) -> Cost:
    """What any program must do that stores weights and cache as `about` (bench/peers/worker.py) says: the same count
    as `fewbits.bench.pass_cost`'s, from the shape instead of a plan."""
    macs: Counter[Dot] = Counter()
    macs[about["layers"]] += case.tokens * shape.layers * sum(N * K for _, N, K in shape.linears())
    macs[about["head"]] += case.sequences * shape.vocab * shape.hidden
    macs[attention] += case.sequences * sum(case.seen) * shape.layers * 2 * shape.heads * shape.head_dim
    entry = shape.layers * 2 * shape.kv_heads * shape.head_dim * about["cache"]
    return Cost(about["bytes"] + case.sequences * case.seen[-1] * entry, macs)


@dataclass(slots=True)
class Result:
    """One line of the CSV: a variant and a case, or a variant that wasn't measured, and why.

    `seconds` of a pass, or from the start of the process to the first token, repeat by repeat; `limits`: seconds below
    which it can't be at the rates measured just before, of the variant's own bytes and dots.
    """

    group: str
    program: str
    scheme: str
    version: str = ""
    activations: str = ""
    case: str = ""
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def per_second(self) -> tuple[float, float, float]:
        """Tokens: median, least and most."""
        return tuple(self.tokens / of(self.seconds) for of in (statistics.median, max, min))  # type: ignore[return-value]

    @property
    def limit_per_second(self) -> float:
        return self.tokens / statistics.median(self.limits)

    @property
    def share(self) -> float | None:
        """Of the limit: the median of limit ÷ time."""
        if not self.limits:
            return None
        return statistics.median(limit / time for limit, time in zip(self.limits, self.seconds, strict=True))


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of machine.csv: what a group was measured on. Rates in GB/s and GMAC/s, median, least, most."""

    group: str
    name: str
    value: str
    low: str = ""
    high: str = ""


def write(path: Path, rows: Sequence[Result] | Sequence[Fact]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in fields(rows[0])])
        writer.writerows([[_cell(getattr(row, column.name)) for column in fields(row)] for row in rows])


def _cell(value: Any) -> str:
    return " ".join(f"{number:.5g}" for number in value) if isinstance(value, list) else str(value)


def read(path: Path = CSV) -> list[Result]:
    rows = []
    for row in _lines(path):
        numbers = {name: [float(number) for number in row.pop(name).split()] for name in ("seconds", "limits")}
        rows.append(Result(tokens=int(row.pop("tokens")), **row, **numbers))  # type: ignore[arg-type]
    return rows


def read_machine(path: Path = MACHINE) -> list[Fact]:
    return [Fact(**row) for row in _lines(path)]


def _lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
