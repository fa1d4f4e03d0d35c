"""The operations in NumPy: float64 inside, each token by itself, results rounded once to float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.batch import Batch, LayerCache
from fewbits.kernels.grouped import GroupedExperts
from fewbits.kernels.last import best_tokens, closed_up
from fewbits.kernels.ops import Activation, AttentionSpec, Chosen, Expert, Routing
from fewbits.kernels.rope import Rope, RopeTable

Array = NDArray[Any]

_CACHE_DTYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "fp8": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}


def rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    """float64 [..., H]."""
    wide = x.astype(np.float64)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    scaled: Array = wide / np.sqrt(mean + eps) * (weight.astype(np.float64) + offset)
    return scaled


class Step:
    """A batch with the rotations of its positions."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._highest = int(batch.positions.max(initial=0))
        self._rotations: dict[RopeTable, tuple[Array, Array]] = {}

    def of_last(self) -> Step:
        """The pass of the logit rows by themselves, without their tokens."""
        batch, rows = self.batch, self.batch.logit_rows
        start = np.searchsorted(rows, batch.query_start).astype(np.int32)
        every = np.arange(len(rows))
        return Step(
            replace(
                batch,
                positions=batch.positions[rows],
                slots=batch.slots[rows],
                query_start=start,
                logit_rows=every,
            )
        )

    def rotation(self, table: RopeTable) -> tuple[Array, Array]:
        if table not in self._rotations:
            self._rotations[table] = table.rows(self.batch.positions, self._highest)
        return self._rotations[table]


def rotate(x: Array, cos: Array, sin: Array, rope: Rope) -> Array:
    """x float64 [T, heads, D], cos and sin [T, r / 2] → the same with r channels rotated."""
    begin, half = rope.begin, cos.shape[1]
    cos, sin = cos[:, np.newaxis].astype(np.float64), sin[:, np.newaxis].astype(np.float64)
    first, second = slice(begin, begin + half), slice(begin + half, begin + 2 * half)
    if rope.interleaved:
        first, second = slice(begin, begin + 2 * half, 2), slice(begin + 1, begin + 2 * half, 2)
    rotated = x.copy()
    rotated[:, :, first] = x[:, :, first] * cos - x[:, :, second] * sin
    rotated[:, :, second] = x[:, :, second] * cos + x[:, :, first] * sin
    return rotated


class Attention:
    def __init__(self, spec: AttentionSpec, table: RopeTable) -> None:
        self.spec = spec
        self._table = table

    def rope_and_append(self, q: Array, k: Array, v: Array | None, step: Step, cache: LayerCache) -> None:
        spec = self.spec
        q[:] = self._rotated(q, spec.heads, spec.q_norm, step).reshape(q.shape)
        keys = self._rotated(k, spec.kv_heads, spec.k_norm, step).astype(np.float32)
        page, row = np.divmod(step.batch.slots, cache.page_size)
        for x, array, scale in ((keys, cache.keys, cache.k_scale), (v, cache.values, cache.v_scale)):
            if x is None or array is None:  # keys hold the values
                continue
            entries = x.reshape(len(x), spec.kv_heads, array.shape[3])
            if cache.dtype == "int8":
                assert scale is not None
                array[page, :, row], scale[page, :, row] = _quantized(entries)
            else:
                array[page, :, row] = _stored(entries, cache, scale)

    def _rotated(self, x: Array, heads: int, norm: Array | None, step: Step) -> Array:
        spec = self.spec
        wide = x.astype(np.float64).reshape(len(x), heads, spec.head_dim)
        if norm is not None:
            wide = rms_norm(wide, norm, spec.norm_eps, spec.norm_offset)
        return rotate(wide, *step.rotation(self._table), spec.rope)

    def attend(self, q: Array, step: Step, cache: LayerCache) -> Array:
        spec, batch = self.spec, step.batch
        out = np.empty((len(q), spec.heads * spec.value_dim), q.dtype)
        groups = (spec.kv_heads, spec.heads // spec.kv_heads)
        for sequence in range(len(batch.kv_len)):
            begin, end = batch.query_start[sequence : sequence + 2].tolist()
            length = int(batch.kv_len[sequence])
            pages = batch.block_table[sequence, : -(-length // cache.page_size)]
            keys = _gathered(cache.keys, pages, length, cache, cache.k_scale)
            if cache.values is None:
                values = keys[:, :, : spec.value_dim]
            else:
                values = _gathered(cache.values, pages, length, cache, cache.v_scale)
            # Where the batch's own entries stand, their positions may differ from their numbers (draft
            # trees).
            positions = np.arange(length)
            positions[length - (end - begin) :] = batch.positions[begin:end]
            for token in range(begin, end):
                seen = _seen(batch, sequence, token)
                if spec.window:
                    seen &= batch.positions[token] - positions < spec.window
                query = q[token].astype(np.float64).reshape(*groups, spec.head_dim)
                out[token] = self._head_values(query, keys[:, seen], values[:, seen]).reshape(-1)
        return out

    def _head_values(self, query: Array, keys: Array, values: Array) -> Array:
        """query [kv_heads, group, D], keys [kv_heads, n, D], values [kv_heads, n, V] → [kv_heads, group, V]."""
        logits = query @ keys.swapaxes(1, 2) * self.spec.scale
        top = logits.max(axis=2, keepdims=True)
        sinks = None
        if self.spec.sinks is not None:
            sinks = self.spec.sinks.astype(np.float64).reshape(*logits.shape[:2], 1)
            top = np.maximum(top, sinks)
        weights = np.exp(logits - top)
        total = weights.sum(axis=2, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks - top)
        mixed: Array = weights @ values / total
        return mixed


def _seen(batch: Batch, sequence: int, token: int) -> Array:
    """Which entries of its sequence a token of the batch sees; bool [kv_len]."""
    begin, end = batch.query_start[sequence : sequence + 2].tolist()
    length = int(batch.kv_len[sequence])
    seen = np.zeros(length, bool)
    earlier = length - (end - begin)
    if batch.mask is None:
        seen[: earlier + token - begin + 1] = True
    else:
        seen[:earlier] = True
        seen[earlier:] = batch.mask[token, begin:end] != 0
    return seen


def _stored(x: Array, cache: LayerCache, scale: Array | None) -> Array:
    """x float32 [T, kv_heads, D] as the cache's codes."""
    if scale is not None:
        x = np.clip(x / scale[:, np.newaxis], -448, 448)
    return x.astype(_CACHE_DTYPES[cache.dtype]).view(cache.keys.dtype)


def _quantized(x: Array) -> tuple[Array, Array]:
    """x float32 [T, kv_heads, D] as int8 codes and their scales [T, kv_heads].

    A scale is max |x| / 127, 0 where that would be subnormal, and NaN where a number isn't finite.
    """
    finite = np.asarray(np.isfinite(x).all(axis=2))
    wide = np.where(finite[..., np.newaxis], x, np.float32(0))
    scale = np.abs(wide).max(axis=2) / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 0
    codes = np.rint(wide / np.where(scale == 0, np.float32(np.inf), scale)[..., np.newaxis])
    return codes.astype(np.int8), np.where(finite, scale, np.float32(np.nan))


def _gathered(array: Array, pages: Array, length: int, cache: LayerCache, scale: Array | None) -> Array:
    """The first `length` entries of a sequence, float64 [kv_heads, length, D]."""

    def in_order(paged: Array) -> Array:
        chosen = paged[pages].swapaxes(0, 1)
        return chosen.reshape(chosen.shape[0], -1, *chosen.shape[3:])[:, :length]

    wide: Array = in_order(array.view(_CACHE_DTYPES[cache.dtype])).astype(np.float64)
    if scale is None:
        return wide
    scales = in_order(scale) if cache.dtype == "int8" else scale[:, np.newaxis]
    return wide * scales[..., np.newaxis].astype(np.float64)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and the result 0
        result: Array = 1 / (1 + np.exp(-x.astype(np.float64)))
    return result


def _silu_mul(gate: Array, up: Array, limit: float) -> Array:
    activated, factor = gate * _sigmoid(gate), up.astype(np.float64)
    if limit:
        activated, factor = np.minimum(activated, limit), np.clip(factor, -limit, limit)
    product: Array = (activated * factor).astype(np.float32)
    return product


def _swiglu_oai(gate: Array, up: Array, limit: float) -> Array:
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    product: Array = (gate * _sigmoid(1.702 * gate) * (up + 1)).astype(np.float32)
    return product


def _of_kept_groups(ranks: Array, routing: Routing) -> Array:
    """Ranks [T, experts], -infinity outside the groups that are kept."""
    grouped = ranks.reshape(len(ranks), routing.groups, -1)
    best = -np.sort(-grouped, axis=2)[:, :, : routing.group_best].sum(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, : routing.kept_groups]
    outside = np.full(grouped.shape, -np.inf)
    rows = np.arange(len(ranks))[:, np.newaxis]
    outside[rows, kept] = grouped[rows, kept]
    return outside.reshape(ranks.shape)


def _route(logits: Array, routing: Routing, bias: Array | None) -> Chosen:
    wide = logits.astype(np.float64)
    if routing.score == "softmax":
        exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    else:
        scores = _sigmoid(wide)
    ranks = scores if bias is None else scores + bias.astype(np.float64)
    if routing.groups > 1:
        ranks = _of_kept_groups(ranks, routing)
    experts = np.argsort(-ranks, axis=1, kind="stable")[:, : routing.top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if routing.normalize:
        weights = weights / (routing.epsilon + weights.sum(axis=1, keepdims=True))
    return Chosen(experts.astype(np.int32), (weights * routing.scale).astype(np.float32))


class ReferenceOps:
    name = "reference"

    def __init__(self) -> None:
        self._tables: dict[Rope, RopeTable] = {}

    def vector(self, values: Any) -> Array:
        return np.ascontiguousarray(values, np.float32)

    def norm(self, weight: Array, eps: float, offset: float) -> Callable[[Array], Array]:
        return lambda x: rms_norm(x, weight, eps, offset).astype(np.float32)

    def gate(self, activation: Activation) -> Callable[[Array, Array], Array]:
        function = {"silu": _silu_mul, "swiglu_oai": _swiglu_oai}[activation.name]
        return lambda gate, up: function(gate, up, activation.limit)

    def attention(self, spec: AttentionSpec) -> Attention:
        return Attention(spec, self._tables.setdefault(spec.rope, RopeTable(spec.rope)))

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        return lambda logits: _route(logits, routing, bias)

    def experts(self, experts: Sequence[Expert], activation: Activation) -> GroupedExperts:
        return GroupedExperts(experts, self.gate(activation), np.float64)

    def scale_by_sigmoid(self, x: Array, gates: Array) -> None:
        T, heads = gates.shape
        x[:] = (x.reshape(T, heads, -1) * _sigmoid(gates)[:, :, np.newaxis]).reshape(x.shape)

    def add(self, x: Array, to: Array) -> None:
        to += x

    def assign(self, x: Array, to: Array) -> None:
        to[:] = x

    def computed(self, x: Array) -> Array:
        return x

    def beside(self, *parts: Array, heads: int = 1) -> Array:
        T = len(parts[0])
        of_heads = [part.reshape(T, heads, part.shape[1] // heads) for part in parts]
        return np.concatenate(of_heads, axis=2).reshape(T, sum(part.shape[1] for part in parts))

    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> None:
        """Every operation is a call of its own."""

    def begin(self, batch: Batch) -> Step:
        return Step(batch)

    def empty(self, rows: int, width: int) -> Array:
        return np.empty((rows, width), np.float32)

    def tokens(self, rows: int, width: int) -> Array:
        return np.empty((rows, width), np.int64)

    def narrow(self, step: Step, *arrays: Array) -> tuple[Any, ...]:
        return (step.of_last(), *closed_up(arrays, step.batch.logit_rows.tolist()))

    def take(self, x: Array, rows: Array) -> Array:
        taken: Array = x[rows]
        return taken

    def copy(self, x: Array) -> Array:
        return x.copy()

    def cut(self, x: Array, begin: int, end: int, heads: int = 1) -> Array:
        parts = x.reshape(len(x), heads, x.shape[1] // heads)[:, :, begin:end]
        return parts.reshape(len(x), heads * (end - begin)).copy()

    def argmax(self, logits: Array) -> Array:
        found: Array = logits.argmax(axis=1)
        return found

    def ahead(self, step: Step, rows: Sequence[int], page_size: int) -> list[Step]:
        batch, steps = step.batch, []
        for further, count in enumerate(rows):
            positions, every = batch.kv_len[:count].astype(np.int64) + further, np.arange(count)
            page, row = np.divmod(positions, page_size)
            steps.append(
                Step(
                    Batch(
                        token_ids=np.empty(0, np.int64),  # which no step looks at
                        positions=positions,
                        slots=batch.block_table[every, page].astype(np.int64) * page_size + row,
                        query_start=np.arange(count + 1, dtype=np.int32),
                        kv_len=(positions + 1).astype(np.int32),
                        block_table=batch.block_table[:count],
                        logit_rows=every,
                    )
                )
            )
        return steps

    def best_tokens(
        self, logits: Array, ids: Array | None, among: bool, to: Array, before: Array, after: Array
    ) -> None:
        to[:], share = best_tokens(self, logits, ids, among)
        np.multiply(before, share, after)
