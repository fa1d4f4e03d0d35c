"""The operations in native code. Arrays are contiguous float32 of NumPy; native functions get addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fewbits import _native
from fewbits.kernels.batch import Batch
from fewbits.kernels.cpu.arrays import Gated, Normed, Operand, Traced, empty, program_of
from fewbits.kernels.cpu.attention import Attention
from fewbits.kernels.cpu.experts import NativeExperts, all_native
from fewbits.kernels.cpu.program import Program, fused
from fewbits.kernels.grouped import GroupedExperts
from fewbits.kernels.last import best_tokens, closed_up
from fewbits.kernels.ops import Activation, ActivationName, AttentionSpec, Chosen, Expert, Experts, Routing
from fewbits.kernels.rope import Rope, RopeTable

Array = NDArray[Any]

_address = _native.address


class CpuOps:
    name = "cpu"

    def __init__(self) -> None:
        self._tables: dict[Rope, RopeTable] = {}

    def vector(self, values: Any) -> Array:
        return np.ascontiguousarray(values, np.float32)

    def norm(self, weight: Array, eps: float, offset: float) -> Callable[[Array], Normed]:
        return lambda x: Normed(x, weight, eps, offset)

    def gate(self, activation: Activation) -> Callable[[Array, Array], Gated]:
        if activation.name not in get_args(ActivationName):
            raise KeyError(activation.name)
        how = (activation.name, activation.limit)
        return lambda gate, up: Gated(gate, up, how)

    def attention(self, spec: AttentionSpec) -> Attention:
        return Attention(spec, self._tables.setdefault(spec.rope, RopeTable(spec.rope)))

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        how = (routing.top_k, routing.score, routing.normalize, routing.epsilon, routing.scale)
        groups = (routing.groups, routing.kept_groups, routing.group_best)
        top_k = routing.top_k

        @cache
        def native(experts: int) -> Any:
            return _native.Routing(experts, *how, *groups, 0 if bias is None else _address(bias))

        def run(logits: Operand) -> Chosen:
            T, E = logits.shape
            if isinstance(logits, Traced):
                logits.program.keep(bias)
                return Chosen(*logits.program.route(native(E), top_k, logits))
            chosen = Chosen(np.empty((T, top_k), np.int32), np.empty((T, top_k), np.float32))
            native(E).route(_address(logits), T, *map(_address, chosen))
            return chosen

        return run

    def experts(self, experts: Sequence[Expert], activation: Activation) -> Experts:
        if all_native(experts):
            return NativeExperts(experts, activation)
        return GroupedExperts(experts, self.gate(activation), np.float32)

    def scale_by_sigmoid(self, x: Operand, gates: Operand) -> None:
        if isinstance(x, Traced):
            x.program.scale_by_sigmoid(x, gates)
            return
        T, heads = gates.shape
        _native.scale_by_sigmoid(_address(x), _address(gates), T, heads, x.shape[1] // heads)

    def add(self, x: Operand, to: Operand) -> None:
        if isinstance(x, Traced):
            x.program.add(x, to)
        else:
            to += x

    def assign(self, x: Operand, to: Operand) -> None:
        if isinstance(to, Traced):
            to.program.assign(x, to)
        else:
            to[:] = np.asarray(x)

    def computed(self, x: Operand) -> Operand:
        program = program_of(x)
        return np.asarray(x) if program is None else program.computed(x)

    def beside(self, *parts: Operand, heads: int = 1) -> Operand:
        program = program_of(parts[0])
        if program is not None:
            return program.beside(parts, heads)
        T, widths = parts[0].shape[0], [part.shape[1] // heads for part in parts]
        joined = empty(T, heads * sum(widths))
        of_heads = joined.reshape(T, heads, sum(widths))
        begin = 0
        for part, width in zip(parts, widths, strict=True):
            of_heads[:, :, begin : begin + width] = np.asarray(part).reshape(T, heads, width)
            begin += width
        return joined

    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> Program | None:
        return fused(block, widths, caches)

    def begin(self, batch: Batch) -> _native.Step:
        lengths = (batch.query_start, batch.kv_len, batch.block_table)
        return _native.Step(batch.slots, batch.positions, *lengths, batch.mask, batch.logit_rows)

    def empty(self, rows: int, width: int) -> Array:
        return empty(rows, width)

    def tokens(self, rows: int, width: int) -> Array:
        return np.empty((rows, width), np.int64)

    def narrow(self, step: Any, *arrays: Operand) -> tuple[Any, ...]:
        program = program_of(arrays[0])
        if program is not None:
            program.narrow(arrays)
            return (step, *arrays)
        rows = step.wanted
        return (step, *arrays) if rows is None else (step.of_last(), *closed_up(arrays, rows))

    def take(self, x: Array, rows: Array) -> Array:
        taken: Array = x.take(rows, axis=0)  # indexing takes several times as long for a row
        return taken

    def copy(self, x: Array) -> Array:
        return x.copy()

    def cut(self, x: Operand, begin: int, end: int, heads: int = 1) -> Operand:
        if isinstance(x, Traced):
            return x.program.cut(x, begin, end, heads)
        T, width = x.shape
        out = empty(T, heads * (end - begin))
        out.reshape(T, heads, end - begin)[:] = x.reshape(T, heads, width // heads)[:, :, begin:end]
        return out

    def ahead(self, step: Any, rows: Sequence[int], page_size: int) -> list[Any]:
        steps: list[Any] = step.ahead(rows, page_size)
        return steps

    def best_tokens(
        self, logits: Operand, ids: Array | None, among: bool, to: Operand, before: Operand, after: Operand
    ) -> None:
        if isinstance(logits, Traced):
            logits.program.best(logits, [] if ids is None else ids.tolist(), among, to, before, after)
        else:
            to[:], share = best_tokens(self, logits, ids, among)
            np.multiply(before, share, after)

    def argmax(self, logits: Array) -> Array:
        R, V = logits.shape
        found = np.empty(R, np.int64)
        _native.argmax(_address(logits), R, V, _address(found))
        return found
