"""A layer's cache and its attention, as native code takes them."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fewbits import _native
from fewbits.kernels.batch import LayerCache
from fewbits.kernels.cpu.arrays import Operand, Traced, empty
from fewbits.kernels.ops import AttentionSpec
from fewbits.kernels.rope import RopeTable

Array = NDArray[Any]

_address = _native.address


class NativeCache:
    """The native form of the cache that a layer was last called with."""

    __slots__ = ("_cache", "_generation", "_native")

    def __init__(self) -> None:
        self._cache: LayerCache | None = None
        self._generation = -1
        self._native: Any = None

    def of(self, cache: LayerCache) -> Any:
        if cache is not self._cache or cache.generation != self._generation:
            values, v_scale = cache.values, cache.v_scale
            if values is None:  # keys hold them
                values, v_scale = cache.keys, cache.k_scale
            scales = (0 if scale is None else _address(scale) for scale in (cache.k_scale, v_scale))
            arrays = (_address(cache.keys), _address(values))
            self._native = _native.LayerCache(*arrays, cache.page_size, cache.dtype, *scales)
            self._cache, self._generation = cache, cache.generation
        return self._native


class Attention:
    """`ops.Attention`."""

    def __init__(self, spec: AttentionSpec, table: RopeTable) -> None:
        self._spec = spec
        self._table = table
        self._width = spec.heads * spec.value_dim
        vectors = (spec.q_norm, spec.k_norm, spec.sinks)
        q_norm, k_norm, sinks = (0 if vector is None else _address(vector) for vector in vectors)
        rotary = (spec.rope.begin, spec.rope.rotary_dim, spec.rope.interleaved)
        norms = (q_norm, k_norm, spec.norm_eps, spec.norm_offset)
        sizes = (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim)
        constants: list[Any] = [*sizes, *rotary, *norms, spec.scale, spec.window, sinks]
        self._native: Any = _native.AttentionSpec(*constants)
        self._cache = NativeCache()

    def rope_and_append(self, q: Operand, k: Operand, v: Operand, step: Any, cache: Any) -> None:
        if isinstance(q, Traced):
            q.program.keep(self._spec)
            q.program.rope_and_append(self._native, self._table, q, k, v, cache)
            return
        cos, sin = self._table.upto(step.highest)
        addresses = (_address(q), _address(k), 0 if v is None else _address(v))
        self._native.rope_and_append(*addresses, step, self._cache.of(cache), _address(cos), _address(sin))

    def attend(self, q: Operand, step: Any, cache: Any) -> Operand:
        if isinstance(q, Traced):
            return q.program.attend(self._native, self._width, q, cache)
        out = empty(len(q), self._width)
        self._native.attend(_address(q), _address(out), step, self._cache.of(cache))
        return out
