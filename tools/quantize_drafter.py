"""Quantizes an Eagle3 drafter with llm-compressor.

    python tools/quantize_drafter.py --source BF16 --out DIR                 every scheme
    python tools/quantize_drafter.py --source BF16 --out DIR w8a8 --keep lm_head

BF16 is the folder that tools/train_drafter.py makes. Each variant is a complete folder DIR/<scheme>. transformers has
no drafters, so they are rebuilt from the names of their tensors; what quantizes and writes them is what quantizes and
writes any model. Needs llm-compressor (tools/requirements.txt); a CPU is enough.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from quantize_example import SCHEMES
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "stdlib-lm" / "bf16"


class _Vector(nn.Module):
    """What holds a norm's weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Eagle3Config(PretrainedConfig):  # type: ignore[misc]
    model_type = "llama"


class LlamaForCausalLMEagle3(PreTrainedModel):  # type: ignore[misc]
    """A drafter's modules under their stored names: what quantizing and saving need of a model."""

    config_class = Eagle3Config

    def __init__(self, config: Eagle3Config, weights: dict[str, Tensor]) -> None:
        super().__init__(config)
        for name, tensor in weights.items():
            path, _, last = name.rpartition(".")
            if not path:
                self.register_buffer(last, tensor)
                continue
            parent: nn.Module = self
            *folders, leaf = path.split(".")
            for part in folders:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, _module(leaf, tensor))

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, *_: Any) -> None:
        raise NotImplementedError("nothing is calibrated")


def _module(name: str, weight: Tensor) -> nn.Module:
    if weight.ndim == 1:
        return _Vector(weight)
    module: nn.Module
    if name == "embed_tokens":
        module = nn.Embedding(*weight.shape, dtype=weight.dtype)
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def load_drafter(folder: Path) -> LlamaForCausalLMEagle3:
    config = Eagle3Config(**json.loads((folder / "config.json").read_text()))
    config._name_or_path = str(folder)  # llm-compressor looks there
    return LlamaForCausalLMEagle3(config, load_file(folder / "model.safetensors")).eval()


def quantize(model: LlamaForCausalLMEagle3, scheme: str | dict[str, Any], keep: Sequence[str] = ()) -> None:
    """In place: all linear modules but those to `keep`."""
    if isinstance(scheme, str):
        group = preset_name_to_scheme(scheme, ["Linear"])
    else:
        group = QuantizationScheme(targets=["Linear"], **scheme)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)  # asked for, though nothing is calibrated
    modifier = QuantizationModifier(config_groups={"group_0": group}, ignore=list(keep))
    oneshot(model=model, tokenizer=tokenizer, recipe=[modifier])


def save(model: LlamaForCausalLMEagle3, source: Path, folder: Path) -> None:
    """The folder as llm-compressor writes it, but for config.json: the drafter's own, with the quantization block."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_compressed=True)
    written = json.loads((folder / "config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = written["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("generation_config.json", "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help="of those of tools/quantize_example.py")
    parser.add_argument("--source", type=Path, required=True, help="a drafter's bf16 folder")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder per variant")
    parser.add_argument("--keep", action="append", default=[], metavar="MODULE", help="leave this module as it is")
    arguments = parser.parse_args()
    if unknown := set(arguments.schemes) - {*SCHEMES}:
        parser.error(f"unknown scheme {', '.join(sorted(unknown))}; there are {', '.join(SCHEMES)}")
    torch.set_num_threads(1)
    for scheme in arguments.schemes or SCHEMES:
        model = load_drafter(arguments.source)
        quantize(model, SCHEMES[scheme], arguments.keep)
        save(model, arguments.source, arguments.out / scheme)
        print(arguments.out / scheme, flush=True)


if __name__ == "__main__":
    main()
