"""The operations in native code. Arrays are contiguous float32 of NumPy; native functions get addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fewbits import _native
from fewbits.kernels.batch import Batch, LayerCache
from fewbits.kernels.cpu.arrays import Gated, Normed, Rows, empty
from fewbits.kernels.cpu.experts import NativeExperts, all_native
from fewbits.kernels.grouped import GroupedExperts
from fewbits.kernels.ops import Activation, ActivationName, AttentionSpec, Chosen, Expert, Experts, Routing
from fewbits.kernels.rope import Rope, RopeTable

Array = NDArray[Any]

_address = _native.address


class Step:
    """A batch as addresses, and the rotations of its positions.

    `batch` is the part of native `attend`'s arguments that describes the sequences.
    """

    def __init__(self, batch: Batch) -> None:
        self._positions = _contiguous(batch.positions, np.int64)
        self._highest = int(self._positions.max(initial=0))
        self._rotations: dict[RopeTable, tuple[int, int, Array, Array]] = {}
        # Addresses are good as long as the arrays live, which this list sees to.
        self._arrays = [
            _contiguous(batch.slots, np.int64),
            _contiguous(batch.query_start, np.int32),
            _contiguous(batch.kv_len, np.int32),
            _contiguous(batch.block_table, np.int32),
        ]
        if batch.mask is not None:
            self._arrays.append(_contiguous(batch.mask, np.uint8))
        self.slots, query_start, kv_len, block_table, *mask = map(_address, self._arrays)
        self.mask = mask[0] if mask else 0
        self.T = len(batch.positions)
        sequences, max_pages = batch.block_table.shape
        positions = _address(self._positions)
        self.batch = (query_start, sequences, kv_len, block_table, max_pages, positions)

    def rotation(self, table: RopeTable) -> tuple[int, int, Array, Array]:
        """Addresses of the cosines and sines [T, rotary_dim / 2], and the arrays."""
        found = self._rotations.get(table)
        if found is None:
            cos, sin = table.rows(self._positions, self._highest)
            found = self._rotations[table] = (_address(cos), _address(sin), cos, sin)
        return found


def _contiguous(array: Array, dtype: Any) -> Array:
    return np.ascontiguousarray(array, dtype)


# Their arguments come in tuples made once, which a type checker can't count.
_rope_and_append: Callable[..., None] = _native.rope_and_append
_attend: Callable[..., None] = _native.attend
_route: Callable[..., None] = _native.route


class Attention:
    def __init__(self, spec: AttentionSpec, table: RopeTable) -> None:
        self._spec = spec
        self._table = table
        self._heads = (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim)
        self._q_norm, self._k_norm, self._sinks = (
            0 if vector is None else _address(vector) for vector in (spec.q_norm, spec.k_norm, spec.sinks)
        )
        self._rotary = (spec.rope.begin, spec.rope.rotary_dim, spec.rope.interleaved)
        self._norms = (self._q_norm, self._k_norm, spec.norm_eps, spec.norm_offset)
        self._cache: LayerCache | None = None
        self._generation = -1
        self._arguments: tuple[Any, ...] = ()

    def _of_cache(self, cache: LayerCache) -> tuple[Any, ...]:
        """The cache's part of both calls' arguments; made anew when the cache is another or has grown."""
        if cache is not self._cache or cache.generation != self._generation:
            values, v_scale = cache.values, cache.v_scale
            if values is None:  # keys hold them
                values, v_scale = cache.keys, cache.k_scale
            scales = (0 if scale is None else _address(scale) for scale in (cache.k_scale, v_scale))
            arrays = (_address(cache.keys), _address(values))
            self._arguments = (*arrays, cache.page_size, cache.dtype, *scales)
            self._cache, self._generation = cache, cache.generation
        return self._arguments

    def rope_and_append(self, q: Array, k: Array, v: Array | None, step: Step, cache: LayerCache) -> None:
        cos, sin, _, _ = step.rotation(self._table)
        _rope_and_append(
            _address(q),
            _address(k),
            0 if v is None else _address(v),
            step.T,
            *self._heads,
            *self._rotary,
            cos,
            sin,
            *self._norms,
            step.slots,
            *self._of_cache(cache),
        )

    def attend(self, q: Array, step: Step, cache: LayerCache) -> Array:
        spec = self._spec
        out = empty(len(q), spec.heads * spec.value_dim)
        _attend(
            _address(q),
            _address(out),
            step.T,
            *self._heads,
            *step.batch,
            *self._of_cache(cache),
            spec.scale,
            spec.window,
            self._sinks,
            step.mask,
        )
        return out


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

        def run(logits: Array) -> Chosen:
            T, E = logits.shape
            chosen = Chosen(np.empty((T, routing.top_k), np.int32), np.empty((T, routing.top_k), np.float32))
            addresses = (0 if bias is None else _address(bias), *map(_address, chosen))
            _route(_address(logits), T, E, *how, *groups, *addresses)
            return chosen

        return run

    def experts(self, experts: Sequence[Expert], activation: Activation) -> Experts:
        if all_native(experts):
            return NativeExperts(experts, activation)
        return GroupedExperts(experts, self.gate(activation), np.float32)

    def scale_by_sigmoid(self, x: Array, gates: Array) -> None:
        T, heads = gates.shape
        _native.scale_by_sigmoid(_address(x), _address(gates), T, heads, x.shape[1] // heads)

    def add(self, x: Array, to: Array) -> None:
        to += x

    def computed(self, x: Array | Rows) -> Array:
        return np.asarray(x)

    def beside(self, *parts: Array | Rows, heads: int = 1) -> Array:
        T, widths = parts[0].shape[0], [part.shape[1] // heads for part in parts]
        joined = empty(T, heads * sum(widths))
        of_heads = joined.reshape(T, heads, sum(widths))
        begin = 0
        for part, width in zip(parts, widths, strict=True):
            of_heads[:, :, begin : begin + width] = np.asarray(part).reshape(T, heads, width)
            begin += width
        return joined

    def begin(self, batch: Batch) -> Step:
        return Step(batch)

    def take(self, x: Array, rows: Array) -> Array:
        taken: Array = x[rows]
        return taken

    def copy(self, x: Array) -> Array:
        return x.copy()

    def cut(self, x: Array, begin: int, end: int, heads: int = 1) -> Array:
        T, width = x.shape
        out = empty(T, heads * (end - begin))
        out.reshape(T, heads, end - begin)[:] = x.reshape(T, heads, width // heads)[:, :, begin:end]
        return out

    def argmax(self, logits: Array) -> Array:
        R, V = logits.shape
        found = np.empty(R, np.int64)
        _native.argmax(_address(logits), R, V, _address(found))
        return found
