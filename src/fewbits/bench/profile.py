"""Where the time of a pass goes, operation by operation.

A second decoder of the same packed weights is built from operations and kernels that time what they wrap, so that
neither models nor layers know of it. Of blocks that are one call, native code times the steps.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbits.bench.passes import Case, Passes
from fewbits.engine.llm import LLM
from fewbits.kernels import Kernel
from fewbits.kernels.batch import LayerCache
from fewbits.kernels.cpu.program import Program, labelled
from fewbits.kernels.latent import PackedLatents
from fewbits.kernels.ops import (
    Activation,
    Array,
    Attention,
    AttentionSpec,
    Chosen,
    Expert,
    Experts,
    Fused,
    Latents,
    Ops,
    Routing,
)
from fewbits.models.decoder import Decoder, Output

# In the order of the table. Projections that share x are one call, named by all of them; a norm and the gated
# activation are computed in the call that takes their rows in.
OPERATIONS = {
    "embedding": ("embed_tokens",),
    "norm, qkv": ("q_proj", "k_proj", "v_proj", "g_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "norm, q_b, kv_b": ("q_b_proj", "kv_b_proj"),
    "rope, append": (),
    "attend": (),
    "o": ("o_proj",),
    "norm, gate, up": ("gate_proj", "up_proj"),
    "activation, down": ("down_proj",),
    "router": (),
    "experts": (),
    "norm, head": ("lm_head",),
    "rest of forward": (),
    "batch, sampling": (),
}
_FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class Operation:
    """Seconds of one pass, over all layers, and their share of it."""

    name: str
    seconds: float
    share: float


class _Clock:
    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._programs: list[tuple[Program, Any]] = []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            with labelled(name):
                result = call(*arguments, **named)
            self._seconds[name] += time.perf_counter() - begin
            return result

        return wrapper

    def timed_program(self, program: Program) -> Program:
        self._programs.append((program, program.timed()))
        return program

    def clear(self) -> None:
        self._seconds.clear()
        for _, nanoseconds in self._programs:
            nanoseconds[:] = 0

    def seconds(self) -> dict[str, float]:
        total = self._seconds.copy()
        for program, nanoseconds in self._programs:
            for name, one in zip(program.labels, nanoseconds, strict=True):
                if name:
                    total[name] += 1e-9 * float(one)
        return total


class _TimedAttention:
    def __init__(self, attention: Attention, clock: _Clock) -> None:
        self.rope_and_append: Callable[[Array, Array, Array, Any, LayerCache], None] = clock.timed(
            "rope, append", attention.rope_and_append
        )
        self.attend: Callable[[Array, Any, LayerCache], Array] = clock.timed("attend", attention.attend)


class _TimedOps:
    """An `Ops` that times what a layer calls; the rest is the wrapped one's."""

    def __init__(self, ops: Ops, clock: _Clock) -> None:
        self._ops, self._clock = ops, clock
        self.name, self.vector, self.begin, self.take, self.copy = ops.name, ops.vector, ops.begin, ops.take, ops.copy
        self.norm, self.gate, self.argmax = ops.norm, ops.gate, ops.argmax
        self.scale_by_sigmoid, self.add, self.computed = ops.scale_by_sigmoid, ops.add, ops.computed
        self.cut, self.beside, self.assign = ops.cut, ops.beside, ops.assign
        self.empty, self.tokens, self.narrow, self.ahead = ops.empty, ops.tokens, ops.narrow, ops.ahead
        self.best_tokens = ops.best_tokens

    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> Fused | None:
        program = self._ops.fused(block, widths, caches)
        return self._clock.timed_program(program) if isinstance(program, Program) else program

    def attention(self, spec: AttentionSpec) -> Attention:
        return _TimedAttention(self._ops.attention(spec), self._clock)

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        return self._clock.timed("router", self._ops.route(routing, bias))

    def experts(self, experts: Sequence[Expert], activation: Activation) -> Experts:
        return self._clock.timed("experts", self._ops.experts(experts, activation))


class _TimedLatents:
    """`Latents`, both products timed under one name."""

    def __init__(self, latents: Latents, name: str, clock: _Clock) -> None:
        self.taken = clock.timed(name, latents.taken)
        self._latents, self._name, self._clock = latents, name, clock

    def bind(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        into, of = self._latents.bind()
        return self._clock.timed(self._name, into), self._clock.timed(self._name, of)


class _TimedModel:
    """A decoder whose operations are timed, and the whole of each pass with them."""

    def __init__(self, llm: LLM) -> None:
        self.clock = clock = _Clock()
        loaded = llm._loaded
        kernels: dict[tuple[str, str], Kernel] = {}
        kinds = {row.name: row.kind for row in loaded.plan.rows}

        def timed(module: str, param: Any) -> Any:
            name = _operation(module, kinds.get(module))
            if name is None:  # a vector, or an expert's: those are timed together
                return param
            if isinstance(param, PackedLatents):
                return _TimedLatents(param, name, clock)
            kernel, packed = param
            bind: Callable[[Sequence[Any]], Any] = kernel.bind
            wrapped = replace(kernel, bind=lambda weights: clock.timed(name, bind(weights)))
            # One object for weights that share x: those are one call.
            return kernels.setdefault((name, kernel.name), wrapped), packed

        params = {module: timed(module, param) for module, param in loaded.params.items()}
        decoder = Decoder(loaded.decoder.config, params, _TimedOps(loaded.ops, clock))
        self.ops = loaded.ops
        self.forward: Callable[..., Output] = clock.timed(_FORWARD, decoder.forward)


def _operation(module: str, kind: str | None) -> str | None:
    """Where a module's products are counted."""
    if kind in ("router", "expert"):
        return "router" if kind == "router" else None
    last = module.rpartition(".")[2]
    return next((name for name, modules in OPERATIONS.items() if last in modules), None)


def profile(llm: LLM, case: Case, repeats: int) -> list[Operation]:
    """The operations of a pass, means over `repeats` calls of `Passes.seconds`. Their shares add up to 1."""
    model = _TimedModel(llm)
    passes = Passes(llm, case, model)
    passes.seconds()  # the cache grows to its size
    model.clock.clear()
    passes.steps.clear()
    for _ in range(repeats):
        passes.seconds()
    seconds = model.clock.seconds()
    forward = seconds.pop(_FORWARD)
    whole, count = sum(passes.steps), len(passes.steps)
    seconds["rest of forward"] = forward - sum(seconds.values())
    seconds["batch, sampling"] = whole - forward
    return [Operation(name, seconds[name] / count, seconds[name] / whole) for name in OPERATIONS if name in seconds]
