"""A published folder, opened: config.json, the headers of its safetensors files, generation_config.json.

Nothing is interpreted here and no weight is read; `TensorReader` does that later.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fewbits.checkpoint import strict_json
from fewbits.checkpoint.collector import paused
from fewbits.checkpoint.config import Config
from fewbits.checkpoint.files import StoredTensor, TensorInfo, TensorReader, read_header
from fewbits.errors import CheckpointError, Notice

__all__ = ["Checkpoint", "Config", "StoredTensor", "TensorInfo", "TensorReader", "open_checkpoint"]

JSON_LIMIT = 256_000_000  # bytes of an index or a config; a trillion parameters' index has some 20 MB
_SINGLE = ("model.safetensors", "consolidated.safetensors")
_CONFIGS = ("config.json", "params.json")


@dataclass(slots=True)
class Checkpoint:
    """`paths` are the safetensors files that `TensorInfo.file` counts; `config` is the text model's (fields of a
    `text_config` before those of the top level). `header_only`: files without data, for `inspect` alone.
    """

    folder: Path
    config: Config
    tensors: dict[str, TensorInfo]
    paths: list[Path]
    header_only: bool = False
    generation_config: dict[str, Any] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)

    def reader(self, reuse: bool = False) -> TensorReader:
        return TensorReader(self.paths, self.tensors, reuse)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, None where it is missing."""
        return _read_json(self.folder / name)

    def file(self, name: str, limit: int, code: str) -> bytes:
        """A file of the folder. Raises CheckpointError(`code`) where it has more than `limit` bytes."""
        return _read_file(self.folder / name, limit, code)


def _read_file(path: Path, limit: int, code: str) -> bytes:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe or a device may have no end, or nothing at all
            raise CheckpointError("file-unreadable", "can't be read: it isn't a file", module=path.name)
        if state.st_size > limit:
            raise CheckpointError(code, f"it has {state.st_size} bytes, more than {limit}", module=path.name)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError("file-unreadable", f"can't be read: {error.strerror}", module=path.name) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError):  # reading says why
        if not path.exists():
            return None
    return strict_json.parse(_read_file(path, JSON_LIMIT, "json-invalid"), path.name, "json-invalid")


def _read_config(folder: Path) -> Config:
    for name in _CONFIGS:
        data = _read_json(folder / name)
        if data is None:
            continue
        top = Config(data, name)
        text = data.get("text_config")
        if isinstance(text, dict):
            top.ignore("text_config")
            return Config(text, name, "text_config", fallback=top)
        return top
    raise CheckpointError(
        "config-absent",
        "there is no config.json here",
        module=str(folder),
        hint="a checkpoint is the folder that holds config.json and the .safetensors files",
    )


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files, and the index's map where one decides. A single file goes before an index."""
    for name in _SINGLE:
        if os.path.isfile(folder / name):
            return [name], None
    for single in _SINGLE:
        name = single + ".index.json"
        index = _read_json(folder / name)
        if index is None:
            continue
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("index-invalid", "weight_map must map tensors to files", module=name)
        if set(map(type, weight_map.values())) != {str}:
            raise CheckpointError("index-invalid", "weight_map must map tensors to names of files", module=name)
        files = sorted(set(weight_map.values()))
        for file in files:
            if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
                text = f"weight_map names {file!r}, which is not a file of this folder"
                raise CheckpointError("index-invalid", text, module=name)
        return files, weight_map
    return sorted(path.name for path in folder.glob("*.safetensors")), None


@paused()
def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a folder: reads its JSON files and the headers of all its safetensors files.

    Raises CheckpointError: folder-missing, config-absent, json-invalid, shards-missing, index-invalid,
    tensor-twice, and those of `files.read_header`.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError("folder-missing", "is not a folder", module=str(folder))
    config = _read_config(folder)
    names, weight_map = _shards(folder)
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing or not names:
        first = f"{missing[0]} is missing" if missing else "there are no .safetensors files"
        more = f" ({len(missing)} of {len(names)} files)" if len(missing) > 1 else ""
        raise CheckpointError(
            "shards-missing",
            first + more,
            module=str(folder),
            hint="fetch the whole folder; weights in .bin or .pt files are never loaded",
        )

    paths = [folder / name for name in names]
    # Tensor → its file by the index, or what the header says of it once that file was read. One table for both: a
    # million names enter it once.
    tensors: dict[str, Any] = weight_map or {}
    stored = 0
    without_data, with_data, unlisted = [], [], []
    for file, path in enumerate(paths):
        found, header_only = read_header(path, file)
        if header_only:
            without_data.append(path.name)
        elif any(info.nbytes for info in found.values()):
            with_data.append(path.name)
        before = list(map(tensors.get, found))
        if set(before) != {path.name}:
            for name, other in zip(found, before, strict=True):
                if isinstance(other, TensorInfo):
                    text = f"is in {paths[other.file].name} and in {path.name}"
                    raise CheckpointError("tensor-twice", text, module=name)
                if other is None:
                    unlisted.append(name)
                elif other != path.name:
                    raise _misplaced(name, other)
        tensors.update(found)
        stored += len(found)
    if without_data and with_data:
        raise CheckpointError(
            "file-size", f"has a header but no data, while {with_data[0]} has data", module=without_data[0]
        )

    if len(tensors) > stored:
        missing = [name for name, info in tensors.items() if type(info) is str]
        raise _misplaced(min(missing), tensors[min(missing)])
    checkpoint = Checkpoint(folder, config, tensors, paths, bool(without_data))
    if unlisted and weight_map is not None:
        text = f"{len(unlisted)} tensors of the files are not in the index, the first is {min(unlisted)}"
        checkpoint.notices.append(Notice("index-incomplete", "", text))
    checkpoint.generation_config = checkpoint.json("generation_config.json") or {}
    return checkpoint


def _misplaced(name: str, file: str) -> CheckpointError:
    return CheckpointError("index-invalid", f"the index puts it into {file}, which doesn't have it", module=name)
