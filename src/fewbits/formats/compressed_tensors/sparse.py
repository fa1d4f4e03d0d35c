"""Sparse tensors: a bit for every place and the values of those that are kept. They are expanded when they are read.

    <tensor>.bitmask      uint8 [R, ceil(C/8)]: bit i of byte j, lowest first, keeps column 8j + i
    <tensor>.compressed   the kept values, row by row: [count], or [R, C/2] where two of four are kept (2:4)
    <tensor>.shape        [R, C]
    <tensor>.row_offsets  [R]: where each row begins among the values; not beside 2:4

<tensor> is any tensor of a model up to 0.8, vectors too (q_proj.weight.bitmask, norm.weight.bitmask); since 0.9 only
weights are stored so, and their own name is left out (q_proj.bitmask).
Source: compressed_tensors/compressors/sparse_compressors/*.py, versions 0.5 to 0.14.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import CheckpointError
from fewbits.formats.resolved import Arrays, StoredModule
from fewbits.formats.stored import Mismatch

Array = NDArray[Any]

_PARTS = ("compressed", "bitmask", "row_offsets", "shape")
_BITS_AT_ONCE = 1 << 22  # of a mask, unpacked to a byte each
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def prefixes(suffixes: Iterable[str]) -> dict[str, str]:
    """Tensor → what the suffixes of its parts begin with: {"weight": ""}, {"weight": "weight.", "bias": "bias."}."""
    masks = [suffix for suffix in suffixes if suffix.rpartition(".")[2] == "bitmask"]
    return {mask.removesuffix("bitmask").rstrip(".") or "weight": mask.removesuffix("bitmask") for mask in masks}


def expanded(module: StoredModule) -> StoredModule:
    """The module as it is when its sparse tensors are expanded. Raises Mismatch for parts that make no tensor."""
    tensors = dict(module.tensors)
    found = prefixes(tensors)
    for tensor, prefix in found.items():
        parts = {part: tensors.pop(prefix + part) for part in _PARTS if prefix + part in tensors}
        if tensor in tensors or tensor in _PARTS:
            raise Mismatch(f"{tensor} is stored sparse and whole, or in parts of parts")
        missing = [prefix + part for part in _PARTS[:2] + _PARTS[3:] if part not in parts]
        if missing:
            raise Mismatch(f"{prefix}bitmask is stored without {' and '.join(missing)}")
        dtype = parts["compressed"].dtype
        shape = _shape(module, tensor, prefix, parts)
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype][0] // 8
        tensors[tensor] = TensorInfo(dtype, shape, 0, 0, nbytes)

    def peek(suffix: str) -> Array | None:
        if suffix not in found:
            return module.peek(suffix)
        names = [found[suffix] + part for part in _PARTS if found[suffix] + part in module.tensors]
        arrays = {name: array for name in names if (array := module.peek(name)) is not None}
        return Expanded(module.name, arrays)[suffix] if len(arrays) == len(names) else None

    return module._replace(tensors=tensors, peek=peek)


def stored(suffixes: Iterable[str], module: StoredModule) -> tuple[str, ...]:
    """Suffixes of the expanded module → those of the stored one."""
    found = prefixes(module.tensors)
    names: list[str] = []
    for suffix in suffixes:
        if suffix in found:
            names += [found[suffix] + part for part in _PARTS if found[suffix] + part in module.tensors]
        else:
            names.append(suffix)
    return tuple(names)


def _shape(module: StoredModule, tensor: str, prefix: str, parts: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Of the whole tensor. Its last axis is known to a multiple of 8, the rest is in a few bytes of data."""
    mask, values, shape = parts["bitmask"], parts["compressed"], parts["shape"]
    dimensions = len(mask.shape)
    if mask.dtype != "U8" or dimensions not in (1, 2):
        raise Mismatch(f"{prefix}bitmask is {mask.dtype} {list(mask.shape)}, not rows of bytes")
    if shape.dtype not in ("I64", "I32") or shape.shape not in ((dimensions,), (dimensions, 1)):
        raise Mismatch(f"{prefix}shape is {shape.dtype} {list(shape.shape)}, not {dimensions} integers")
    rows, width = mask.shape[:-1], mask.shape[-1]
    offsets = parts.get("row_offsets")
    if offsets is not None and (offsets.dtype not in ("I64", "I32") or offsets.shape != rows):
        raise Mismatch(f"{prefix}row_offsets is {offsets.dtype} {list(offsets.shape)}, not {list(rows)} integers")
    if DTYPES[values.dtype][0] < 8 or len(values.shape) not in (1, dimensions) or values.shape[:-1] not in ((), rows):
        raise Mismatch(f"{prefix}compressed is {values.dtype} {list(values.shape)}, the bitmask {list(mask.shape)}")
    expected = module.expected[1] if module.expected is not None and tensor == "weight" else None
    if len(values.shape) == 2:
        columns = 2 * values.shape[1]
    elif expected is not None and -(-expected // 8) == width:
        columns = expected
    else:
        data = module.peek(f"{prefix}shape")
        columns = width * 8 if data is None else int(data.reshape(-1)[-1])
    if -(-columns // 8) != width:
        raise Mismatch(f"{prefix}shape says {columns} columns, the bitmask is {width} bytes wide")
    return (*rows, columns)


class Expanded(Mapping[str, Array]):
    """A module's arrays by suffix, with the sparse ones expanded, each when it is asked for.

    `shapes` are those that the headers made of them, where it is known.
    """

    def __init__(self, module: str, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._module = module
        self._arrays = arrays
        self._shapes = shapes or {}
        self._prefixes = prefixes(arrays)
        parts = {prefix + part for prefix in self._prefixes.values() for part in _PARTS}
        self._names = [name for name in arrays if name not in parts] + list(self._prefixes)

    def __getitem__(self, suffix: str) -> Array:
        if suffix not in self._prefixes:
            return self._arrays[suffix]
        prefix = self._prefixes[suffix]
        parts = {part: self._arrays[prefix + part] for part in _PARTS if prefix + part in self._arrays}
        return _expand(f"{self._module}.{prefix}", parts, self._shapes.get(suffix))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _expand(prefix: str, parts: Mapping[str, Array], wanted: tuple[int, ...] | None) -> Array:
    """The whole tensor. Raises CheckpointError sparse-invalid where its parts contradict each other."""
    mask, values = parts["bitmask"], parts["compressed"]
    shape = tuple(int(size) for size in parts["shape"].reshape(-1))
    # Checked before memory is taken: a tensor has at most eight values for each byte of its mask.
    if shape[:-1] != mask.shape[:-1] or -(-shape[-1] // 8) != mask.shape[-1] or shape != (wanted or shape):
        text = f"says {list(shape)}, the bitmask has {list(mask.shape)} bytes"
        text += f", the other tensors make it {list(wanted)}" if wanted else ""
        raise CheckpointError("sparse-invalid", text, module=f"{prefix}shape")
    columns = shape[-1]
    mask = mask if mask.ndim == 2 else mask[np.newaxis]
    counts = _ONES[mask].sum(axis=1, dtype=np.int64)
    if columns % 8 and (mask[:, -1] >> (columns % 8)).any():
        raise CheckpointError("sparse-invalid", f"keeps columns beyond {columns}", module=f"{prefix}bitmask")
    row = values.shape[1] if values.ndim == 2 else None
    if counts.sum() != values.size or (row is not None and (counts != row).any()):
        text = f"keeps {int(counts.sum())} values, stored are {list(values.shape)}"
        raise CheckpointError("sparse-invalid", text, module=f"{prefix}bitmask")
    ends = np.cumsum(counts)
    offsets = parts.get("row_offsets")
    if offsets is not None and (offsets.reshape(-1) != ends - counts).any():
        text = "doesn't say where the rows of the bitmask begin"
        raise CheckpointError("sparse-invalid", text, module=f"{prefix}row_offsets")
    flat = np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")
    whole = np.zeros((len(mask), columns), flat.dtype)
    step = max(1, _BITS_AT_ONCE // max(columns, 1))
    for begin in range(0, len(mask), step):
        rows = slice(begin, begin + step)
        kept = np.unpackbits(mask[rows], axis=1, count=columns, bitorder="little").view(bool)
        whole[rows][kept] = flat[ends[begin] - counts[begin] : ends[rows][-1]]
    return whole.view(values.dtype).reshape(shape)
