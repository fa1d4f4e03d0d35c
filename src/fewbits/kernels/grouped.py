"""Experts, one after the other, over the rows that chose them: the reference, and what runs where not every weight has
a native kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels import bind
from fewbits.kernels.ops import Chosen, Expert

Array = NDArray[Any]
Gate = Callable[[Array, Array], Any]


def by_expert(chosen: Array) -> Iterator[tuple[int, Array, Array]]:
    """Of numbers [T, k]: (expert, its rows, where in these it stands), experts and rows in their order."""
    k = chosen.shape[1]
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    experts, counts = np.unique(flat, return_counts=True)
    begin = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        places = order[begin : begin + count]
        begin += count
        yield expert, places // k, places % k


class GroupedExperts:
    """Products of the rows of one expert at a time: one call for gate and up, one for down.

    A row's results are weighed and summed in `dtype`, in the order of the experts' numbers, whatever other rows do.
    """

    def __init__(self, experts: Sequence[Expert], gate: Gate, dtype: Any) -> None:
        self._experts = [(bind(expert.inputs), bind([expert.down])) for expert in experts]
        self._gate, self._dtype = gate, dtype

    def __call__(self, x: Array, chosen: Chosen, add_to: Array) -> None:
        total = np.zeros(add_to.shape, self._dtype)
        for expert, rows, places in by_expert(chosen.experts):
            gate_up, down = self._experts[expert]
            (y,) = down(self._gate(*_halves(gate_up(x[rows]))))
            total[rows] += chosen.weights[rows, places, np.newaxis] * y.astype(self._dtype, copy=False)
        add_to += total.astype(np.float32, copy=False)


def _halves(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """Gate and up, which one weight may have computed together."""
    if len(inputs) == 2:
        return inputs[0], inputs[1]
    (both,) = inputs
    width = both.shape[1] // 2
    return np.ascontiguousarray(both[:, :width]), np.ascontiguousarray(both[:, width:])
