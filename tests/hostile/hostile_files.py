"""Folders, JSON, headers and indexes that lie."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, but, config_of, entry, good, header_of, in_data, odd, seen, stranger, tensors_of, with_text
from make import BF16, file_bytes, llama, llama_tensors, safetensors_bytes, write

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00001.safetensors"
ONE = {"a.weight": entry("U8", [8], 8)}


def replaced_by(name: str, make: Any) -> Any:
    """The good folder whose file `name` is something else now: a pipe, a folder, a link."""

    def build(folder: Path) -> None:
        good(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return build


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def gigabyte(path: Path) -> None:
    """Takes no room on the disk."""
    path.touch()
    os.truncate(path, 1 << 30)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(bytes(100))


def index_of(weight_map: Any, *shards: dict[str, Any]) -> Any:
    def build(folder: Path) -> None:
        write(folder, llama_tensors(), llama(), shards=[llama_tensors()])
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return build


def two_shards(first: bytes, second: bytes) -> Any:
    def build(folder: Path) -> None:
        write(folder, {}, {})
        (folder / "model.safetensors").unlink()
        (folder / "model-1.safetensors").write_bytes(first)
        (folder / "model-2.safetensors").write_bytes(second)

    return build


def named(*names: str) -> Any:
    return tensors_of({name: np.ones((2, 2), BF16) for name in names})


WHOLE = safetensors_bytes({"a.weight": np.ones(8, np.uint8)})

FILES: dict[str, Case] = {
    "nothing at all": seen(lambda folder: folder.mkdir(), "config-absent"),
    "a config that is a folder": seen(replaced_by("config.json", Path.mkdir), "file-unreadable"),
    "a config that is a pipe": seen(replaced_by("config.json", pipe), "file-unreadable"),
    "a config without an end": seen(replaced_by("config.json", endless), "file-unreadable"),
    "a config that points at itself": seen(replaced_by("config.json", loop), "config-absent"),
    "a config of a gigabyte": seen(replaced_by("config.json", gigabyte), "json-invalid"),
    "an empty config": seen(config_of(b""), "json-invalid"),
    "generation_config.json is a pipe": seen(replaced_by("generation_config.json", pipe), "file-unreadable"),
    "generation_config.json is a folder": seen(replaced_by("generation_config.json", Path.mkdir), "file-unreadable"),
    "generation_config.json is a list": seen(with_text("generation_config.json", "[]"), "json-invalid"),
    "weights that are a pipe": seen(replaced_by("model.safetensors", pipe), "shards-missing"),
    "weights that are a folder": seen(replaced_by("model.safetensors", Path.mkdir), "shards-missing"),
    "weights without an end": seen(replaced_by("model.safetensors", endless), "shards-missing"),
    "weights that point at themselves": seen(replaced_by("model.safetensors", loop), "shards-missing"),
    "weights of a gigabyte of zeros": seen(replaced_by("model.safetensors", gigabyte), "header-invalid"),
    "empty weights": seen(with_text("model.safetensors", b""), "header-invalid"),
    "weights that are JSON": seen(with_text("model.safetensors", "{}"), "header-invalid"),
    "pickled weights": seen(
        replaced_by("model.safetensors", lambda path: path.with_name("pytorch_model.bin").write_bytes(b"\x80\x04.")),
        "shards-missing",
    ),
    # JSON
    "deep JSON": seen(config_of(b'{"a":' * 1_000_000), "json-invalid"),
    "deep JSON of lists": seen(config_of(b'{"a":' + b"[" * 3_000_000), "json-invalid"),
    "5,000 digits": seen(config_of(b'{"hidden_size":' + b"9" * 5_000 + b"}"), "json-invalid"),
    "NaN": seen(config_of(b'{"rms_norm_eps": NaN}'), "json-invalid"),
    "a key twice": seen(config_of(b'{"a":1,"a":2}'), "json-invalid"),
    "half a character": seen(config_of(b'{"model_type": "\\ud800"}'), "json-invalid"),
    "no UTF-8": seen(config_of(b'{"model_type": "\xff\xfe"}'), "json-invalid"),
    "no object": seen(config_of(b"[" + b"1," * 1_000_000 + b"1]"), "json-invalid"),
    # Headers
    "a header of 2^63 bytes": seen(header_of({}, length=1 << 63), "header-invalid"),
    "a header of 99 MB in a small file": seen(header_of({}, length=99_000_000), "header-invalid"),
    "a deep header": seen(header_of(b'{"a":' * 1_000_000), "header-invalid"),
    "a header with a key twice": seen(
        header_of(b'{"a":%b,"a":%b}' % ((json.dumps(ONE["a.weight"]).encode(),) * 2)), "header-invalid"
    ),
    "a shape of 2^63": seen(header_of({"a.weight": entry("U8", [1 << 63], 1 << 63)}), "header-invalid"),
    "a shape that overflows": seen(header_of({"a.weight": entry("U8", [1 << 32, 1 << 32, 0], 0)}), "header-invalid"),
    "a negative shape": seen(header_of({"a.weight": entry("U8", [-8, -1], 8)}, bytes(8)), "header-invalid"),
    "100,000 axes": seen(header_of({"a.weight": entry("U8", [7] * 100_000, 7)}), "header-invalid"),
    "offsets backwards": seen(header_of({"a": entry("U8", [8], -8, 8)}, bytes(8)), "header-invalid"),
    "offsets of 5,000 digits": seen(
        header_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}"), "header-invalid"
    ),
    "overlapping tensors": seen(
        header_of({"a": entry("U8", [8], 8), "b": entry("U8", [8], 8)}, bytes(8)), "header-invalid"
    ),
    "a hole": seen(header_of({"a": entry("U8", [8], 8, 4)}, bytes(12)), "header-invalid"),
    "a dtype of no one": seen(header_of({"a": entry("U7", [8], 7)}, bytes(7)), "header-dtype"),
    "a dtype that is an object": seen(header_of({"a": entry({"x": 1}, [8], 8)}, bytes(8)), "header-dtype"),  # type: ignore[arg-type]
    "half a byte": seen(header_of({"a": entry("F4", [3], 2)}, bytes(2)), "header-invalid"),
    "petabytes without data": stranger(header_of({"x.y.weight": entry("BF16", [1 << 27, 1 << 27], 1 << 55)}))._replace(
        header_only=True
    ),
    "a file cut short": seen(but(cut), "file-size"),
    "a file with more than it says": seen(but(longer), "file-size"),
    "10,000 empty tensors": stranger(
        header_of({f"a.{number}.weight": entry("BF16", [0], 0) for number in range(10_000)})
    ),
    # Names
    "a name of a megabyte": seen(header_of({"a" * 1_000_000: entry("U8", [0], 0)}), "header-invalid"),
    "a name that is half a character": seen(
        header_of(b'{"\\udfff":' + json.dumps(entry("U8", [0], 0)).encode() + b"}"), "header-invalid"
    ),
    "names that move the cursor": stranger(named("x.\x1b[2J\x1b]0;owned\x07.weight")),
    "names with a line of their own": stranger(named("x.y.weight\nerror: none")),
    "names that read backwards": stranger(named("x.\u202egnp.weight")),
    "a name of nothing": stranger(named("", ".", ".weight", "..weight")),
    "names like paths": stranger(named("../../x.weight", "/etc/passwd", "C:\\x.weight", "~/.ssh/x.weight")),
    "names that look alike": stranger(
        named(*(unicodedata.normalize(form, "caf\u00e9.weight") for form in ("NFC", "NFD")), "CAF\u00c9.weight")
    ),
    "names that are words of Python": stranger(named("__class__.weight", "{0.__class__}.weight", "%s%n.weight")),
    "names that are words of rich": stranger(named("[red]x[/red].weight", "[/].weight", ":bomb:.weight")),
    # Shards
    "an index out of the folder": seen(index_of({"lm_head.weight": "../model.safetensors"}), "index-invalid"),
    "an index at the root": seen(index_of({"lm_head.weight": "/etc/passwd"}), "index-invalid"),
    "an index of nothing": seen(index_of({"lm_head.weight": "model-9.safetensors"}), "shards-missing"),
    "an index of other tensors": seen(index_of({"nothing.weight": FIRST}), "index-invalid"),
    "an index of numbers": seen(index_of({"lm_head.weight": 1}), "index-invalid"),
    "an index that is a list": seen(index_of([["lm_head.weight", FIRST]]), "index-invalid"),
    "an index that is a pipe": seen(
        lambda folder: (index_of({})(folder), (folder / INDEX).unlink(), pipe(folder / INDEX)), "file-unreadable"
    ),
    "an index of deep JSON": seen(
        lambda folder: (index_of({})(folder), (folder / INDEX).write_text('{"a":' * 100_000)), "json-invalid"
    ),
    "an index that names half of it": odd(index_of({"lm_head.weight": FIRST}), "index-incomplete"),
    "a shard that is another file": seen(
        lambda folder: (
            index_of({"lm_head.weight": FIRST})(folder),
            (folder / FIRST).unlink(),
            (folder / FIRST).symlink_to(folder / "config.json"),
        ),
        "header-invalid",
    ),
    "a tensor in two shards": seen(two_shards(WHOLE, WHOLE), "tensor-twice"),
    "a shard without its data": seen(two_shards(WHOLE, file_bytes({"b.weight": entry("U8", [8], 8)})), "file-size"),
    "a shard cut in its header": seen(two_shards(WHOLE, WHOLE[:40]), "header-invalid"),
    "more than weights": in_data(with_text("model-2.safetensors", b"no file of this model"), ""),
}
