"""Blocks of a model as one native call.

A block is a function of arrays, a step and layers' caches, written against `ops` and kernels. It is called once with
values that have no numbers: each operation adds its step to a native program (`native/program/program.h`), which every
pass then runs. Python between the operations took 1.1 of 12 ms of a step that reads weights all the time, and two
thirds of one whose model lives in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbits import _native
from fewbits.kernels.cpu.arrays import Array, Rows, Traced, Untraceable, empty
from fewbits.kernels.cpu.attention import NativeCache
from fewbits.kernels.ops import Chain
from fewbits.kernels.rope import RopeTable

_address = _native.address

_label = ""  # of the operation that is being recorded


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Steps that are recorded within get this label."""
    global _label
    before, _label = _label, label
    try:
        yield
    finally:
        _label = before


@dataclass(frozen=True, slots=True)
class TracedCache:
    """A layer's cache, by its place among the block's."""

    number: int


def fused(block: Callable[..., None], widths: Sequence[int], caches: int) -> Program | None:
    """`block(*arrays, step, caches)` of arrays [T, width], or of tokens where the width is 0; None where it does
    something that no step is for.
    """
    program = Program()
    try:
        block(*program.inputs(widths), None, [TracedCache(number) for number in range(caches)])
    except Untraceable:
        return None
    program.finish(caches)
    return program


class Program:
    """The steps of a block. `labels` has one for each."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.nanoseconds: Array | None = None
        self._kept: list[Any] = []
        self._tables: list[RopeTable] = []

    def inputs(self, widths: Sequence[int]) -> list[Traced]:
        self._native = _native.Program(len(widths))
        return [Traced(self, number, width) for number, width in enumerate(widths)]

    def keep(self, owner: Any) -> None:
        """Steps have addresses within `owner`."""
        self._kept.append(owner)

    def value(self, width: int) -> Traced:
        """What the next step makes."""
        return Traced(self, self._native.value(width), width)

    def _step(self, add: Callable[..., None], *arguments: Any) -> None:
        """`add` one of the native program's methods. Values go to it as their numbers."""
        if any(isinstance(one, np.ndarray) for one in arguments):
            raise Untraceable("the numbers of one pass")
        add(*(one.number if isinstance(one, Traced) else one for one in arguments))
        self.labels.append(_label)

    def multiply(self, gemm: Any, x: Traced | Rows, N: Sequence[int], add_to: Traced | None) -> tuple[Traced, ...]:
        source = _native.Source.plain(x.number) if isinstance(x, Traced) else x.source()
        y = tuple(map(self.value, N)) if add_to is None else (add_to,)
        self._step(self._native.multiply, gemm, source, [one.number for one in y], add_to is not None)
        return y

    def computed(self, x: Traced | Rows) -> Traced:
        if isinstance(x, Traced):
            return x
        y = self.value(x.shape[1])
        self.assign(x, y)
        return y

    def assign(self, x: Traced | Rows, to: Traced) -> None:
        width = to.shape[1]
        if isinstance(x, Traced):
            self._step(self._native.copy, x, to, 1, width, 0, width, width, 0)
        else:
            self._step(self._native.compute, x.source(), width, to)

    def rope_and_append(
        self, spec: Any, table: RopeTable, q: Traced, k: Traced, v: Traced | None, cache: TracedCache
    ) -> None:
        if table not in self._tables:
            self._tables.append(table)
        numbers = (cache.number, self._tables.index(table))
        self._step(self._native.rope_and_append, spec, q, k, -1 if v is None else v, *numbers)

    def attend(self, spec: Any, width: int, q: Traced, cache: TracedCache) -> Traced:
        out = self.value(width)
        self._step(self._native.attend, spec, q, out, cache.number)
        return out

    def scale_by_sigmoid(self, x: Traced, gates: Traced) -> None:
        heads = gates.shape[1]
        self._step(self._native.scale_by_sigmoid, x, gates, heads, x.shape[1] // heads)

    def add(self, x: Traced, to: Traced) -> None:
        self._step(self._native.add, x, to, x.shape[1])

    def beside(self, parts: Sequence[Traced | Rows], heads: int) -> Traced:
        values = [self.computed(part) for part in parts]
        counts = [part.shape[1] // heads for part in values]
        y = self.value(heads * sum(counts))
        for index, (part, count) in enumerate(zip(values, counts, strict=True)):
            self._step(self._native.copy, part, y, heads, count, 0, count, sum(counts), sum(counts[:index]))
        return y

    def cut(self, x: Traced, begin: int, end: int, heads: int) -> Traced:
        count = end - begin
        y = self.value(heads * count)
        self._step(self._native.copy, x, y, heads, x.shape[1] // heads, begin, count, count, 0)
        return y

    def route(self, routing: Any, top_k: int, logits: Traced) -> tuple[Traced, Traced]:
        chosen, weights = self.value(top_k), self.value(top_k)
        self._step(self._native.route, routing, logits, chosen, weights)
        return chosen, weights

    def experts(self, experts: Any, x: Traced, chosen: Traced, weights: Traced, add_to: Traced) -> None:
        self._step(self._native.experts, experts, x, chosen, weights, chosen.shape[1], add_to)

    def embed(self, table: Any, tokens: Traced, width: int) -> Traced:
        self.keep(table)
        y = self.value(width)
        self._step(self._native.embed, table.table, tokens, y)
        return y

    def best(self, logits: Traced, ids: Sequence[int], among: bool, to: Traced, before: Traced, after: Traced) -> None:
        self._step(self._native.best, logits, logits.shape[1], ids, among, to, before, after)

    def narrow(self, values: Sequence[Traced]) -> None:
        widths = [value.shape[1] for value in values]
        self._step(self._native.narrow, [value.number for value in values], widths)

    def finish(self, caches: int) -> None:
        self._widths = self._native.widths()
        self._caches = [NativeCache() for _ in range(caches)]

    def timed(self) -> Array:
        """int64, one for each step: from now on its nanoseconds are added up there."""
        self.nanoseconds = np.zeros(len(self.labels), np.int64)
        return self.nanoseconds

    def __call__(self, *arguments: Any) -> None:
        *arrays, step, caches = arguments
        inputs = [_address(array) for array in arrays]
        memory = empty(step.T, sum(self._widths))
        native = self._native_caches(caches)
        self._native.run(inputs, _address(memory), step, native, self._rotations(step.highest), self._times)

    def chain(self, first: Any, chain: Chain, step: Any, caches: Sequence[Any]) -> int:
        """`ops.Fused.chain`; both blocks have the same rotations."""
        inputs = [(_address(array), array.strides[0]) for array in chain.each]
        inputs += [(_address(array), 0) for array in chain.shared]
        memory = empty(step.T, max(sum(self._widths), sum(first._widths)))  # no further pass has more rows
        return self._native.chain(
            first._native,
            [_address(array) for array in chain.arrays],
            inputs,
            _address(memory),
            step,
            chain.rows,
            caches[0].page_size,
            self._native_caches(caches),
            self._rotations(step.highest + len(chain.rows)),
            self._times,
            first._times,
            chain.chances,
            chain.least,
        )

    def _native_caches(self, caches: Sequence[Any]) -> list[Any]:
        return [one.of(cache) for one, cache in zip(self._caches, caches, strict=True)]

    def _rotations(self, highest: int) -> list[tuple[int, int]]:
        """Addresses of cosines and sines up to a position."""
        tables = [table.upto(highest) for table in self._tables]
        return [(_address(cos), _address(sin)) for cos, sin in tables]

    @property
    def _times(self) -> int:
        return 0 if self.nanoseconds is None else _address(self.nanoseconds)
