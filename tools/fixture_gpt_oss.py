"""A small gpt-oss as it is published: experts in blocks of fp4, decoded by transformers.

Only a GPU's kernels quantize to this layout, so codes and exponents are drawn; decoding is the library's own.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fixture_models import GPT_OSS, generator, load, logits_of, token_ids, write_base
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BLOCK = 32
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as published


@dataclass(frozen=True)
class GptOss:
    name: str
    note: str
    packed: bool


GPT_OSS_ROWS = (
    GptOss("gpt-oss-f32", "experts [E, K, N] with gate and up in turn, biases, sinks; every other layer slides", False),
    GptOss("gpt-oss-mxfp4", "experts in blocks of fp4 as they are published; drawn codes and exponents", True),
)


def drawn(name: str, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, N, K / 32, 16] of any codes, and their exponents, around those of weights of a few hundredths."""
    draw = generator("mxfp4", name)
    shape = (experts, rows, columns // BLOCK)
    blocks = draw.integers(0, 256, (*shape, BLOCK // 2), dtype=np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(draw.integers(119, 125, shape, dtype=np.uint8))


def write_gpt_oss(row: GptOss, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What each packed weight of an expert decodes to, gate's rows before up's; token ids and logits."""
    folder.mkdir(parents=True)
    base = GPT_OSS.but("bfloat16" if row.packed else "float32")
    ids = token_ids(base.config["vocab_size"], row.name)[0]
    if not row.packed:
        write_base(base, folder)
        return {}, {"input_ids": torch.from_numpy(ids), "logits": logits_of(load(folder), ids)}
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary)
        write_base(base, plain)
        tensors = load_file(plain / "model.safetensors")
        config = json.loads((plain / "config.json").read_text())
        decoded, stored = {}, {}
        for name, tensor in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                stored[name] = tensor
                continue
            experts, columns, rows = tensor.shape
            blocks, exponents = drawn(name, experts, rows, columns)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, exponents
            tensors[name] = convert_moe_packed_tensors(blocks, exponents).contiguous()
            parent, _, projection = name.rpartition(".")
            for expert in range(experts):
                weight = tensors[name][expert].T
                if projection == "gate_up_proj":
                    weight = torch.cat((weight[0::2], weight[1::2]))
                decoded[f"{parent}[{expert}].{projection}.weight"] = weight.contiguous()
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        logits = logits_of(load(plain, torch.float32), ids)
    config["quantization_config"] = {"modules_to_not_convert": KEPT, "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return decoded, {"input_ids": torch.from_numpy(ids), "logits": logits}
