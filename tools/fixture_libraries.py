"""Other versions of compressed-tensors than the installed one, each in a folder and a process of its own.

    python tools/fixture_libraries.py FOLDER       what `compress` runs under the other version: FOLDER/job.json,
                                                   FOLDER/in.safetensors → FOLDER/out.safetensors, FOLDER/config.json

Sparse storage was written until 0.14, marlin-24 until 0.11, MXFP6 since 0.20. Their other dependencies are those of
tools/fixtures-requirements.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
Tensors = dict[str, torch.Tensor]


def environment(version: str) -> dict[str, str]:
    """The environment of a process that imports this version, which is fetched when it isn't there yet."""
    folder = ROOT / "build" / "compressed-tensors" / version
    if not folder.exists():
        wanted = ["--quiet", "--no-deps", "--target", str(folder), f"compressed-tensors=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "install", *wanted], check=True)
    return os.environ | {"PYTHONPATH": str(folder)}


def compress(version: str, storage: str, tensors: Tensors, modules: list[str], arguments: Any) -> tuple[Tensors, Any]:
    """A model's tensors as the given version stores them, and the sparsity_config it writes (none for marlin-24).

    `modules` are those whose weights are compressed; up to 0.8 it is every tensor. `arguments` are marlin-24's weight
    arguments. The library's own decompression is checked to give every tensor back.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(tensors, folder / "in.safetensors")
        job = {"storage": storage, "modules": modules, "arguments": arguments}
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, str(Path(__file__)), str(folder)]
        subprocess.run(command, check=True, env=environment(version), stdout=subprocess.DEVNULL)
        return load_file(folder / "out.safetensors"), json.loads((folder / "config.json").read_text())


def _compress_here(folder: Path) -> None:
    from compressed_tensors.compressors import BitmaskCompressor

    job = json.loads((folder / "job.json").read_text())
    tensors = load_file(folder / "in.safetensors")
    if job["storage"] == "marlin-24":
        compressed, config = _marlin_24(tensors, job["modules"], job["arguments"]), None
    else:
        from compressed_tensors.config import SparsityCompressionConfig

        settings = SparsityCompressionConfig.load_from_registry(job["storage"], targets=["Linear"])
        if job["storage"] == "sparse-bitmask":
            compressor = BitmaskCompressor(config=settings)
        else:
            from compressed_tensors.compressors import Sparse24BitMaskCompressor

            compressor = Sparse24BitMaskCompressor(config=settings)
        targets = {} if not job["modules"] else {"compression_targets": set(job["modules"])}
        compressed, config = compressor.compress(tensors, **targets), settings.model_dump()
        _check(compressed, tensors, job["storage"])
    save_file({name: tensor.contiguous() for name, tensor in compressed.items()}, folder / "out.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _check(compressed: Tensors, tensors: Tensors, storage: str) -> None:
    from compressed_tensors.compressors import BitmaskTensor

    for name, tensor in tensors.items():
        for prefix in (name, name.removesuffix(".weight")):
            if f"{prefix}.bitmask" not in compressed:
                continue
            values = compressed[f"{prefix}.compressed"].flatten()
            numbers = torch.int8 if values.element_size() == 1 else values.dtype  # no indexing of FP8 on a CPU
            shape = compressed[f"{prefix}.shape"].flatten().tolist()
            mask = compressed[f"{prefix}.bitmask"]
            back = BitmaskTensor(shape, values.view(numbers), mask, torch.zeros(0)).decompress()
            if not torch.equal(back, tensor.view(numbers)):
                raise AssertionError(f"{name} doesn't come back from {storage}")


def _marlin_24(tensors: Tensors, modules: list[str], arguments: Any) -> Tensors:
    from compressed_tensors.compressors import Marlin24Compressor
    from compressed_tensors.quantization import QuantizationArgs

    schemes = {module: QuantizationArgs(**arguments) for module in modules}
    compressed: Tensors = Marlin24Compressor(config=None).compress(tensors, names_to_scheme=schemes)
    return compressed


if __name__ == "__main__":
    _compress_here(Path(sys.argv[1]))
