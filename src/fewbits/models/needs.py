"""What a model asks of a checkpoint."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fewbits.spec import HeadRows

Bias = Literal["yes", "no", "optional"]


class Need(NamedTuple):
    """A module that the model asks for, by its stored name.

    `shape` is [N, K], or (H,) for a norm; None is for the tensor to say. `bias` says whether the module has one. A
    module that is absent is filled from `tied_to` where that is set; only an `optional` one may be missing altogether,
    and `instead` says what then takes its place, if something does. `other` is a tensor by its whole name, a vector
    that the model takes as it is, floats or `integers`; the plan shows it in the row of its `owner`, if it has one.

    Of experts: `in_turn`, the rows of gate and up are stored in turn, and are put one behind the other when they are
    loaded; `transposed`, plain floats in one stack are stored [K, N]. `heads`: of a product of latents, which runs
    absorbed (`kernels/latent.py`).
    """

    name: str
    kind: Literal["embedding", "norm", "linear", "head", "router", "expert", "other"]
    shape: tuple[int | None, ...]
    optional: bool = False
    bias: Bias = "no"
    tied_to: str | None = None
    owner: str | None = None
    integers: bool = False
    instead: str = ""
    in_turn: bool = False
    transposed: bool = False
    heads: HeadRows | None = None
