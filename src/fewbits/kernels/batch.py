"""What one forward pass works on: the new tokens of some sequences, and the cache of one layer.

A cache is pages of `page_size` entries. Sequence s owns the pages `block_table[s]`, in order; its entry j
(the key and value of its j-th token) lies in page block_table[s, j // page_size], row j % page_size:

    keys    [pages, kv_heads, page_size, head_dim]
    values  [pages, kv_heads, page_size, value_dim], or none: the first value_dim numbers of keys, which are latents
    slot    page * page_size + row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

CacheDtype = Literal["f32", "bf16", "f16", "fp8", "int8"]

CACHE_BYTES: dict[CacheDtype, int] = {"f32": 4, "bf16": 2, "f16": 2, "fp8": 1, "int8": 1}


@dataclass(slots=True, eq=False)
class Batch:
    """T new tokens of S sequences; the tokens of a sequence are neighbours and are its last cache entries.

    `token_ids`, `positions` and `slots` are int64 [T]; `query_start` int32 [S + 1], the first token of each
    sequence; `kv_len` int32 [S], entries of each sequence with the new ones; `block_table` int32 [S,
    max_pages]; `logit_rows` int64 [R], the tokens whose logits are wanted. With `mask` (uint8 [T, T], draft
    trees) token t sees the entries before the batch's and those tokens t' of the batch where mask[t, t']
    isn't 0; without one, the new tokens of a sequence are a chain.
    """

    token_ids: NDArray[Any]
    positions: NDArray[Any]
    slots: NDArray[Any]
    query_start: NDArray[Any]
    kv_len: NDArray[Any]
    block_table: NDArray[Any]
    logit_rows: NDArray[Any]
    mask: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one attention layer keeps: per token `heads` keys of `width` numbers and values of `value_width`, by default
    as many.

    `window` is how far back the layer looks (0: everything). `k_scale`, `v_scale` are set for fp8: one
    multiplier per head; int8 has one per token and head, which the cache computes and keeps. Layers that are
    equal but for their scales form a group of the cache. A `latent` layer keeps no values: they are the first numbers
    of its keys.
    """

    heads: int
    width: int
    dtype: CacheDtype
    window: int = 0
    k_scale: tuple[float, ...] | None = None
    v_scale: tuple[float, ...] | None = None
    kind: Literal["kv", "latent"] = "kv"
    value_width: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_width", self.value_width or self.width)

    @property
    def token_bytes(self) -> int:
        widths = (self.width,) if self.kind == "latent" else (self.width, self.value_width)
        scale_bytes = 4 if self.dtype == "int8" else 0
        return self.heads * sum(width * CACHE_BYTES[self.dtype] + scale_bytes for width in widths)


@dataclass(slots=True, eq=False)
class LayerCache:
    """The arrays of one layer: float32, uint16 (bf16 and f16 bit patterns), uint8 (e4m3) or int8.

    Growing replaces them; whoever keeps addresses asks again when `generation` has changed.
    value = code x scale: `k_scale` and `v_scale` are float32 [kv_heads] for fp8, [pages, kv_heads, page_size] for
    int8, where storing an entry sets its scale to max |x| / 127, and None for floats.
    """

    keys: NDArray[Any]
    values: NDArray[Any] | None
    dtype: CacheDtype
    page_size: int
    k_scale: NDArray[Any] | None = None
    v_scale: NDArray[Any] | None = None
    generation: int = 0

    def per_entry(self) -> list[NDArray[Any]]:
        """The arrays [pages, kv_heads, page_size, …], which hold something of every entry."""
        arrays = (self.keys, self.values, *([self.k_scale, self.v_scale] if self.dtype == "int8" else []))
        return [array for array in arrays if array is not None]


class Cache(Protocol):
    """What a forward pass needs of a cache: the arrays of its layers, in order."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...
