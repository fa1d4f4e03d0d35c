"""Products by their definition, each with the most that a kernel's float32 arithmetic may be off.

With u = 2^-24, the largest relative error of rounding to float32, sums of `chain` operations, inputs x that a kernel
takes as r(x), and codes q, zero points z and scales s where these are multiplied apart:

    |y - exact| <= (chain + 8) u (|x| |W|^T + |x| ((2 |z| + offset) s)^T)
                   + |x - r(x)| |W|^T + 2 u (|exact| + |bias|) + what is flushed below 2^-126

since |q| s <= |W| + |z| s, and likewise 2 |zx| sx beside |x| where x has codes and zero points of its own. The 8 covers
the few operations outside of the sums, and the squares of u. Where a sum may leave float32's range the bound is
infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.reference.activations import quantize
from fewbits.kernels.reference.linear import row_chunks, statics
from fewbits.qweight import QLinear, QWeight

Array = NDArray[Any]

UNIT = 2.0**-24
LARGEST = 2.0**127
SMALLEST = 2.0**-126  # float32 and bfloat16 numbers below it may be taken for 0


class Part(NamedTuple):
    """Some rows of a weight: their results and bounds, float64 [M, rows], and each row's Euclidean norm.

    A norm is 0 where all weights of the row are, and not finite where one of them isn't.
    """

    rows: slice
    exact: Array
    bound: Array
    norms: Array


def product_parts(linear: QLinear, x: Array, arithmetic: Arithmetic) -> Iterator[Part]:
    """x float32 [M, K] times the weight, a bounded number of weights at a time."""
    inputs = x.astype(np.float64)
    apart = np.zeros((len(x), 1))
    if linear.act is not None:
        quantized = quantize(x, linear.act, statics(linear))
        inputs = quantized.values()
        if arithmetic.row_zero and quantized.zero is not None:
            # Codes and zero points of x meet in the sums: as much as the codes' own products may be off.
            apart = 2 * np.abs(quantized.zero.astype(np.float64) * quantized.scale)
    sizes = np.abs(inputs)
    relative = (arithmetic.chain + 8) * UNIT
    allowed = relative * (sizes + apart)
    if arithmetic.bfloat16_input and linear.act is None:
        rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
        rounded[np.abs(rounded) < SMALLEST] = 0
        allowed += np.abs(inputs - rounded)
    flushed = SMALLEST * (sizes.sum(axis=1, keepdims=True) + x.shape[1])
    for rows, weight in row_chunks(linear.weight):
        values = weight.dequantize()
        exact, bound = inputs @ values.T, allowed @ np.abs(values).T
        scale = 1.0
        if arithmetic.offset is not None and weight.scale is not None:
            bound += relative * (_block_sums(sizes, weight) @ _apart(weight, arithmetic.offset).T)
            scale = max(float(weight.scale.astype(np.float64).max(initial=0)), 1.0)
        bound[bound >= relative * LARGEST] = np.inf
        if linear.bias is not None:
            bias = linear.bias[rows].astype(np.float64)
            exact += bias
            bound += 2 * UNIT * np.abs(bias)
        bound += 2 * UNIT * np.abs(exact) + scale * flushed
        yield Part(rows, exact, bound, np.sqrt(np.einsum("nk,nk->n", values, values)))


def row_parts(table: QLinear, token_ids: Array, arithmetic: Arithmetic) -> Iterator[tuple[Array, Part]]:
    """Rows of an embedding table: (indices into token_ids, their part); its arrays are [indices, K]."""
    for rows, weight in row_chunks(table.weight):
        values = weight.dequantize()
        (found,) = np.nonzero((token_ids >= rows.start) & (token_ids < rows.stop))
        exact = values[token_ids[found] - rows.start]
        bound = arithmetic.chain * UNIT * np.abs(exact) + SMALLEST
        yield found, Part(rows, exact, bound, np.sqrt(np.einsum("nk,nk->n", values, values)))


def _block_sums(sizes: Array, weight: QWeight) -> Array:
    """Sums of |x| over the columns of each block, [M, groups]."""
    if weight.perm is not None:
        sizes = sizes[:, weight.perm]
    columns = weight.spec.block_of(weight.shape)[1]
    sums: Array = np.add.reduceat(sizes, np.arange(0, weight.shape[1], columns), axis=1)
    return sums


def _apart(weight: QWeight, offset: float) -> Array:
    """(2 |z| + offset) s of each block, [rows, groups], or [1, groups] where all rows share theirs."""
    assert weight.scale is not None
    size = np.full(weight.scale.shape, float(offset))
    if weight.zero is not None:
        size += 2 * np.abs(weight.zero.astype(np.float64) - (1 << (weight.spec.bits - 1)))
    size *= weight.scale.astype(np.float64) * (weight.global_scale or 1.0)
    height = weight.spec.block[0]
    return size[np.arange(weight.shape[0]) // height] if height > 1 else size
