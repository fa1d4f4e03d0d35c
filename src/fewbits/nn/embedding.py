"""The token table and the head."""

from __future__ import annotations

from typing import Any

from fewbits.kernels import Param
from fewbits.nn.linear import Linear


class Embedding:
    """Token ids int64 [T] → float32 [T, H]."""

    __slots__ = ("_rows",)

    def __init__(self, param: Param) -> None:
        kernel, packed = param
        self._rows = kernel.bind([packed])

    def __call__(self, token_ids: Any) -> Any:
        return self._rows(token_ids)


class Head:
    """Hidden states [R, H] → logits float32 [R, V]. A tied head is a packed weight of its own."""

    __slots__ = ("_linear",)

    def __init__(self, param: Param) -> None:
        self._linear = Linear(param)

    def __call__(self, x: Any) -> Any:
        (logits,) = self._linear(x)
        return logits
