"""Makes quantized variants of the example with llm-compressor.

    python tools/quantize_example.py --source BF16 --out DIR                        every scheme, and lm_head with it
    python tools/quantize_example.py --source BF16 --out DIR w4a16 fp8 --head bf16  two schemes, lm_head as it was
    python tools/quantize_example.py --source BF16 --out DIR bf16 --head int8       nothing but lm_head
    python tools/quantize_example.py --source BF16 --out DIR w4a16-asym --method gptq --name w4a16-asym

BF16 is the folder bf16/ that tools/train_example.py makes. Each variant is a complete folder
DIR/<scheme>[-head-<head>][-<method>][-kv-<cache>]. Nothing here touches how numbers are stored: the files are what
llm-compressor's users get. Needs llm-compressor (tools/requirements.txt); a CPU is enough.

Calibration, where a scheme or method needs it, uses the training files of tools/train_example.py, never the
held-out ones.
"""

from __future__ import annotations

import argparse
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from train_example import is_heldout, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

WINDOW = 512
SAMPLES = 64  # calibration windows


def integer(
    bits: int, symmetric: bool, group_size: int | None, activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A scheme of integer weights that has no preset; without a group size, one scale per output channel."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return {"weights": weights, "input_activations": activations}


INT8_TENSOR_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}

# Name → a preset of compressed-tensors, or a scheme's arguments.
SCHEMES: dict[str, str | dict[str, Any]] = {
    "w4a16": "W4A16",
    "w4a16-asym": "W4A16_ASYM",
    "w4a16-channel": integer(4, True, None),
    "w4a16-asym-channel": integer(4, False, None),
    "w4a16-g32": integer(4, True, 32),
    "w2a16": "W2A16",
    "w3a16": "W3A16",
    "w8a16": "W8A16",
    "w8a16-channel": integer(8, True, None),
    "w8a16-asym": integer(8, False, 128),
    "w8a8": "W8A8",
    "w8a8-static": integer(8, True, None, {**INT8_TENSOR_STATIC, "observer": "static_minmax"}),
    "w4a8": "W4A8",
    "w4afp8": "W4AFP8",
    "fp8": "FP8_DYNAMIC",
    "fp8-static": "FP8",
    "fp8-block": "FP8_BLOCK",
    "nvfp4a16": "NVFP4A16",
    "nvfp4": "NVFP4",
    "mxfp4a16": "MXFP4A16",
    "mxfp4": "MXFP4",
    "mxfp8a16": "MXFP8A16",
    "mxfp8": "MXFP8",
}
BF16 = "bf16"  # the scheme that leaves everything but the head as it was
HEADS: dict[str, dict[str, Any]] = {"int8": integer(8, True, None), "int4": integer(4, True, 128)}
KV_CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    "int8": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False},
}


def config_group(scheme: str | dict[str, Any], target: str) -> QuantizationScheme:
    if isinstance(scheme, str):
        return preset_name_to_scheme(scheme, [target])
    return QuantizationScheme(targets=[target], **scheme)


def recipe(scheme: str, head: str, method: str, observer: str | None, kv_cache: str | None) -> list[Modifier]:
    """The modifiers that make a variant; the arguments are those of the command line."""
    groups = {}
    if scheme != BF16:
        groups["group_0"] = config_group(SCHEMES[scheme], r"re:.*_proj$" if head in HEADS else "Linear")
    if head in HEADS:
        groups["group_1"] = config_group(HEADS[head], "lm_head")
    arguments: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"] if head == "bf16" else []}
    if observer:
        arguments["weight_observer"] = observer
    if kv_cache:
        arguments["kv_cache_scheme"] = KV_CACHES[kv_cache]
    if method == "gptq":
        return [GPTQModifier(**arguments)]
    if not torch.accelerator.is_available():
        # AWQ in llm-compressor 0.14 pins memory for an accelerator without asking whether there is one.
        IntermediatesCache.pin_memory = lambda *_: None  # type: ignore[method-assign]
    quantization = QuantizationModifier(**arguments)
    return [AWQModifier(duo_scaling="both"), quantization] if method == "awq" else [quantization]


@cache
def training_texts() -> list[str]:
    """The training files that are long enough for a window."""
    sources = standard_library()
    return [text for name, text in sources.items() if not is_heldout(name, text) and len(text) > 4 * WINDOW]


def calibration(tokenizer: PreTrainedTokenizerBase, samples: int) -> DataLoader[dict[str, torch.Tensor]]:
    """Windows of training text, each from a file of its own, beginning with the begin-of-text token."""
    chooser = random.Random(0)
    windows = []
    for text in chooser.choices(training_texts(), k=samples):
        ids = tokenizer(text)["input_ids"]
        start = chooser.randrange(1, max(2, len(ids) - WINDOW))
        window = torch.tensor([ids[0], *ids[start : start + WINDOW - 1]])
        windows.append({"input_ids": window, "attention_mask": torch.ones_like(window)})
    return DataLoader(windows, batch_size=1)  # type: ignore[arg-type]


def quantize(source: Path, folder: Path, modifiers: list[Modifier], samples: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    dataset = calibration(tokenizer, samples)
    model = oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, dataset=dataset)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "schemes", nargs="*", metavar="SCHEME", help=f"of {BF16}, {', '.join(SCHEMES)} (default: all but {BF16})"
    )
    parser.add_argument("--source", type=Path, required=True, help="the bf16 folder that train_example.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder per variant")
    parser.add_argument("--name", help="name of the variant's folder (only with one scheme)")
    parser.add_argument("--head", choices=["same", "bf16", *HEADS], default="same", help="lm_head (default: same)")
    parser.add_argument(
        "--method", choices=["rtn", "gptq", "awq"], default="rtn", help="(default: rtn, round to nearest)"
    )
    parser.add_argument("--observer", help="llm-compressor's weight observer, such as memoryless_mse")
    parser.add_argument("--kv-cache", choices=list(KV_CACHES), help="also quantize the KV cache")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help=f"calibration windows of {WINDOW} tokens (default: {SAMPLES})"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.schemes) - {*SCHEMES, BF16}:
        parser.error(f"unknown scheme {', '.join(sorted(unknown))}; there are {BF16}, {', '.join(SCHEMES)}")
    if BF16 in arguments.schemes and arguments.head not in HEADS:
        parser.error(f"{BF16} needs --head {' or '.join(HEADS)}")
    if arguments.name and len(arguments.schemes) != 1:
        parser.error("--name needs exactly one scheme")
    for scheme in arguments.schemes or SCHEMES:
        parts = [scheme]
        parts += [f"head-{arguments.head}"] if arguments.head != "same" else []
        parts += [arguments.method] if arguments.method != "rtn" else []
        parts += [f"kv-{arguments.kv_cache}"] if arguments.kv_cache else []
        folder = arguments.out / (arguments.name or "-".join(parts))
        modifiers = recipe(scheme, arguments.head, arguments.method, arguments.observer, arguments.kv_cache)
        quantize(arguments.source, folder, modifiers, arguments.samples)
        print(folder, flush=True)


if __name__ == "__main__":
    main()
