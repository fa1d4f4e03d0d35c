"""The KV cache: pages of 16 entries, handed out to sequences, for every layer at once.

A page id means the same page in the arrays of every layer, so one block table serves them all:

    page id        0    1    2    3    4    5 …                       layer 0  keys [pages, heads, 16, width]
    sequence 7     ^         ^                   entries 0-15, 16-…            values, of their own width
    sequence 9          ^         ^    ^                              layer 1  …

Arrays grow by doubling up to `max_pages`. Nothing here knows requests, prompts or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewbits.kernels.batch import Batch, CacheDtype, CacheLayer, LayerCache

PAGE_SIZE = 16

_STORED: dict[CacheDtype, Any] = {
    "f32": np.float32,
    "bf16": np.uint16,
    "f16": np.uint16,
    "fp8": np.uint8,
    "int8": np.int8,
}


class CacheFull(Exception):
    """No page is left. The scheduler frees a sequence or waits; nothing was changed."""


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)
    table: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int32))  # `pages`, as an array


class Part(NamedTuple):
    """A sequence's share of a batch: its new tokens, and of how many of the last logits are wanted. `ahead` entries
    more are appended behind these, for passes that follow at once (`Ops.ahead`).
    """

    sequence: int
    token_ids: Sequence[int]
    logits: int = 1
    ahead: int = 0


class KVCache:
    """Keys and values of all layers by sequence: the caller's integer, known from its first append on."""

    def __init__(self, layers: Sequence[CacheLayer], max_pages: int, page_size: int = PAGE_SIZE) -> None:
        """`max_pages` bounds the memory: max_pages x page_size entries over all sequences."""
        self.page_size = page_size
        self.max_pages = max_pages
        self.specs = tuple(layers)
        self.layers = [self._empty(spec) for spec in self.specs]
        self._pages = 0  # pages that the arrays hold
        self._free: list[int] = []
        self._sequences: dict[int, _Sequence] = {}

    @property
    def groups(self) -> dict[CacheLayer, list[int]]:
        """Layers by what they keep (scales apart): heads, width, dtype and window."""
        groups: dict[CacheLayer, list[int]] = {}
        for index, spec in enumerate(self.specs):
            same = replace(spec, k_scale=None, v_scale=None)
            groups.setdefault(same, []).append(index)
        return groups

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in all layers."""
        return sum(spec.token_bytes for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(array.nbytes for layer in self.layers for array in layer.per_entry())

    @property
    def free_pages(self) -> int:
        """Pages that can still be handed out."""
        return self.max_pages - self._pages + len(self._free)

    def length(self, sequence: int) -> int:
        """Entries of a sequence; 0 for one that isn't here."""
        found = self._sequences.get(sequence)
        return found.length if found else 0

    def pages_needed(self, sequence: int, count: int) -> int:
        """New pages that appending `count` entries would take."""
        found = self._sequences.get(sequence)
        length, owned = (found.length, len(found.pages)) if found else (0, 0)
        return max(-(-(length + count) // self.page_size) - owned, 0)

    def append(self, sequence: int, count: int) -> NDArray[Any]:
        """Make room for `count` entries at the end of a sequence. Returns their slots, int64 [count].

        Raises CacheFull, and then has changed nothing.
        """
        begin, entry = self._extend(sequence, count)
        return self._slots(entry, np.arange(begin, entry.length))

    def _extend(self, sequence: int, count: int) -> tuple[int, _Sequence]:
        """Room for `count` entries more: how many there were, and the sequence."""
        needed = self.pages_needed(sequence, count)
        if needed:
            self._provide(needed)
        entry = self._sequences.get(sequence)
        if entry is None:  # setdefault would make one for every append
            entry = self._sequences[sequence] = _Sequence()
        if needed:
            entry.pages += [self._free.pop() for _ in range(needed)]
            entry.table = np.array(entry.pages, np.int32)
        begin, entry.length = entry.length, entry.length + count
        return begin, entry

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all entries from `length` on; pages that hold nothing any more are free again."""
        entry = self._sequences[sequence]
        if not 0 <= length <= entry.length:
            raise ValueError(f"sequence {sequence} has {entry.length} entries, not {length}")
        entry.length = length
        keep = -(-length // self.page_size)
        if keep < len(entry.pages):
            self._free += reversed(entry.pages[keep:])
            del entry.pages[keep:]
            entry.table = entry.table[:keep]

    def move(self, sequence: int, begin: int, kept: Sequence[int]) -> None:
        """Keep, from entry `begin` on, only the entries `kept` (increasing), close up, forget the rest.

        This is how the accepted path of a draft tree becomes the end of its sequence.
        """
        entry = self._sequences[sequence]
        source = np.asarray(kept, np.int64)
        ordered = np.concatenate(([begin - 1], source, [entry.length]))
        if (np.diff(ordered) <= 0).any():
            raise ValueError(f"entries {list(kept)} aren't increasing within [{begin}, {entry.length})")
        target = np.arange(begin, begin + len(source))
        changed = source != target
        from_page, from_row = np.divmod(self._slots(entry, source[changed]), self.page_size)
        to_page, to_row = np.divmod(self._slots(entry, target[changed]), self.page_size)
        for layer in self.layers:
            for array in layer.per_entry():
                array[to_page, :, to_row] = array[from_page, :, from_row]
        self.truncate(sequence, begin + len(source))

    def free(self, sequence: int) -> None:
        """Forget a sequence; one that isn't here is no error."""
        entry = self._sequences.pop(sequence, None)
        if entry:
            self._free += reversed(entry.pages)

    def block_table(self, sequences: Sequence[int]) -> NDArray[Any]:
        """Pages of the sequences in order, int32 [S, most pages of one], padded with 0."""
        entries = [self._sequences[sequence] for sequence in sequences]
        if len(entries) == 1:
            return entries[0].table[np.newaxis]
        table = np.zeros((len(entries), max((len(entry.pages) for entry in entries), default=0)), np.int32)
        for row, entry in zip(table, entries, strict=True):
            row[: len(entry.pages)] = entry.table
        return table

    def batch(self, parts: Sequence[Part]) -> Batch:
        """Append the parts' tokens and describe them to `forward`. Positions are the entries' numbers.

        Raises CacheFull, and then has changed nothing.
        """
        if sum(self.pages_needed(part.sequence, len(part.token_ids) + part.ahead) for part in parts) > self.free_pages:
            raise CacheFull
        # Lists of numbers: NumPy's operations on arrays of one take a microsecond each, which small models feel.
        size = self.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        start, kv_len = [0], []
        for part in parts:
            begin, entry = self._extend(part.sequence, len(part.token_ids) + part.ahead)
            new, pages = range(begin, entry.length - part.ahead), entry.pages
            tokens += part.token_ids
            positions += new
            slots += [pages[place // size] * size + place % size for place in new]
            start.append(len(tokens))
            kv_len.append(entry.length - part.ahead)
            wanted += range(len(tokens) - part.logits, len(tokens))
        return Batch(
            token_ids=np.array(tokens, np.int64),
            positions=np.array(positions, np.int64),
            slots=np.array(slots, np.int64),
            query_start=np.array(start, np.int32),
            kv_len=np.array(kv_len, np.int32),
            block_table=self.block_table([part.sequence for part in parts]),
            logit_rows=np.array(wanted, np.int64),
        )

    def _slots(self, entry: _Sequence, indices: NDArray[Any]) -> NDArray[Any]:
        pages, rows = np.divmod(indices, self.page_size)
        slots: NDArray[Any] = entry.table[pages].astype(np.int64) * self.page_size + rows
        return slots

    def _provide(self, needed: int) -> None:
        """See to it that `needed` pages are in the free list."""
        if needed > self.free_pages:
            raise CacheFull
        if needed <= len(self._free):
            return
        pages = min(max(2 * self._pages, self._pages + needed - len(self._free), 8), self.max_pages)
        for layer in self.layers:
            layer.keys, layer.values = _grown(layer.keys, pages), _grown_or_none(layer.values, pages)
            if layer.dtype == "int8":
                layer.k_scale, layer.v_scale = (
                    _grown_or_none(scale, pages) for scale in (layer.k_scale, layer.v_scale)
                )
            layer.generation += 1
        self._free = list(range(pages - 1, self._pages - 1, -1)) + self._free
        self._pages = pages

    def _empty(self, spec: CacheLayer) -> LayerCache:
        shape = (0, spec.heads, self.page_size)
        stored = _STORED[spec.dtype]
        scales = [None if scale is None else np.array(scale, np.float32) for scale in (spec.k_scale, spec.v_scale)]
        for scale in scales:
            if (spec.dtype == "fp8") != (scale is not None) or (scale is not None and scale.shape != (spec.heads,)):
                raise ValueError("fp8 layers, and only they, have one k_scale and one v_scale per head")
        if spec.dtype == "int8":
            scales = [np.empty(shape, np.float32) for _ in scales]
        keys, values = (np.empty((*shape, width), stored) for width in (spec.width, spec.value_width))
        if spec.kind == "latent":
            return LayerCache(keys, None, spec.dtype, self.page_size, scales[0], None)
        return LayerCache(keys, values, spec.dtype, self.page_size, scales[0], scales[1])


def _grown_or_none(array: NDArray[Any] | None, pages: int) -> NDArray[Any] | None:
    return None if array is None else _grown(array, pages)


def _grown(array: NDArray[Any], pages: int) -> NDArray[Any]:
    larger = np.empty((pages, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
