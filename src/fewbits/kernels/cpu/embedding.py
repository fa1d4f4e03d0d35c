"""cpu.embedding: rows of a table gathered and dequantized by native code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.cpu.linear import accepts as linear_accepts
from fewbits.kernels.cpu.linear import kind, per_row
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec

Array = NDArray[Any]

_BLOCK = 1 << 20  # bytes copied at a time
_DTYPES = {"int4": np.uint8, "int8": np.uint8, "bf16": np.uint16, "f16": np.uint16, "f32": np.float32}


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    return linear_accepts(spec, shape)


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    weight = spec.weight
    N, K = shape
    if not weight.quantized:
        return N * K * weight.bits // 8
    row = (K + 1) // 2 if weight.bits == 4 else K
    groups = weight.blocks_of(shape)[1]
    return N * (row + 4 * groups * (2 if weight.zero_point != "none" else 1))


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """The difference of code and zero point is exact; its product with the scale is rounded once."""
    return Arithmetic(chain=1)


def pack(table: QLinear, run: Run = at_once) -> Any:
    """A native Embedding, complete once the tasks that were given to `run` have ended. It refers to its arrays, so
    these are copies.
    """
    from fewbits import _native

    weight = table.weight
    N, K = weight.shape
    group_size = weight.spec.block_of(weight.shape)[1] if weight.spec.quantized else K
    row = (K + 1) // 2 if weight.spec.quantized and weight.spec.bits == 4 else K
    codes = np.empty((N, row), _DTYPES[kind(weight.spec)])

    def copy(rows: slice) -> None:
        codes[rows] = weight.codes[rows]

    step = max(_BLOCK // max(row * codes.itemsize, 1), 1)
    for begin in range(0, N, step):
        run(partial(copy, slice(begin, begin + step)))
    blocks = (per_row(values, weight, slice(0, N)) for values in (weight.scale, weight.zero))
    scale, zero = (None if values is None else values.copy() for values in blocks)
    return _native.Embedding(kind(weight.spec), codes, K, scale, zero, min(group_size, K))


def bind(tables: Sequence[Any]) -> Callable[[Array], Array]:
    from fewbits import _native

    (table,) = tables
    K, gather, address = table.K, table.rows, _native.address

    def rows(token_ids: Array) -> Array:
        x = np.empty((len(token_ids), K), np.float32)
        gather(address(token_ids), len(token_ids), address(x))
        return x

    return rows
