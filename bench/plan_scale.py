"""How long a plan of a very large checkpoint takes, and how much memory.

    python bench/plan_scale.py [--tensors 1000000] [--shards 200] [--known] [--json]

makes a folder with headers, an index and no data: a mixture of experts with packed int4 weights, three tensors
a projection. Then a fresh process plans it, and another one prints it as JSON. Targets, for a million tensors
across 200 shards: planned in 6 s, printed as JSON in 10 s (planning included), in 2 GB. An idle Zen 4
takes 3.3 s, 4.4 s and 0.5 GB. `--known` makes it a Mixtral, whose every module the plan looks for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 1024, 256
CONFIG = {
    "architectures": ["SyntheticMoeForCausalLM"],
    "model_type": "synthetic_moe",
    "hidden_size": HIDDEN,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.19.0",
        "ignore": ["lm_head", r"re:.*\.mlp\.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True},
            }
        },
    },
}
PER_LAYER = 2 + 1 + 3 * 4 + 9 * EXPERTS  # tensors
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 16,
    "vocab_size": 129280,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 8,
}
MEASURE = """
import resource, sys, time
began = time.perf_counter()
from fewbits.load import inspect
from fewbits.report import write_json
plan = inspect(sys.argv[1])
if sys.argv[2] == "json":
    with open(sys.argv[3], "w") as stream:
        write_json(plan, stream)
seconds = time.perf_counter() - began
assert len(plan.rows) > 0 and not plan.errors, plan.errors[:3]
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def packed(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, list[int]]]:
    yield f"{name}.weight_packed", "I32", [rows, columns // 8]
    yield f"{name}.weight_scale", "BF16", [rows, columns // 128]
    yield f"{name}.weight_shape", "I64", [2]


def tensors(count: int) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of layer after layer, without end."""
    yield "model.embed_tokens.weight", "BF16", [129280, HIDDEN]
    yield "lm_head.weight", "BF16", [129280, HIDDEN]
    for layer in range(count):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", [HIDDEN]
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from packed(f"{prefix}.self_attn.{projection}", HIDDEN, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", "BF16", [HIDDEN]
        yield f"{prefix}.mlp.gate.weight", "BF16", [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            for projection in ("gate_proj", "up_proj"):
                yield from packed(f"{prefix}.mlp.experts.{expert}.{projection}", INTERMEDIATE, HIDDEN)
            yield from packed(f"{prefix}.mlp.experts.{expert}.down_proj", HIDDEN, INTERMEDIATE)


def make(folder: Path, count: int, shards: int, known: bool) -> None:
    sizes = {"I32": 4, "BF16": 2, "I64": 8}
    source = tensors(count)
    if known:
        source = chain([("model.norm.weight", "BF16", [HIDDEN])], source)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for _ in range(count * (shard + 1) // shards - count * shard // shards):
            name, dtype, shape = next(source)
            end = position + sizes[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            weight_map[name] = file
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    config = CONFIG | MIXTRAL | {"num_hidden_layers": (count - 3) // PER_LAYER} if known else CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(folder: Path, what: str) -> tuple[float, float]:
    """(seconds, gigabytes of resident memory at most) of a fresh process."""
    command = [sys.executable, "-c", MEASURE, str(folder), what, str(folder / "plan.json")]
    seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--known", action="store_true", help="of a family that fewbits runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        make(folder, arguments.tensors, arguments.shards, arguments.known)
        print(f"made the headers in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        result = {}
        for what in ("plan", "json"):
            seconds, memory = measure(folder, what)
            result[what] = {"seconds": round(seconds, 2), "gigabytes": round(memory, 2)}
    if arguments.json:
        print(json.dumps({"tensors": arguments.tensors, "shards": arguments.shards, **result}))
        return
    for what, figures in result.items():
        print(f"{what:<6}{figures['seconds']:>8.2f} s{figures['gigabytes']:>8.2f} GB")


if __name__ == "__main__":
    main()
