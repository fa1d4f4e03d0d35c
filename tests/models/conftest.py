"""Small checkpoints that transformers wrote, unquantized, read without the loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fewbits.checkpoint.config import Config
from fewbits.engine.kvcache import KVCache
from fewbits.kernels import KERNELS, Kernel, latent
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.models import family_for
from fewbits.models.decoder import Decoder
from fewbits.models.needs import Need
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import dense

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@dataclass(frozen=True)
class Model:
    """A decoder on one back end, with the token ids and logits that transformers computed."""

    decoder: Decoder
    input_ids: np.ndarray
    logits: np.ndarray

    def cache(self, dtype: str = "f32", max_pages: int = 64) -> KVCache:
        return KVCache(self.decoder.config.cache_layers(dtype), max_pages)


def kernel(backend: str, op: str) -> Kernel:
    return next(row for row in KERNELS if row.op == op and row.name.startswith(backend))


def param(need: Need, tensors: dict[str, np.ndarray], backend: str, ops: Any) -> Any:
    if need.kind == "other":
        return ops.vector(tensors[need.name])
    name = need.name if f"{need.name}.weight" in tensors else need.tied_to
    weight = tensors[f"{name}.weight"]
    assert weight.shape == need.shape, need
    if need.kind == "norm":
        return ops.vector(weight)
    dtype = str(weight.dtype)
    codes = weight.view(np.uint16) if weight.dtype == ml_dtypes.bfloat16 else weight
    bias = tensors.get(f"{name}.bias")
    assert (bias is not None) == (need.bias == "yes"), need
    row = kernel(backend, "embedding" if need.kind == "embedding" else "linear")
    linear = QLinear(QWeight(dense(dtype), need.shape, codes), bias=bias)
    return latent.pack(linear, need.heads, row) if need.heads is not None else (row, row.pack(linear))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_model(backend: str) -> Callable[[str], Model]:
    """Opens a fixture folder on the test's back end."""

    def open_folder(name: str) -> Model:
        folder = FIXTURES / name
        config = Config(json.loads((folder / "config.json").read_text()), "config.json")
        family = family_for(config)
        assert family is not None
        description = family.configure(config)
        ops = ReferenceOps() if backend == "reference" else CpuOps()
        tensors: dict[str, np.ndarray] = {}
        for path in folder.glob("model*.safetensors"):
            tensors |= load_file(path)
        stored = {name.removesuffix(".weight") for name in tensors}
        params = {need.name: param(need, tensors, backend, ops) for need in description.modules(stored)}
        expected = load_file(folder / "expected.safetensors")
        return Model(Decoder(description, params, ops), expected["input_ids"], expected["logits"])

    return open_folder
