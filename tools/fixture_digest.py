"""What expected.json says of a decoded weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest(tensor: torch.Tensor) -> dict[str, object]:
    """Dtype, shape and SHA-256 of a tensor's bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    return {name.removesuffix(".weight"): digest(tensor) for name, tensor in sorted(tensors.items())}
