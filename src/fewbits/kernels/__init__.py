"""Kernels: which code multiplies a weight of which spec, and why the others don't.

A kernel is a row of the ordered table below; `choose` takes the first that accepts. Its functions live in one
folder per back end: `cpu` (native code) and `reference` (NumPy, the definition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.cpu import embedding as cpu_embedding
from fewbits.kernels.cpu import linear as cpu_linear
from fewbits.kernels.reference import embedding as reference_embedding
from fewbits.kernels.reference import linear as reference_linear
from fewbits.kernels.tasks import Run, at_once
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec

Op = Literal["linear", "embedding"]


class Pack(Protocol):
    """Puts a weight into a kernel's layout: complete once the tasks that were given to `run` have ended."""

    def __call__(self, linear: QLinear, run: Run = at_once) -> Any: ...


class LinearRunner(Protocol):
    """Several packed weights that share x."""

    def __call__(self, x: Any, add_to: Any = None) -> tuple[Any, ...]:
        """x float32 [M, K] → one float32 [M, N_i] per weight; with one weight, `add_to` += it in place."""


class EmbeddingRunner(Protocol):
    def __call__(self, token_ids: Any) -> Any:
        """int64 [T] → float32 [T, K], the rows of the table."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to run an operation.

    `accepts(spec, shape)` is None or a sentence why not; `bind` makes a runner of packed weights (of one, for an
    embedding; of linears that are `apart` as `bind_apart` says); `nbytes` is what a packed weight takes in memory;
    `arithmetic` is what the bound of its rounding follows from.
    """

    name: str
    op: Op
    accepts: Callable[[QuantSpec, tuple[int, int]], str | None]
    pack: Pack
    bind: Callable[..., Any]
    nbytes: Callable[[QuantSpec, tuple[int, int]], int]
    arithmetic: Callable[[QuantSpec, tuple[int, int]], Arithmetic]

    @property
    def reference(self) -> bool:
        """Whether this is the slow definition, which runs only when asked for."""
        return self.name.startswith("reference.")


def _row(name: str, op: Op, module: Any, accepts: Any = None) -> Kernel:
    return Kernel(name, op, accepts or module.accepts, module.pack, module.bind, module.nbytes, module.arithmetic)


KERNELS = (
    _row("cpu.dot_int8", "linear", cpu_linear, cpu_linear.accepts_int8),
    _row("cpu.dot_int16", "linear", cpu_linear, cpu_linear.accepts_int16),
    _row("cpu.dot_bf16", "linear", cpu_linear),
    _row("cpu.embedding", "embedding", cpu_embedding),
    _row("reference.linear", "linear", reference_linear),
    _row("reference.embedding", "embedding", reference_embedding),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel, None where every candidate declined, and each decliner's (name, sentence)."""

    kernel: Kernel | None
    declined: tuple[tuple[str, str], ...]


def choose(op: Op, spec: QuantSpec, shape: tuple[int, int], allow_reference: bool) -> Choice:
    """The first kernel of the table that runs `op` on a weight of this spec and shape [N, K].

    Without `allow_reference` the reference isn't a candidate.
    """
    declined: list[tuple[str, str]] = []
    for kernel in KERNELS:
        if kernel.op != op or (kernel.reference and not allow_reference):
            continue
        reason = kernel.accepts(spec, shape)
        if reason is None:
            return Choice(kernel, tuple(declined))
        declined.append((kernel.name, reason))
    return Choice(None, tuple(declined))


Param = tuple[Kernel, Any]  # a kernel and a weight that it packed


def bind_apart(params: Sequence[Param]) -> Callable[[Any], Any]:
    """One call of weights of the same kernel: each takes its own part of x float32 [M, the sum of K_i], and makes its
    own part of y [M, the sum of N_i].
    """
    kernel = params[0][0]
    run: LinearRunner = kernel.bind([packed for _, packed in params], apart=True)

    def call(x: Any) -> Any:
        (y,) = run(x)
        return y

    return call


def bind(params: Sequence[Param]) -> LinearRunner:
    """One runner for weights that share x; neighbours of the same kernel are one call of it."""
    runs = [
        kernel.bind([packed for _, packed in group]) for kernel, group in groupby(params, key=lambda param: param[0])
    ]
    if len(runs) == 1:
        only: LinearRunner = runs[0]
        return only

    def chain(x: Any, add_to: Any = None) -> tuple[Any, ...]:
        if add_to is not None:
            raise ValueError("only a single weight can be added to a residual")
        return tuple(y for run in runs for y in run(x))

    return chain
