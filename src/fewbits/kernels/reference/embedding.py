"""Rows of an embedding table, dequantized when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.reference import linear
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import QuantSpec

Array = NDArray[Any]


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    if spec.act is not None:
        return "embeddings have no activations to quantize"
    return linear.accepts(spec, shape)


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Codes and scales as they are in the canonical form."""
    weight = spec.weight
    blocks = weight.blocks_of(shape)
    row = (shape[1] + 1) // 2 if weight.quantized and weight.bits == 4 else shape[1] * max(weight.bits // 8, 1)
    scales = blocks[0] * blocks[1] * np.dtype(weight.scale_dtype).itemsize if weight.scale_dtype else 0
    zeros = blocks[0] * blocks[1] if weight.zero_point != "none" else 0
    return shape[0] * row + scales + zeros


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """float64, rounded once."""
    return Arithmetic(chain=1)


def pack(table: QLinear, run: Run = at_once) -> QWeight:
    return table.weight


def bind(tables: Sequence[QWeight]) -> Callable[[Array], Array]:
    (table,) = tables
    height = table.spec.block[0]

    def row(token: int) -> Array:
        begin = token - token % height if height > 1 else token
        values = table.rows(begin, min(begin + max(height, 1), table.shape[0])).dequantize()
        wanted: Array = values[token - begin]
        return wanted

    def rows(token_ids: Array) -> Array:
        x = np.empty((len(token_ids), table.shape[1]), np.float32)
        with np.errstate(over="ignore"):  # beyond float32: infinite, and the logits say so
            for out, token in zip(x, token_ids.tolist(), strict=True):
                out[:] = row(token)
        return x

    return rows
