"""Writes tests/fixtures: small checkpoints made by the real tools, each with what it must decode to.

    python tools/make_fixtures.py                  all of them, README.md and matching.json
    python tools/make_fixtures.py --only NAME …    some of them

Needs tools/fixtures-requirements.txt, and fetches a few other versions of compressed-tensors with pip. Each
folder is the published folder as the tool wrote it (without recipe.yaml) and beside it

    expected.json         versions of the tools, what was done, and per quantized module the dtype, shape
                          and SHA-256 (of the little-endian bytes) of the library's own decompression; so
                          too for what is dense but stored sparse ("expanded"); or the code of the error with
                          which fewbits refuses the folder, and no numbers
    expected.safetensors  input_ids [T] int64, logits, and the decompression itself, `<module>.weight`, of
                          the head, the embedding and layer 0 (of its k_proj alone where one scheme serves
                          all modules; of no module in the smallest fixtures)

Logits are `[T, vocabulary]` float32, computed in float32 with attention written out:
    logits              weight-only and unquantized: transformers on the decompressed weights
    logits_weight_only  the same, where the checkpoint also quantizes activations or the KV cache
    logits_producer     there: the library's own forward, which quantizes those too
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from fixture_digest import digests
from fixture_gpt_oss import GPT_OSS_ROWS, GptOss, write_gpt_oss
from fixture_libraries import environment
from fixture_matching import write as write_matching
from fixture_micro import MICRO
from fixture_models import load, logits_of, stored_values, token_ids, write_base
from fixture_rewrites import REWRITES, Rewrite
from fixture_sparse import SPARSE, Sparse
from fixture_step import STEP, Step
from fixture_step import write as write_step
from fixture_table import FIXTURES, Fixture, Recipe
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("llmcompressor", "compressed-tensors", "transformers", "safetensors", "torch")
CALIBRATION_SEQUENCES = 8
# In float32 two orders of the same sums differ by this much on logits of size 10.
SAME_LOGITS = 1e-4

Tensors = dict[str, torch.Tensor]
ROWS: tuple[Fixture | GptOss | Rewrite | Step, ...] = (*FIXTURES, *MICRO, *GPT_OSS_ROWS, *STEP, *SPARSE, *REWRITES)


def quantize(base: Path, recipe: Recipe, vocabulary: int, folder: Path) -> None:
    """Runs llm-compressor on the base checkpoint and saves its result."""
    modifier = QuantizationModifier(
        config_groups={f"group_{i}": dict(group) for i, group in enumerate(recipe.groups)} or None,
        scheme=recipe.preset,
        ignore=list(recipe.ignore),
        kv_cache_scheme=recipe.kv_cache,
    )
    calibration: dict[str, Any] = {}
    if recipe.calibrate:
        ids = torch.from_numpy(token_ids(vocabulary, "calibration", sequences=CALIBRATION_SEQUENCES))
        calibration = {
            "dataset": DataLoader([{"input_ids": row} for row in ids], batch_size=1),
            # Asked for wherever there is a data set, and then not used.
            "processor": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())),
            "pipeline": "basic",
        }
    model = load(base)
    linearize_moe(model)
    rotation = [SpinQuantModifier(rotations=list(recipe.rotations))] if recipe.rotations else []
    oneshot(model=model, recipe=[*rotation, modifier], **calibration)
    model.save_pretrained(folder, save_compressed=recipe.compress, quantization_format=recipe.storage)
    (folder / "recipe.yaml").unlink()


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint, shards joined."""
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name != "expected.safetensors")
    return {name: tensor for path in shards for name, tensor in load_file(path).items()}


def unquantized_model(folder: Path) -> PreTrainedModel:
    """The plain float32 model of a checkpoint's config, weights still random."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    linearize_moe(model)  # experts as the quantizer has them, one by one
    return model.eval()


def decompress(folder: Path, model: torch.nn.Module | None = None) -> Tensors:
    """Per quantized module, the owner's own decompression of what the folder holds.

    Schemes come from the library's matching on the plain model, which is transformers' unless given: it can't load a
    checkpoint whose embedding is packed.
    """
    tensors = read(folder)
    model = model or unquantized_model(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    decoded = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        stored = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.rpartition(".")[0] == name}
        # Without tensors: a tied head. Without weights: attention whose cache is quantized.
        if scheme is None or scheme.weights is None or not stored:
            continue
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        decoded[f"{name}.weight"] = compressor.decompress(stored, scheme)["weight"].detach().contiguous()
    return decoded


def dense_logits(folder: Path, decoded: Mapping[str, torch.Tensor], ids: np.ndarray) -> torch.Tensor:
    """Logits of the plain model that holds the decoded weights and whatever is stored dense, in float32."""
    model = unquantized_model(folder)
    state = read(folder) | dict(decoded)
    with torch.no_grad():
        for name, parameter in stored_values(model):
            parameter.copy_(_tensor(state, name).float())
    return logits_of(model, ids)


def _tensor(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter by the name that it has in a model with experts one by one."""
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), strict=True):
        mixtral = name.replace(".mlp.", ".block_sparse_moe.").replace(ours, theirs)
        for stored in (name, mixtral, mixtral.replace(theirs, ours)):
            if stored in state:
                return state[stored]
    block, _, end = name.partition(".experts.")  # one of a stack
    expert, projection, _ = end.split(".")
    stack = state[f"{block}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
    return stack if projection == "down_proj" else stack.chunk(2)[projection == "up_proj"]


def one_by_one(linear: torch.nn.Module) -> None:
    """Gives inputs with two axes, as experts get them, a third: the library takes one scale for all their tokens."""
    forward = linear.forward
    linear.forward = lambda x: forward(x[None])[0] if x.ndim == 2 else forward(x)


def fake_quantized(folder: Path, decoded: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model of experts, which transformers can't load quantized: decoded weights, the library's own forward."""
    model, state = unquantized_model(folder), read(folder) | dict(decoded)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    with torch.no_grad():
        for name, parameter in stored_values(model):
            if name.endswith(".input_scale") or "_scale" not in name and "_zero_point" not in name:
                parameter.copy_(_tensor(state, name).float())
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_status = QuantizationStatus.FROZEN
            module.quantization_scheme.weights = None  # they are decoded
            one_by_one(module)
    return model


def producer_logits(folder: Path, decoded: Mapping[str, torch.Tensor], ids: np.ndarray) -> torch.Tensor:
    """Logits of the library's own forward: its decompressed weights, its fake-quantized activations.

    The first forward decompresses, in the checkpoint's dtype; the second runs in float32.
    """
    if any(".experts." in name for name in decoded):
        return logits_of(fake_quantized(folder, decoded), ids)
    model = load(folder)
    logits_of(model, ids)
    torch.nn.Module.float(model)  # transformers refuses its own method on a quantized model
    return logits_of(model, ids)


def expected_logits(folder: Path, fixture: Fixture, decoded: Tensors) -> Tensors:
    """The token ids and the logits that belong to them."""
    ids = token_ids(fixture.base.config["vocab_size"], fixture.name)[0]
    dense = dense_logits(folder, decoded, ids)
    expected = {"input_ids": torch.from_numpy(ids)}
    if fixture.recipe is not None and fixture.recipe.quantizes_activations:
        return expected | {"logits_weight_only": dense, "logits_producer": producer_logits(folder, decoded, ids)}
    if fixture.recipe is not None and fixture.recipe.compress and "model.embed_tokens.weight" not in decoded:
        difference = (producer_logits(folder, decoded, ids) - dense).abs().max().item()
        if difference > SAME_LOGITS:
            raise AssertionError(f"{fixture.name}: the library's forward differs by {difference}")
    return expected | {"logits": dense}


def kept(name: str, every: bool) -> bool:
    """Whether a decoded weight is stored as a tensor too."""
    if ".layers." not in name:
        return True
    return ".layers.0." in name and (every or name.endswith("k_proj.weight"))


def write_json(folder: Path, how: Mapping[str, object], what: Mapping[str, object]) -> None:
    """Writes expected.json."""
    described = {**how, "tools": {tool: version(tool) for tool in TOOLS}, **what}
    (folder / "expected.json").write_text(json.dumps(described, indent=1) + "\n")


def write_expected(
    folder: Path, how: Mapping[str, object], decoded: Tensors, logits: Tensors, every: bool | None
) -> None:
    """Writes expected.json and expected.safetensors. `every` None keeps digests alone."""
    write_json(folder, how, {"decoded": digests(decoded)})
    stored = {name: tensor for name, tensor in decoded.items() if every is not None and kept(name, every)}
    save_file(stored | logits, folder / "expected.safetensors")


def write_published(fixture: Fixture, folder: Path) -> None:
    """Writes what today's tools make of a fixture's base and recipe."""
    if fixture.recipe is None:
        write_base(fixture.base, folder)
    else:
        with tempfile.TemporaryDirectory() as base:
            write_base(fixture.base, Path(base))
            quantize(Path(base), fixture.recipe, fixture.base.config["vocab_size"], folder)


def described(fixture: Fixture) -> dict[str, object]:
    """How a fixture was made."""
    how: dict[str, object] = {"note": fixture.note, "made_by": "transformers"}
    if fixture.recipe is not None:
        recipe = asdict(fixture.recipe)
        how |= {"made_by": "llm-compressor", "recipe": {key: recipe[key] for key in recipe if recipe[key]}}
    if fixture.library:
        how["made_by"] = f"{how['made_by']}, compressed-tensors {fixture.library}"
    return how


def make(fixture: Fixture, folder: Path) -> None:
    """Makes one fixture in a new folder."""
    write_published(fixture, folder)
    how = described(fixture)
    if fixture.refused:
        write_json(folder, how, {"refused": fixture.refused})
        return
    decoded = decompress(folder) if fixture.recipe is not None and fixture.recipe.compress else {}
    every = fixture.recipe is not None and len(fixture.recipe.groups) > 1
    logits = expected_logits(folder, fixture, decoded)
    write_expected(folder, how, decoded, logits, every if fixture.numbers else None)


def make_sparse(row: Sparse, folder: Path) -> None:
    """Makes one fixture in a format that only older libraries write."""
    how = described(row)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        write_published(row, source)
        shutil.copytree(source, folder)
        tensors = read(source)
        stored, config = row.store(tensors, json.loads((source / "config.json").read_text()))
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if row.refused:
            write_json(folder, how, {"refused": row.refused})
            return
        decoded = decompress(source) if row.recipe is not None else {}
        write_expected(folder, how, decoded, expected_logits(source, row, decoded), every=None)
        expanded = {name: tensor for name, tensor in tensors.items() if _is_expanded(name, tensor, stored)}
        write_json(folder, how, {"decoded": digests(decoded), "expanded": digests(expanded)})


def _is_expanded(name: str, tensor: torch.Tensor, stored: Tensors) -> bool:
    sparse = f"{name}.bitmask" in stored or f"{name.removesuffix('.weight')}.bitmask" in stored
    return sparse and name.endswith(".weight") and tensor.dtype in (torch.bfloat16, torch.float32)


def rewrite(row: Rewrite, folder: Path, source: Path) -> None:
    """Makes one rewritten fixture from the folder of its source, which stands beside it."""
    tensors = read(source)
    config = json.loads((source / "config.json").read_text())
    decoded = decompress(source)
    unchanged = dict(decoded)
    row.apply(tensors, config, decoded)
    changed = any(decoded[name] is not unchanged[name] for name in decoded)
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    expected = load_file(source / "expected.safetensors")
    logits = {name: expected[name] for name in expected if name == "input_ids" or name.startswith("logits")}
    if changed:
        logits["logits"] = dense_logits(source, decoded, logits["input_ids"].numpy())
    how = {"note": row.note, "made_by": f"rewritten from {row.source}", "rewrite": row.apply.__doc__}
    write_expected(folder, how, decoded, logits, every=changed)


def write_readme(out: Path) -> None:
    """Lists the fixtures that are in the folder, one line each."""
    lines = [
        "# Fixtures",
        "",
        "Small random checkpoints written by the real tools, each with what it must decode to. Made by",
        "`tools/make_fixtures.py` (its docstring says what the `expected` files hold), which also wrote this",
        "page; `make test-peers` makes them again and compares. Names say scheme, then `head` where the",
        "language-model head is quantized, then the dtype where it is not bfloat16.",
        "",
        "| Folder | Made by | Note |",
        "|---|---|---|",
    ]
    for row in ROWS:
        how = json.loads((out / row.name / "expected.json").read_text())
        lines.append(f"| `{row.name}` | {how['made_by']} | {how['note']} |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of fixtures")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "fixtures", help="where to write")
    parser.add_argument("--no-list", action="store_true", help="don't write README.md and matching.json")
    options = parser.parse_args()
    make_all(options.out, options.only)
    if not options.no_list:
        write_readme(options.out)
        write_matching(options.out / "matching.json")


def make_all(out: Path, only: list[str] | None = None) -> None:
    """Makes the fixtures of the given names, or all, under ``out``; a rewrite needs its source there."""
    torch.set_num_threads(1)
    for row in ROWS:
        if only is not None and row.name not in only:
            continue
        folder = out / row.name
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(row, Rewrite):
            rewrite(row, folder, out / row.source)
        elif isinstance(row, Step):
            write_expected(folder, {"note": row.note, "made_by": "transformers"}, {}, write_step(row, folder), None)
        elif isinstance(row, GptOss):
            decoded, logits = write_gpt_oss(row, folder)
            write_expected(folder, {"note": row.note, "made_by": "transformers"}, decoded, logits, None)
        elif isinstance(row, Sparse):
            make_sparse(row, folder)
        elif row.library and row.library != version("compressed-tensors"):
            command = [sys.executable, __file__, "--out", str(out), "--no-list", "--only", row.name]
            subprocess.run(command, check=True, env=environment(row.library), stdout=subprocess.DEVNULL)
        else:
            make(row, folder)
        print(row.name, flush=True)


if __name__ == "__main__":
    main()
