"""The feed-forward block of a layer, dense or of experts: its configuration, the modules it needs, the block itself."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fewbits.kernels.ops import Activation, Expert, Ops, Routing
from fewbits.models.needs import Bias, Need
from fewbits.nn.mlp import Mlp
from fewbits.nn.moe import Moe, Router, SharedExpert


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """One dense block, or a shared expert; `name` is what the checkpoint calls it within its layer."""

    width: int
    activation: Activation = Activation()
    bias: Bias = "no"
    name: str = "mlp"

    def modules(self, layer: str, hidden: int, stored: Container[str]) -> Iterator[Need]:
        name = f"{layer}.{self.name}"
        yield Need(f"{name}.gate_proj", "linear", (self.width, hidden), bias=self.bias)
        yield Need(f"{name}.up_proj", "linear", (self.width, hidden), bias=self.bias)
        yield Need(f"{name}.down_proj", "linear", (hidden, self.width), bias=self.bias)

    def make(self, layer: str, params: Mapping[str, Any], ops: Ops) -> Mlp:
        gate, up, down = (params[f"{layer}.{self.name}.{part}_proj"] for part in ("gate", "up", "down"))
        return Mlp(self.activation, gate, up, down, ops)


class MoeNames(NamedTuple):
    """What a checkpoint calls the parts of a block within its layer. {} in an expert's is its number.

    `inputs` are gate and up, or one module that has gate's rows and behind them up's.
    """

    router: str
    bias: str
    inputs: tuple[str, ...]
    down: str


_PROJECTIONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("w13",), "w2"),
)
_PLACES = ("{block}.experts.{{}}", "{block}.experts[{{}}]", "{block}[{{}}]")  # one by one; stacked; so without experts


def names_of(block: str, router: str = "gate", bias: str = "gate.e_score_correction_bias") -> tuple[MoeNames, ...]:
    """The ways in which any family's experts are stored in a block of this name."""
    return tuple(
        MoeNames(
            f"{block}.{router}",
            f"{block}.{bias}",
            tuple(f"{place.format(block=block)}.{one}" for one in inputs),
            f"{place.format(block=block)}.{down}",
        )
        for inputs, down in _PROJECTIONS
        for place in _PLACES
    )


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """An expert that takes every token; `gate` names a module [1, H] whose sigmoid multiplies its result."""

    mlp: MlpConfig
    gate: str | None = None


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """`experts` of one width, of which the router chooses; `selection_bias`: a vector beside the router.

    `names` are the ways in which they may be stored: the first that the checkpoint has, or else the first of all.
    `bias`: of the router and of each expert. `in_turn` and `transposed` as in Need: the former where gate and up are
    one.
    """

    experts: int
    width: int
    routing: Routing
    names: tuple[MoeNames, ...] = field(repr=False)
    activation: Activation = Activation()
    selection_bias: bool = False
    shared: SharedConfig | None = None
    bias: Bias = "no"
    in_turn: bool = False
    transposed: bool = False

    def _names(self, layer: str, stored: Container[str]) -> MoeNames:
        first = (one for one in self.names if f"{layer}.{one.inputs[0].format(0)}" in stored)
        return next(first, self.names[0])

    def modules(self, layer: str, hidden: int, stored: Container[str]) -> Iterator[Need]:
        names = self._names(layer, stored)
        router = f"{layer}.{names.router}"
        yield Need(router, "router", (self.experts, hidden), bias=self.bias)
        if self.selection_bias:
            yield Need(f"{layer}.{names.bias}", "other", (self.experts,), owner=router)
        together = len(names.inputs) == 1
        rows = (2 if together else 1) * self.width
        in_turn = self.in_turn and together
        *inputs, down = (f"{layer}.{name}" for name in (*names.inputs, names.down))
        for expert in range(self.experts):
            for name in inputs:
                one = name.format(expert)
                yield Need(one, "expert", (rows, hidden), False, self.bias, in_turn=in_turn, transposed=self.transposed)
            one = down.format(expert)
            yield Need(one, "expert", (hidden, self.width), False, self.bias, transposed=self.transposed)
        if self.shared is not None:
            yield from self.shared.mlp.modules(layer, hidden, stored)
            if self.shared.gate is not None:
                yield Need(f"{layer}.{self.shared.gate}", "linear", (1, hidden))

    def make(self, layer: str, params: Mapping[str, Any], ops: Ops) -> Moe:
        names = self._names(layer, params)

        def param(name: str) -> Any:
            return params[f"{layer}.{name}"]

        experts = [
            Expert(tuple(param(name.format(number)) for name in names.inputs), param(names.down.format(number)))
            for number in range(self.experts)
        ]
        router = Router(self.routing, param(names.router), param(names.bias) if self.selection_bias else None, ops)
        shared = None
        if self.shared is not None:
            gate = param(self.shared.gate) if self.shared.gate is not None else None
            shared = SharedExpert(self.shared.mlp.make(layer, params, ops), gate, ops)
        return Moe(router, experts, self.activation, shared, ops)


FeedForward = MlpConfig | MoeConfig
