"""Writes tests/exports/quark: small checkpoints exported by AMD Quark, each with what it must decode to.

    python tools/make_quark_fixtures.py                  all of them, and their README.md
    python tools/make_quark_fixtures.py --only NAME …    some of them

Needs tools/quark-requirements.txt, in an environment of its own. Each folder is the exported one and beside it
expected.json: the tools' versions, what was done, and per quantized module the dtype, shape and SHA-256 of Quark's own
decompression, which is float32. That is the quantizer that Quark reads a weight back with, on what it has written; for
its file-to-file exporter, which it can't read back in all layouts, the same quantizer's codes before they are packed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "QUARK_DISABLE_COMPILE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fixture_digest import digests
from fixture_models import load, random_weight, token_ids, write_base
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from quark.torch.export.nn.modules.realquantizer import get_real_quantizer
from quark.torch.quantization.config.config import QConfig, QTensorConfig
from quark.torch.quantization.config.type import ScaleType, ZeroPointType
from quark.torch.quantization.nn.modules.quantize_linear import QuantLinear
from quark.torch.quantization.tensor_quantize import FakeQuantizeBase
from quark_schemes import EXPORTS, Export
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("amd-quark", "transformers", "safetensors", "torch")
# The model in memory holds bfloat16; its decompression from the file float32.
BFLOAT16 = 2.0**-7

PROMPT = [3, 7, 11, 30, 5]

Tensors = dict[str, torch.Tensor]


def config_of(row: Export) -> QConfig:
    options: dict[str, Any] = {"exclude": list(row.exclude), "layer_quant_config": dict(row.layers)}
    if row.types:
        options["layer_type_quant_config"] = {getattr(torch.nn, name): scheme for name, scheme in row.types.items()}
    if row.kv_cache is not None:
        cache = dict.fromkeys(("*k_proj", "*v_proj"), row.kv_cache)
        options |= {"kv_cache_quant_config": cache, "kv_cache_group": list(cache), "min_kv_scale": row.min_kv_scale}
        if row.kv_cache.weight is not None:  # as Quark's templates do
            options["layer_quant_config"] |= cache
    if row.algorithm is not None:
        options["algo_config"] = [row.algorithm]
    return QConfig(global_quant_config=row.scheme, **options)


def logits_of(model: torch.nn.Module) -> list[list[float]] | None:
    """Of PROMPT, in bfloat16 with weights and inputs quantized and back; None where Quark does that on GPUs alone."""
    try:
        logits = model(torch.tensor([PROMPT])).logits[0].float()
    except RuntimeError as error:
        if "only implemented in CUDA" not in str(error):
            raise
        return None
    return [[round(value, 5) for value in one] for one in logits.tolist()]


@torch.no_grad()
def export(row: Export, base: Path, folder: Path) -> tuple[Tensors, list[list[float]] | None]:
    """Runs Quark in memory: the decompressed weight of every module that it quantized, and its model's logits."""
    # As Quark itself loads a gpt-oss.
    model = load(base, **({"quantization_config": Mxfp4Config(dequantize=True)} if row.fixture else {}))
    if row.base.model_type in ("qwen3_moe", "gpt_oss"):
        from quark.torch.utils.llm.model_preparation import preprocess_for_quantization

        preprocess_for_quantization(model)
    ids = torch.from_numpy(token_ids(row.base.config["vocab_size"], "calibration", sequences=8))
    quantizer = ModelQuantizer(config_of(row))
    model = quantizer.freeze(quantizer.quantize_model(model, DataLoader(ids, batch_size=1)))
    logits = logits_of(model)
    held = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    in_memory = {name: module.get_quant_weight(module.weight) for name, module in held.items()}
    export_safetensors(
        model,
        folder,
        custom_mode=row.custom_mode,
        weight_format=row.weight_format,
        pack_method=row.pack_method,
    )
    decoded = {}
    for name, module in model.named_modules():
        if isinstance(module, QParamsLinear) and module.weight_quantizer is not None:
            decoded[name] = module._get_qweight(module.weight).float().contiguous()
            close = torch.isclose(decoded[name], in_memory[name].float(), rtol=BFLOAT16, atol=0)
            # Zero points that are floats in memory are written as whole numbers.
            spec = getattr(module.weight_quantizer, "qspec", None)
            whole = getattr(spec, "zero_point_type", None) != ZeroPointType.float32
            if whole and not bool(close.all()):
                raise AssertionError(f"{row.name}, {name}: what is written isn't what was held")
    return decoded, logits


def decompressed(weight: torch.Tensor, stages: Any) -> torch.Tensor:
    """What the codes stand for that Quark's file-to-file exporter gives a weight."""
    two = isinstance(stages, list)
    stages = [_with_float32_scales(stage) for stage in (stages if two else [stages])]
    quantizer = FakeQuantizeBase.get_fake_quantize(stages if two else stages[0])
    quantizer.enable_observer()
    quantizer.disable_fake_quant()
    quantizer(weight)
    real = get_real_quantizer(
        qspec=stages if two else stages[0],
        quantizer=quantizer,
        reorder=True,
        real_quantized=True,
        float_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    codes = real.to_real_quantize_params(weight)
    real.maybe_convert_and_transpose_scale()
    real.pack_zero_point()
    return real(codes).float().contiguous()


def _with_float32_scales(stage: QTensorConfig) -> QTensorConfig:
    stage = QTensorConfig.from_dict(stage.to_dict())
    if stage.scale_format != "e8m0" and stage.scale_type == ScaleType.float:
        stage.scale_type = ScaleType.float32
    return stage


@torch.no_grad()
def export_files(row: Export, base: Path, folder: Path) -> Tensors:
    """Runs Quark from file to file; the decompressed weight of every module that it quantized."""
    import fnmatch

    config = config_of(row)
    ModelQuantizer(config).direct_quantize_checkpoint(str(base), str(folder), device="cpu")
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    decoded = {}
    for name, tensor in before.items():
        if name.endswith("_blocks"):
            decoded |= published_experts(name.removesuffix("_blocks"), after)
        module = name.removesuffix(".weight")
        if after[name].dtype == tensor.dtype:
            continue
        scheme = next((row.layers[key] for key in row.layers if fnmatch.fnmatch(module, key)), row.scheme)
        decoded[module] = decompressed(tensor, scheme.weight)
    return decoded


def published_experts(stack: str, tensors: Tensors) -> Tensors:
    """The weights of a stack that Quark has left in blocks, as transformers decodes them."""
    parent, _, projection = stack.rpartition(".")
    weights = convert_moe_packed_tensors(tensors[f"{stack}_blocks"], tensors[f"{stack}_scales"])
    return {f"{parent}[{e}].{projection}": one.T.float().contiguous() for e, one in enumerate(weights)}


def write_indexed(folder: Path, tensors: Tensors) -> None:
    """The file-to-file exporter wants an index."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_stepped(folder: Path) -> None:
    """A folder with the names of Step 3.5: a layer with a shared expert beside routed ones, which aren't here."""
    attention = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    expert = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"share_expert.{name}": shape for name, shape in expert.items()} | {"moe.gate": (4, 64)}
    names = {f"model.layers.3.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (40, 64), "lm_head.weight": (40, 64)}
    tensors = {
        name: torch.from_numpy(random_weight(name, shape, tied=False)).bfloat16() for name, shape in names.items()
    }
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    folder.mkdir(exist_ok=True)
    write_indexed(folder, tensors)
    config = {"architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def copy_fixture(name: str, folder: Path) -> None:
    fixture = ROOT / "tests" / "fixtures" / name
    folder.mkdir(exist_ok=True)
    shutil.copyfile(fixture / "config.json", folder / "config.json")
    write_indexed(folder, load_file(fixture / "model.safetensors"))


def cut_experts(folder: Path) -> None:
    """A small Step 3.5 with an expert's projections as tensors of their own: <block>.moe[<expert>].<projection>."""
    fixture = ROOT / "tests" / "fixtures" / "step3p5-bf16"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(fixture / "config.json", folder / "config.json")
    tensors: Tensors = {}
    for name, tensor in load_file(fixture / "model.safetensors").items():
        if tensor.dim() == 3:
            block, projection = name.split(".moe.")
            tensors |= {f"{block}.moe[{e}].{projection}": part.contiguous() for e, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    write_indexed(folder, tensors)


def stack_experts(folder: Path) -> None:
    """The tensors of experts as the release has them: weights [E, N, K], scales [E, N]."""
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stacks.setdefault(re.sub(r"\[\d+\]", "", name), []).append(tensor)
    tensors = {
        name: torch.stack(parts) if ".moe." in name and len(parts) > 1 else parts[0] for name, parts in stacks.items()
    }
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make(row: Export, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        if row.stepped:
            write_stepped(base)
        elif row.stacked:
            cut_experts(base)
        elif row.fixture:
            copy_fixture(row.fixture, base)
        else:
            write_base(row.base, base)
        files = row.file_to_file or row.stepped
        folder.mkdir(parents=True)
        decoded, logits = (export_files(row, base, folder), None) if files else export(row, base, folder)
    if row.stacked:
        stack_experts(folder)
    for left in ("generation_config.json",):
        (folder / left).unlink(missing_ok=True)
    exporter = "file to file" if files else "in memory"
    how = {"note": row.note, "made_by": f"AMD Quark, {exporter}", "tools": {tool: version(tool) for tool in TOOLS}}
    described = {**how, "decoded": digests({f"{name}.weight": tensor for name, tensor in decoded.items()})}
    if logits is not None:
        described |= {"prompt": PROMPT, "logits": logits}
    text = json.dumps(described, indent=1)
    numbers = re.compile(r"\[([-\d.,e\s]+)\]")  # a line for each list of them
    (folder / "expected.json").write_text(numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def write_readme(out: Path) -> None:
    lines = ["# Exports of AMD Quark", "", "Exported by Quark itself (`tools/make_quark_fixtures.py`).", ""]
    lines += ["| Folder | Exporter | Note |", "|---|---|---|"]
    for row in EXPORTS:
        how = json.loads((out / row.name / "expected.json").read_text())
        lines.append(f"| `{row.name}` | {how['made_by']} | {how['note']} |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tests/exports/quark.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "exports" / "quark")
    parser.add_argument("--only", nargs="*", default=[row.name for row in EXPORTS])
    options = parser.parse_args()
    for row in EXPORTS:
        if row.name in options.only:
            shutil.rmtree(options.out / row.name, ignore_errors=True)
            make(row, options.out / row.name)
            print(row.name, flush=True)
    if len(options.only) == len(EXPORTS):
        write_readme(options.out)


if __name__ == "__main__":
    main()
