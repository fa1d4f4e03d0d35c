"""Measures what each quantization scheme costs the example in perplexity, in fewbits and in transformers.

    python tools/perplexity.py quantize --source BF16 --variants DIR    llm-compressor makes a folder per variant
    python tools/perplexity.py peer --variants DIR                      transformers + compressed-tensors
    python tools/perplexity.py fewbits --variants DIR                   fewbits, also with --activations int8
    python tools/generate_docs.py                                       table and plot from the results

The first two need the packages of tools/requirements.txt, the third an installed fewbits and no torch. Results are
appended to examples/stdlib-lm/perplexity.csv as they come, one line a variant; a variant that is there is not
measured again. To measure another model or another amount of text, delete the file first.

Both programs get the same token ids and are scored by the same code (tools/heldout.py), on the first --tokens
tokens of the held-out text. The peer is transformers in float32: compressed-tensors decompresses the weights at
load, and its own forward quantizes the inputs of each layer.

`peer --control` measures the schemes with quantized activations once more (or the variants named), with keys and values
rounded to bfloat16 as in fewbits' cache: how far a small change moves a program from itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import heldout
from perplexity_report import (
    CONTROL,
    CSV,
    FEWBITS,
    FEWBITS_INT8,
    HEADS,
    INTEGER_WEIGHTS,
    PEER,
    QUANTIZED_ACTIVATIONS,
    SCHEMES,
    Result,
    append,
    read,
)
from tokenizers import Tokenizer

VARIANTS = {f"{scheme}-head-{head}": (scheme, head) for head in HEADS for scheme in SCHEMES}
ORIGINAL = "bf16-head-bf16"
TOKENS = 16384

Logits = Callable[[list[int]], Any]  # token ids → [tokens, vocabulary]


def quantize(source: Path, variants: Path, threads: int) -> None:
    """Make the folders that are missing. Round to nearest; calibration only where a scheme has static scales."""
    import quantize_example
    import torch

    torch.set_num_threads(threads)
    for name, (scheme, head) in VARIANTS.items():
        folder = variants / name
        if (folder / "generation_config.json").exists():  # written last
            continue
        if name == ORIGINAL:
            shutil.copytree(source, folder)
        else:
            modifiers = quantize_example.recipe(scheme, head, "rtn", None, None)
            quantize_example.quantize(source, folder, modifiers, quantize_example.SAMPLES)
        print(folder, flush=True)


def peer(folder: Path, threads: int, control: bool = False) -> tuple[Logits, str]:
    """transformers in float32; and which versions, how many inputs its forward quantizes."""
    import torch
    from compressed_tensors.quantization.lifecycle import forward
    from transformers import AutoModelForCausalLM, DynamicCache

    class RoundedCache(DynamicCache):
        def update(self, keys: Any, values: Any, *arguments: Any, **more: Any) -> Any:
            return super().update(keys.bfloat16().float(), values.bfloat16().float(), *arguments, **more)

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = f"transformers {version('transformers')}"
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)  # FP4 comes out in bfloat16; transformers' own float() refuses
        how += f" + compressed-tensors {version('compressed-tensors')}"

    @torch.no_grad()
    def logits(ids: list[int]) -> Any:
        cache = RoundedCache() if control else DynamicCache()
        return model(torch.tensor([ids]), past_key_values=cache).logits[0].numpy()

    quantized = 0
    own = forward.forward_quantize

    def counted(module: Any, value: Any, name: str, *arguments: Any) -> Any:
        nonlocal quantized
        quantized += name == "input"
        return own(module, value, name, *arguments)

    forward.forward_quantize = counted
    logits([1])
    forward.forward_quantize = own
    wanted = sum(
        getattr(module, "quantization_scheme", None) is not None and bool(module.quantization_scheme.input_activations)
        for module in model.modules()
    )
    if quantized != wanted:
        raise SystemExit(f"{folder}: the forward quantizes {quantized} inputs, the config {wanted}")
    return logits, f"{how}; {quantized} inputs quantized"


def fewbits(folder: Path, threads: int, activations: str = "stored") -> tuple[Logits, str]:
    """fewbits as it runs the folder; and how many products are native."""
    from fewbits import LLM

    llm = LLM(folder, allow_reference=True, threads=threads, activations=activations)
    products = [row for row in llm.plan.rows if row.kind in ("linear", "head")]
    native = sum(row.executed_as == "native" for row in products)
    return llm.logits, f"{native} of {len(products)} products native"


def windows(folder: Path, tokens: int) -> list[list[int]]:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_id, positions = config["eos_token_id"], config["max_position_embeddings"]
    every = heldout.windows(heldout.texts(), lambda text: tokenizer.encode(text).ids, end_id, positions)
    return heldout.first(every, tokens)


def score(logits: Logits, windows: list[list[int]], name: str) -> list[tuple[int, float]]:
    """Of each window the tokens predicted and the nats they cost; progress on stderr."""
    scores: list[tuple[int, float]] = []
    begin = time.monotonic()
    total = sum(map(heldout.predicted, windows))
    for window in windows:
        scores.append((heldout.predicted(window), heldout.nats(logits(window[:-1]), window)))
        tokens, nats = (sum(column) for column in zip(*scores, strict=True))
        rate = tokens / (time.monotonic() - begin)
        line = f"{name}: {tokens} of {total} tokens, perplexity {math.exp(nats / tokens):.4f}, {rate:.0f} tokens/s"
        print(line, end="\n" if tokens == total else "\r", file=sys.stderr, flush=True)
    return scores


def measure(program: str, open_model: Callable[[Path, int], tuple[Logits, str]], options: argparse.Namespace) -> None:
    """Append a result for each variant that has none of this program yet."""
    model = hashlib.sha256((options.variants / ORIGINAL / "model.safetensors").read_bytes()).hexdigest()[:12]
    for name in options.names:
        scheme, head = VARIANTS[name]
        folder = options.variants / name
        text = windows(folder, options.tokens)
        wanted = (model, sum(map(heldout.predicted, text)))
        results = read(options.csv)
        if other := {(row.model, row.tokens) for row in results} - {wanted}:
            raise SystemExit(f"{options.csv} has results of {other}, not of {wanted}: delete it first")
        if (scheme, head, program) in {(row.scheme, row.head, row.program) for row in results}:
            continue
        logits, how = open_model(folder, options.threads)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        scores = score(logits, text, f"{name}, {program}")
        row = Result.of(scores, scheme=scheme, head=head, program=program, bytes=size, model=model, how=how)
        append(options.csv, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage in ("quantize", "peer", "fewbits"):
        command = stages.add_parser(stage)
        command.add_argument("--variants", type=Path, required=True, help="folder of the variants")
        command.add_argument("--threads", type=int, default=1, help="(default: 1)")
        if stage == "quantize":
            command.add_argument("--source", type=Path, required=True, help="the bf16 folder")
            continue
        command.add_argument("names", nargs="*", metavar="VARIANT", help="such as w8a8-head-int4 (default: all)")
        command.add_argument("--tokens", type=int, default=TOKENS, help="in whole windows (default: %(default)s)")
        command.add_argument("--csv", type=Path, default=CSV, help="results (default: the example's)")
        if stage == "peer":
            command.add_argument("--control", action="store_true", help="keys and values in bfloat16")
    options = parser.parse_args()
    if options.stage == "quantize":
        quantize(options.source, options.variants, options.threads)
        return
    if unknown := set(options.names) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if options.stage == "peer" and options.control:
        options.names = options.names or [f"{scheme}-head-bf16" for scheme in QUANTIZED_ACTIVATIONS]
        measure(CONTROL, partial(peer, control=True), options)
        return
    options.names = options.names or list(VARIANTS)
    if options.stage == "peer":
        measure(PEER, peer, options)
        return
    measure(FEWBITS, fewbits, options)
    options.names = [name for name in options.names if VARIANTS[name][0] in INTEGER_WEIGHTS]
    measure(FEWBITS_INT8, partial(fewbits, activations="int8"), options)


if __name__ == "__main__":
    main()
