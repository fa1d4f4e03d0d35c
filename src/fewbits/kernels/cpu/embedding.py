"""cpu.embedding: rows of a table gathered and dequantized by native code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.cpu.container import Container, codes_of, container, parameters, zeros_of
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec

Array = NDArray[Any]

_BLOCK = 1 << 20  # bytes copied at a time
_BYTES = {"int4": 0.5, "int8": 1, "fp4": 0.5, "fp8": 1, "bf16": 2, "f16": 2, "f32": 4}


def _container(spec: QuantSpec, shape: tuple[int, int]) -> Container | str:
    return container(spec.weight, shape)


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    if spec.act is not None:
        return "no quantized input"
    found = _container(spec, shape)
    return found if isinstance(found, str) else None


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    found = _container(spec, shape)
    assert not isinstance(found, str)
    N, K = shape
    parameters = 0 if found.scale == "none" else 4 * -(-K // found.group) * (1 + found.zero)
    return N * (math.ceil(K * _BYTES[found.kind]) + parameters)


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """The difference of code and zero point is exact; its product with the scale is rounded, and so is a scale that
    has a second level.
    """
    return Arithmetic(chain=2 if spec.weight.global_scale else 1)


@dataclass(frozen=True, slots=True, eq=False)
class PackedTable:
    """A native Embedding, and the input column of each stored one where they are in another order (int64 [K])."""

    rows: Any
    order: Array | None


def pack(table: QLinear, run: Run = at_once) -> PackedTable:
    """Complete once the tasks that were given to `run` have ended.

    It refers to copies of what it is given; but to the codes themselves where they are read-only and of the native kind
    (a table that is mapped: few of its rows are ever wanted).
    """
    from fewbits import _native

    weight = table.weight
    N, K = weight.shape
    found = _container(QuantSpec(weight.spec), weight.shape)
    assert not isinstance(found, str)
    every = slice(0, N)
    first = codes_of(weight, slice(0, min(N, 1)), found.kind)
    if first.flags.writeable:
        codes = np.empty((N, first.shape[1]), first.dtype)

        def copy(rows: slice) -> None:
            codes[rows] = codes_of(weight, rows, found.kind)

        step = max(_BLOCK // max(codes.shape[1] * codes.itemsize, 1), 1)
        for begin in range(0, N, step):
            run(partial(copy, slice(begin, min(begin + step, N))))
    else:
        codes = codes_of(weight, every, found.kind)
    scale = zero = None
    if weight.scale is not None:
        scale = parameters(weight.scale, weight, every).astype(np.float64) * (weight.global_scale or 1.0)
        scale = scale.astype(np.float32)
    if found.zero:
        zeros = zeros_of(weight, every)
        assert zeros is not None
        zero = zeros.astype(np.float32) + (8 if found.kind == "int4" else 128)
    order = None if weight.perm is None else np.array(weight.perm)
    return PackedTable(_native.Embedding(found.kind, codes, K, scale, zero, found.group), order)


def bind(tables: Sequence[PackedTable]) -> Callable[[Any], Any]:
    from fewbits import _native
    from fewbits.kernels.cpu.arrays import Operand, Traced, empty

    (table,) = tables
    K, gather, address, order = table.rows.K, table.rows.rows, _native.address, table.order

    def rows(token_ids: Operand) -> Operand:
        if isinstance(token_ids, Traced) and order is None:
            return token_ids.program.embed(table.rows, token_ids, K)
        x = empty(len(token_ids), K)
        gather(address(token_ids), len(token_ids), address(x))
        if order is None:
            return x
        restored = np.empty_like(x)
        restored[:, order] = x
        return restored

    return rows
