"""How hostile folders are described and made; the tables are in hostile_files, _configs, _tensors and _texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from make import block, file_bytes, integers, llama, llama_tensors, write

Build = Callable[[Path], object]

FOUR = integers(64, 64, 4, 32)
QUANTIZED = block(FOUR.weights, ["re:.*q_proj"])
IDS = ("--prompt-ids", "1,2")


class Case(NamedTuple):
    """One folder. `inspect`: codes of the plan's errors; `run`: the code that ends a run; "" and (): it is fine."""

    build: Build
    inspect: tuple[str, ...]
    run: str
    warning: str = ""  # that the plan must give
    prompt: tuple[str, ...] = IDS
    may_time_out: bool = False  # either is right, it depends on the machine
    header_only: bool = False  # there is nothing to verify


def seen(build: Build, *codes: str) -> Case:
    """What headers and JSON files already show: every command ends with it."""
    return Case(build, tuple(sorted(codes)), codes[0])


def in_data(build: Build, code: str, warning: str = "") -> Case:
    """What only the tensors' data, or other files that `inspect` doesn't read, can show."""
    return Case(build, (), code, warning)


def odd(build: Build, warning: str = "") -> Case:
    """Strange, and fine all the same."""
    return Case(build, (), "", warning)


def stranger(build: Build, warning: str = "") -> Case:
    """A plan without errors of a model that isn't known, so that it doesn't run."""
    return Case(build, (), "family-unknown", warning)


# ---- folders ---------------------------------------------------------------------------------------------------


def good(folder: Path) -> None:
    """A small Llama with one quantized projection."""
    write(folder, llama_tensors(q_proj=FOUR), llama(QUANTIZED))


def but(change: Callable[[Path], object]) -> Build:
    """The good folder with something done to it."""

    def build(folder: Path) -> None:
        good(folder)
        change(folder)

    return build


def with_text(name: str, text: str | bytes | dict[str, Any] | list[Any]) -> Build:
    """The good folder with another file in it."""
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    return but(lambda folder: (folder / name).write_bytes(data))


def config_of(text: bytes) -> Build:
    return lambda folder: write(folder, {}, text)


def header_of(header: Any, data: bytes = b"", **more: Any) -> Build:
    def build(folder: Path) -> None:
        write(folder, {}, {})
        (folder / "model.safetensors").write_bytes(file_bytes(header, data, **more))

    return build


def tensors_of(tensors: dict[str, Any], config: Any = None, **more: Any) -> Build:
    return lambda folder: write(folder, tensors, config or {}, **more)


def configured(**changes: Any) -> Build:
    """The good folder with other values in its config."""
    return lambda folder: write(folder, llama_tensors(q_proj=FOUR), llama(QUANTIZED) | changes)


def quantized(**changes: Any) -> Build:
    """The good folder with other values in its quantization_config."""
    return lambda folder: write(folder, llama_tensors(q_proj=FOUR), llama(QUANTIZED | changes))


def weights(**changes: Any) -> Build:
    """The good folder with other values in its group's `weights`."""
    return quantized(config_groups=block({**(FOUR.weights or {}), **changes}, ["re:.*q_proj"])["config_groups"])


def group(**changes: Any) -> Build:
    """The good folder with other values in its config group."""
    return quantized(config_groups={"group_0": QUANTIZED["config_groups"]["group_0"] | changes})


def with_q(changes: dict[str, Any], quantization: dict[str, Any] | None = None, **more: Any) -> Build:
    """The good folder with other tensors of q_proj by suffix (None: left out), and others by their whole name."""

    def build(folder: Path) -> None:
        tensors = llama_tensors(q_proj=FOUR)
        for suffix, tensor in changes.items():
            whole = suffix.startswith(("model.", "lm_head."))
            name = suffix if whole else f"model.layers.0.self_attn.q_proj.{suffix}"
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        write(folder, tensors, llama(quantization or QUANTIZED), **more)

    return build


def entry(dtype: str, shape: list[int], size: int, begin: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
