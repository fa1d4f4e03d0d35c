"""y = x W^T + b for every spec: `linear_exact` in float64 is the definition, the kernel runs in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.formulas import formula
from fewbits.kernels.reference.activations import Statics, quantize, undefined
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import ActSpec, QuantSpec

Array = NDArray[Any]

_CHUNK = 1 << 22  # weights dequantized at a time: 32 MB of float64
_FLOATS = {(2, 1), (2, 3), (3, 2), (4, 3), (5, 2)}  # (exponent, mantissa) of quantized floats


def accepts(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    weight = spec.weight
    if weight.quantized:
        if weight.kind == "float" and (weight.exponent, weight.mantissa) not in _FLOATS:
            return f"{weight.number} codes have no definition"
        if weight.kind != "float" and not 1 <= weight.bits <= 8:
            return "integer codes of 1 to 8 bits"
    if spec.act is not None and formula(spec.act) is None:
        return undefined(spec.act)
    return None


def nbytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    return 4 * shape[0] * shape[1]


def arithmetic(spec: QuantSpec, shape: tuple[int, int]) -> Arithmetic:
    """BLAS may add in any order."""
    return Arithmetic(chain=shape[1])


def row_chunks(weight: QWeight) -> Iterator[tuple[slice, QWeight]]:
    """(rows, the weight of these), so few rows at a time that they can be dequantized."""
    N, K = weight.shape
    rows = max(_CHUNK // max(K, 1), 1)
    height = weight.spec.block[0]
    if height > 1:
        rows = max(rows // height, 1) * height
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        yield slice(begin, end), weight.rows(begin, end)


def statics(linear: QLinear) -> Statics:
    return Statics(linear.input_scale, linear.input_zero, linear.input_global_scale)


def linear_exact(linear: QLinear, x: Array) -> Array:
    """The definition: x float32 [M, K] → float64 [M, N].

    x is quantized in float32 as deployed engines do (`activations`); all else is float64.
    """
    inputs = x.astype(np.float64)
    if linear.act is not None:
        inputs = quantize(x, linear.act, statics(linear)).values()
    y = np.empty((len(x), linear.weight.shape[0]))
    for rows, part in row_chunks(linear.weight):
        y[:, rows] = inputs @ part.dequantize().T
    return y if linear.bias is None else y + linear.bias.astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """The weight in float32 [N, K], and how its input is quantized."""

    weight: Array
    bias: Array | None
    act: ActSpec | None
    statics: Statics

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes)


def pack(linear: QLinear, run: Run = at_once) -> PackedLinear:
    weight = np.empty(linear.weight.shape, np.float32)
    with np.errstate(over="ignore"):  # beyond float32: infinite, and the logits say so
        for rows, part in row_chunks(linear.weight):
            weight[rows] = part.dequantize()
    return PackedLinear(weight, linear.bias, linear.act, statics(linear))


class Runner:
    """Row by row, so that BLAS takes the same way through a row whatever M is."""

    def __init__(self, weights: Sequence[PackedLinear]) -> None:
        self._weights = tuple(weights)

    def __call__(self, x: Array, add_to: Array | None = None) -> tuple[Array, ...]:
        inputs: dict[tuple[ActSpec | None, Statics], Array] = {}
        results = []
        x = np.asarray(x)  # the native back end's norms compute their rows when they are asked for
        for packed in self._weights:
            key = (packed.act, packed.statics)
            if key not in inputs:
                inputs[key] = input_of(x, *key)
            y = np.empty((len(x), len(packed.weight)), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # infinite weights: the logits say so
                for row, y_row in zip(inputs[key], y, strict=True):
                    np.matmul(packed.weight, row, out=y_row)
            if packed.bias is not None:
                y += packed.bias
            results.append(y)
        if add_to is not None:
            (y,) = results
            add_to += y
            return (add_to,)
        return tuple(results)


def input_of(x: Array, act: ActSpec | None, statics: Statics) -> Array:
    """x float32 [M, K] as a product takes it, float32: quantized and back, or as it is."""
    return x if act is None else quantize(x, act, statics).values().astype(np.float32)


class Apart:
    """Each weight with its own part of a row of x, and of y."""

    def __init__(self, weights: Sequence[PackedLinear]) -> None:
        self._runs = [Runner([packed]) for packed in weights]
        self._borders = np.cumsum([packed.weight.shape[1] for packed in weights])[:-1]

    def __call__(self, x: Array) -> tuple[Array]:
        parts = np.split(np.asarray(x), self._borders, axis=1)
        return (np.concatenate([run(part)[0] for run, part in zip(self._runs, parts, strict=True)], axis=1),)


def bind(weights: Sequence[PackedLinear], apart: bool = False) -> Runner | Apart:
    return Apart(weights) if apart else Runner(weights)
