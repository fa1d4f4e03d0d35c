"""Safetensors files: headers first and strictly, data by `pread`.

    8 bytes: header length n (little endian) | n bytes: JSON {name: {dtype, shape, data_offsets}} | data

The safetensors library can't read header-only files nor give FP8 and FP4 to NumPy; tests hold this reader to it.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits import _native
from fewbits.checkpoint import strict_json
from fewbits.checkpoint.config import shorten
from fewbits.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
_NAME_LIMIT = 4096  # characters; a regular expression's memory grows with the name it is tried on
_ELEMENTS_LIMIT = 1 << 56  # of one tensor, counted without its empty axes: NumPy refuses larger shapes

# Name in the header → (bits, the dtype that `read` gives; sub-byte types come as raw bytes).
DTYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "BOOL": (8, np.dtype(np.bool_)),
    "U8": (8, np.dtype(np.uint8)),
    "I8": (8, np.dtype(np.int8)),
    "U16": (16, np.dtype(np.uint16)),
    "I16": (16, np.dtype(np.int16)),
    "U32": (32, np.dtype(np.uint32)),
    "I32": (32, np.dtype(np.int32)),
    "U64": (64, np.dtype(np.uint64)),
    "I64": (64, np.dtype(np.int64)),
    "F16": (16, np.dtype(np.float16)),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "F32": (32, np.dtype(np.float32)),
    "F64": (64, np.dtype(np.float64)),
    "C64": (64, np.dtype(np.complex64)),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "F8_E4M3FNUZ": (8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "F8_E5M2FNUZ": (8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    "F6_E2M3": (6, np.dtype(np.uint8)),
    "F6_E3M2": (6, np.dtype(np.uint8)),
    "F4": (4, np.dtype(np.uint8)),
}
_BITS = {name: bits for name, (bits, _) in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where a tensor lies: `file` is an index into the checkpoint's files, `begin` counts from its start."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int
    nbytes: int

    def part(self, index: int) -> TensorInfo:
        """What lies at `index` of its first axis, a tensor of one dimension less."""
        nbytes = self.nbytes // self.shape[0]
        return TensorInfo(self.dtype, self.shape[1:], self.file, self.begin + index * nbytes, nbytes)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError("file-unreadable", f"can't be read: {error.strerror}", module=path.name) from None


def _bad_header(path: Path, text: str) -> CheckpointError:
    return CheckpointError("header-invalid", text, module=path.name)


def _entry_bytes(path: Path, name: str, value: Any) -> int:
    """One tensor of a header, checked for itself: dtype, shape, offsets and their agreement. Returns its bytes."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        extra = len(value) != 3
    except (TypeError, KeyError, ValueError):
        raise _bad_header(
            path, f"{shorten(name)} needs dtype, shape and two data_offsets, not {shorten(value)}"
        ) from None
    if extra:
        raise _bad_header(path, f"{shorten(name)} has keys beside dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            "header-dtype", f"{shorten(name)} has the unknown dtype {shorten(dtype)}", module=path.name
        )
    fine = isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int and size >= 0 for size in shape)
    if not fine or math.prod(size or 1 for size in shape) > _ELEMENTS_LIMIT:
        raise _bad_header(path, f"{shorten(name)} has the shape {shorten(shape)}")
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise _bad_header(path, f"{shorten(name)} has the data_offsets {shorten([begin, end])}")
    if math.prod(shape) * DTYPES[dtype][0] != (end - begin) * 8:
        raise _bad_header(
            path,
            f"{shorten(name)}: {dtype} {shape} doesn't take the {end - begin} bytes of its data_offsets",
        )
    if len(name) > _NAME_LIMIT:
        raise _bad_header(path, f"the name of a tensor has {len(name)} characters")
    return end - begin


def _parsed(path: Path, file: int, data: bytes, start: int) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a header in any form, and where the last one ends. Raises for the first that is at fault."""
    if not data.startswith(b"{"):
        raise _bad_header(path, "the header doesn't begin with {")
    header = strict_json.parse(data, path.name, "header-invalid")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad_header(path, "__metadata__ must map strings to strings")
    tensors = {}
    for name, value in header.items():
        nbytes = _entry_bytes(path, name, value)
        begin = start + value["data_offsets"][0]
        tensors[name] = TensorInfo(value["dtype"], tuple(value["shape"]), file, begin, nbytes)
    return tensors, _end_of_data(path, tensors, start)


def _end_of_data(path: Path, tensors: dict[str, TensorInfo], start: int) -> int:
    """Where the last tensor ends. Tensors must follow one another without holes, in whatever order they are listed."""
    position, previous = start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != position:
            problem = "overlaps" if info.begin < position else "leaves a hole after"
            raise _bad_header(path, f"{shorten(name)} {problem} {shorten(previous) if previous else 'the header'}")
        position, previous = position + info.nbytes, name
    return position


def read_header(path: Path, file: int) -> tuple[dict[str, TensorInfo], bool]:
    """All tensors of one file, and whether it is header-only (ends with its header although tensors have bytes).

    Raises CheckpointError: header-invalid, header-dtype, file-size, file-unreadable.
    """
    with _explained(path), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _bad_header(path, f"{size} bytes can't hold a header of {length} bytes and its length")
        data = stream.read(length)
    start = 8 + length
    # As the library writes it, in a seventh of the time; else step by step.
    found = _native.read_header(data, _BITS, TensorInfo, file, start)
    tensors, end = found if found is not None else _parsed(path, file, data, start)
    if end == size or size == start:
        return tensors, end != size
    raise CheckpointError(
        "file-size",
        f"the file has {size} bytes, its header describes {end}",
        module=path.name,
        hint="the download or copy was probably cut short: fetch this file again",
    )


class _Buffer(threading.local):
    """Memory of each thread, which all that it reads in blocks goes through."""

    memory: NDArray[np.uint8] = np.empty(0, np.uint8)


class StoredTensor:
    """A tensor in its file. `stored[begin:end]` reads these rows, in any thread: an array in the stored dtype, good
    until the same thread reads rows of the next.
    """

    _buffer = _Buffer()

    def __init__(self, name: str, info: TensorInfo, path: Path, descriptor: int) -> None:
        self.shape = info.shape
        self.dtype = DTYPES[info.dtype][1]
        self._name, self._begin, self._nbytes = name, info.begin, info.nbytes
        self._path, self._descriptor = path, descriptor

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        begin, end, _ = rows.indices(self.shape[0])
        row = self._nbytes // self.shape[0] if self.shape[0] else 0
        wanted = (end - begin) * row
        if self._buffer.memory.size < wanted:
            self._buffer.memory = np.empty(wanted, np.uint8)
        memory = self._buffer.memory[:wanted]
        self.read_into(memory, begin * row)
        return memory.view(self.dtype).reshape(end - begin, *self.shape[1:])

    def read_into(self, memory: NDArray[np.uint8], offset: int) -> None:
        """Fill `memory` from a byte of the tensor on. Raises CheckpointError where the file ends before."""
        done = 0
        with _explained(self._path):
            while done < memory.size:
                count = os.preadv(self._descriptor, [memory.data[done:]], self._begin + offset + done)
                if count == 0:
                    raise self._cut_short()
                done += count

    def mapped(self) -> NDArray[Any]:
        """All of it, read-only and where it lies in the file. Reading it is a SIGBUS should the file shrink later."""
        before = self._begin % mmap.ALLOCATIONGRANULARITY
        size = before + self._nbytes
        with _explained(self._path):
            try:
                pages = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ, offset=self._begin - before)
            except ValueError:  # longer than the file
                raise self._cut_short() from None
        return np.frombuffer(pages, np.uint8, offset=before).view(self.dtype).reshape(self.shape)

    def _cut_short(self) -> CheckpointError:
        text = f"the file ends inside {self._name}; it has changed"
        return CheckpointError("file-size", text, module=self._path.name)


class TensorReader:
    """Reads tensors by `pread` into memory of its own.

    With `reuse`, arrays live in one buffer that `reset` hands out again: valid until then.
    """

    def __init__(self, paths: list[Path], tensors: dict[str, TensorInfo], reuse: bool = False) -> None:
        self._paths = paths
        self._tensors = tensors
        self._descriptors: dict[int, int] = {}
        self._opening = threading.Lock()
        self._reuse = reuse
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def reset(self, nbytes: int) -> None:
        """Begin a module whose tensors take `nbytes` in all: earlier arrays of a reusing reader are void."""
        self._used = 0
        wanted = nbytes + 64 * 64
        if self._reuse and self._buffer.size < wanted:
            self._buffer = np.empty(wanted, np.uint8)

    def _memory(self, nbytes: int) -> NDArray[np.uint8]:
        if not self._reuse or self._used + nbytes > self._buffer.size:
            return np.empty(nbytes, np.uint8)
        memory = self._buffer[self._used : self._used + nbytes]
        self._used += -(-nbytes // 64) * 64
        return memory

    def read(self, name: str, part: int | None = None) -> NDArray[Any]:
        """The tensor in its stored dtype and shape (sub-byte types: raw bytes, one-dimensional); `part`: what lies
        there along its first axis, and nothing else is read.
        """
        info = self._info(name, part)
        memory = self._memory(info.nbytes)
        self._open(name, info).read_into(memory, 0)
        bits, dtype = DTYPES[info.dtype]
        return memory if bits < 8 else memory.view(dtype).reshape(info.shape)

    def stored(self, name: str, part: int | None = None) -> StoredTensor:
        """The tensor (of bytes at least) or a part, to be read a block of rows at a time while this reader is open."""
        return self._open(name, self._info(name, part))

    def _info(self, name: str, part: int | None) -> TensorInfo:
        return self._tensors[name] if part is None else self._tensors[name].part(part)

    def _open(self, name: str, info: TensorInfo) -> StoredTensor:
        path = self._paths[info.file]
        with self._opening, _explained(path):
            if info.file not in self._descriptors:
                self._descriptors[info.file] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return StoredTensor(name, info, path, self._descriptors[info.file])
