"""What a model asks of a checkpoint."""

from __future__ import annotations

from typing import Literal, NamedTuple

Bias = Literal["yes", "no", "optional"]


class Need(NamedTuple):
    """A module that the model asks for, by its stored name.

    `shape` is [N, K], or (H,) for a norm. `bias` says whether the module has one. A module that is absent is
    filled from `tied_to` where that is set; only an `optional` one may be missing altogether. `other` is a tensor by
    its whole name, a vector that the model takes as it is; the plan shows it in the row of its `owner`, if it has one.
    """

    name: str
    kind: Literal["embedding", "norm", "linear", "head", "router", "expert", "other"]
    shape: tuple[int, ...]
    optional: bool = False
    bias: Bias = "no"
    tied_to: str | None = None
    owner: str | None = None
