"""The plan's types: what is known of each module before a weight is read, and whether all of it can run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import Config
from fewbits.errors import FewbitsError, Notice, PlanError
from fewbits.formats.resolved import Format, ModuleKind, Resolved
from fewbits.kernels import Kernel, latent
from fewbits.plan.stacks import Stack
from fewbits.spec import ActSpec, HeadRows, QuantSpec, widened

ExecutedAs = Literal["native", "reference", "dequantized", "refused", "not_run"]


class Need(Protocol):
    """A module or vector that a model asks for; see `models.needs.Need`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> ModuleKind: ...
    @property
    def shape(self) -> tuple[int | None, ...]: ...
    @property
    def optional(self) -> bool: ...
    @property
    def bias(self) -> str: ...
    @property
    def tied_to(self) -> str | None: ...
    @property
    def owner(self) -> str | None: ...
    @property
    def integers(self) -> bool: ...
    @property
    def instead(self) -> str: ...
    @property
    def in_turn(self) -> bool: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def heads(self) -> HeadRows | None: ...


class Family(Protocol):
    """What the plan must know of a model family; see `models.Family`."""

    @property
    def name(self) -> str: ...
    @property
    def configure(self) -> Callable[[Config], Any]: ...


@dataclass(frozen=True, slots=True)
class Execution:
    """What is done with a module, and why not better.

    `declined` holds each candidate kernel's name and its reason. Norms have no kernel of their own. `packed_bytes` is
    what the kernel makes of the weight, in memory.
    """

    executed_as: ExecutedAs
    reason: str = ""
    kernel: Kernel | None = None
    declined: tuple[tuple[str, str], ...] = ()
    packed_bytes: int = 0


class Row(NamedTuple):
    """One module. `shape` is [N, K], that of the tensor for norms and convolutions.

    `stored` names the module whose tensors are decoded: another one for a tied head, or for one of stacked experts,
    of which this is number `expert`; "" for none. Its tensors are those of `suffixes`, and beside them the `others`, by
    their whole names. `in_turn`: rows of gate and up come in turn, and `heads`, as `models.needs.Need` says.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    spec: QuantSpec
    dtype: str
    suffixes: tuple[str, ...]
    decided_by: str
    execution: Execution
    stored: str
    resolved: Resolved | None = None
    others: tuple[str, ...] = ()
    stack: Stack | None = None
    expert: int = 0
    in_turn: bool = False
    heads: HeadRows | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        if self.stack is not None:
            return (*[self.stack.tensors[suffix][0] for suffix in self.suffixes], *self.others)
        return (*[f"{self.stored}.{suffix}" for suffix in self.suffixes], *self.others)

    def source(self, suffix: str) -> tuple[str, int | None]:
        """The tensor that holds `suffix`, and which part of its first axis; None is all of it."""
        if self.stack is None:
            return f"{self.stored}.{suffix}", None
        name, has_parts = self.stack.tensors[suffix]
        return name, self.expert if has_parts else None

    @property
    def stored_as(self) -> str:
        """Its spec, or where it has none the dtype of its tensor; "" where another model's module takes its place."""
        if not self.stored:
            return ""
        return self.dtype if self.kind == "other" else str(self.spec)

    @property
    def module(self) -> str:
        """What errors call the module that is decoded."""
        return self.stored if self.stack is None else self.name

    @property
    def executed_as(self) -> ExecutedAs:
        return self.execution.executed_as

    @property
    def reason(self) -> str:
        return self.execution.reason

    @property
    def kernel(self) -> Kernel | None:
        return self.execution.kernel

    @property
    def declined(self) -> tuple[tuple[str, str], ...]:
        return self.execution.declined

    @property
    def runs(self) -> bool:
        return self.execution.executed_as in ("native", "reference", "dequantized")

    @property
    def runs_as(self) -> QuantSpec:
        """The spec that its kernel was chosen for."""
        if self.heads is not None:
            return latent.runs_as(self.spec.weight)
        return widened(self.spec) if self.kind == "router" else self.spec

    @property
    def matrix(self) -> tuple[int, int]:
        """`shape` of a module that is a matrix."""
        return (self.shape[0], self.shape[1])

    @property
    def tied(self) -> bool:
        return self.stored != self.name and self.stack is None


@dataclass(slots=True)
class LoadPlan:
    """`model` is the family's configuration, None where the family is unknown or its config can't be honoured.

    `vectors` are tensors that the model takes as they are, such as a router's bias for selection, and `indices` those
    of integers. `kv_scales` maps a
    layer to the tensors of its (k, v) scale where the cache will be quantized by `kv_cache`.
    """

    checkpoint: Checkpoint | None = None
    format: Format | None = None
    family: str | None = None
    model: Any = None
    rows: list[Row] = field(default_factory=list)
    leftover_tensors: list[str] = field(default_factory=list)
    config_keys: list[str] = field(default_factory=list)
    patterns_without_match: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    indices: list[str] = field(default_factory=list)
    kv_cache: ActSpec | None = None
    kv_scales: dict[int, tuple[str, str]] = field(default_factory=dict)
    cache_dtype: Literal["f32", "bf16", "f16"] = "bf16"
    parameters: int | None = None
    nbytes: int | None = None
    warnings: list[Notice] = field(default_factory=list)
    errors: list[Notice] = field(default_factory=list)
    failure: FewbitsError | None = None  # why there is nothing more than this to show

    def weight_bytes(self) -> int:
        """Resident bytes after packing, embeddings and norms included."""
        total = 0
        for row in self.rows:
            if row.kernel is not None:
                total += row.execution.packed_bytes
            elif row.runs:
                total += 4 * math.prod(row.shape)
        return total

    def kv_bytes_per_token(self) -> int | None:
        if self.model is None:
            return None
        scales = dict.fromkeys(self.kv_scales, ((1.0,), (1.0,)))
        total: int = sum(layer.token_bytes for layer in self.model.cache_layers(self.cache_dtype, scales))
        return total


def failed(error: FewbitsError) -> LoadPlan:
    """A plan with nothing but the reason why the folder can't be read."""
    return LoadPlan(errors=[error.notice()], failure=error)


def require_runnable(plan: LoadPlan, allow_reference: bool) -> None:
    """Raise PlanError unless every module of the plan can run, with the first reason and the number of others."""
    if plan.failure is not None:
        raise plan.failure
    assert plan.checkpoint is not None
    if plan.errors:
        first = plan.errors[0]
        others = tuple(f"also: {error}" for error in plan.errors[1:4])
        if len(plan.errors) > 4:
            others += (f"and {len(plan.errors) - 4} more",)
        hint = f"fewbits inspect {plan.checkpoint.folder} shows every module"
        raise PlanError(first.code, first.text, module=first.module, details=others, hint=hint)
    if plan.model is None:
        architectures = plan.checkpoint.config.get("architectures", list, [])
        raise PlanError(
            "family-unknown",
            f"{architectures[0] if architectures else 'a model without a name'} is not a family that fewbits runs",
            source="config.json, architectures",
        )
    if plan.checkpoint.header_only:
        raise PlanError("header-only", "the files have headers but no data", module=str(plan.checkpoint.folder))
    slow = [row for row in plan.rows if row.executed_as == "reference"]
    if slow and not allow_reference:
        more = f" (and {len(slow) - 1} more modules)" if len(slow) > 1 else ""
        raise no_kernel(slow[0], slow[0].spec, slow[0].declined, more)


def no_kernel(row: Row, spec: QuantSpec, declined: tuple[tuple[str, str], ...], more: str = "") -> PlanError:
    """The error for a module that only the reference can run; `declined` as in `Row`."""
    return PlanError(
        "kernel-none",
        f"{spec} has no native kernel{more}",
        module=row.name,
        source=row.decided_by,
        details=("declined: " + "; ".join(f"{name} ({why})" for name, why in declined),),
        hint="--allow-reference runs such modules in NumPy, slowly",
    )
