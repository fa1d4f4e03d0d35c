"""One native call for all chosen experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewbits import _native
from fewbits.kernels.cpu.arrays import Operand, Traced
from fewbits.kernels.cpu.linear import PackedLinear
from fewbits.kernels.ops import Activation, Chosen, Expert

_address = _native.address


def all_native(experts: Sequence[Expert]) -> bool:
    """Whether none has a weight that only the reference multiplies."""
    return all(isinstance(packed, PackedLinear) for expert in experts for _, packed in (*expert.inputs, expert.down))


class NativeExperts:
    """`ops.Experts` of packed weights."""

    __slots__ = ("_experts",)

    def __init__(self, experts: Sequence[Expert], activation: Activation) -> None:
        products = [([packed.product() for _, packed in expert.inputs], expert.down[1].product()) for expert in experts]
        self._experts = _native.Experts(products, activation.name, activation.limit)

    def __call__(self, x: Operand, chosen: Chosen, add_to: Operand) -> None:
        if x.dtype != np.float32 or x.shape != add_to.shape or add_to.dtype != np.float32:
            raise ValueError(f"x and add_to must be float32 of one shape, not {list(x.shape)} and {list(add_to.shape)}")
        if isinstance(x, Traced):
            x.program.experts(self._experts, x, *chosen, add_to)
            return
        T, k = chosen.experts.shape
        addresses = (_address(x), _address(chosen.experts), _address(chosen.weights))
        self._experts.run(*addresses, T, k, _address(add_to))
