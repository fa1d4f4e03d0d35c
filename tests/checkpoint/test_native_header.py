"""The native reader of headers takes what the library writes, and gives what the Python reader gives, or nothing."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as library

from fewbits import _native
from fewbits.checkpoint.files import DTYPES, TensorInfo, _parsed
from fewbits.errors import CheckpointError

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("tests/fixtures", "examples") for path in (ROOT / folder).rglob("*.safetensors"))
BITS = {name: bits for name, (bits, _) in DTYPES.items()}


def native(text: bytes) -> tuple[dict[str, TensorInfo], int] | None:
    return _native.read_header(text, BITS, TensorInfo, 3, 8 + len(text))


def python(text: bytes) -> tuple[dict[str, TensorInfo], int] | None:
    try:
        return _parsed(Path("model.safetensors"), 3, text, 8 + len(text))
    except CheckpointError:
        return None


def same(text: bytes) -> bool:
    """Whether the native reader took it. Compared as text, where 1 isn't True and the order of tensors counts."""
    found = native(text)
    if found is not None:
        assert repr(found) == repr(python(text)), text
    return found is not None


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def written(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """As the library writes it, of any dtype."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + int(np.prod(shape, dtype=object)) * DTYPES[dtype][0] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


SOUND = written(
    {
        "model.embed_tokens.weight": ("BF16", [32, 16]),
        "a.weight_packed": ("I32", [16, 2]),
        "a.weight_scale": ("F8_E4M3", [16, 1]),
        "a.weight_shape": ("I64", [2]),
        "b.weight_packed": ("I32", [16, 2]),
        "b.weight_global_scale": ("F32", []),
        "empty": ("F16", [4, 0, 3]),
        "six": ("F6_E2M3", [2, 4]),
        "eight": ("F4", [2, 1, 1, 1, 1, 1, 1, 1]),
    },
    {"format": "pt", "producer": "[x] {y}: 1,2"},
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_takes_the_header_of_every_real_file(path):
    assert same(header_of(path.read_bytes()))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"a": "1", "b": "2", "c": ""}])
def test_takes_what_the_library_writes(metadata):
    tensors = {"z": np.zeros((2, 3), np.float16), "a": np.zeros((), np.int64), "m.n": np.zeros((0, 4), np.uint8)}
    assert same(header_of(library.save(tensors, metadata)))


def test_what_it_gives():
    header = written({"a": ("F16", [2, 3]), "b": ("U8", []), "c": ("F16", [2, 3])}, {})
    start = 8 + len(header)
    found = native(header)
    assert found == (
        {
            "a": TensorInfo("F16", (2, 3), 3, start, 12),
            "b": TensorInfo("U8", (), 3, start + 12, 1),
            "c": TensorInfo("F16", (2, 3), 3, start + 13, 12),
        },
        start + 25,
    )
    tensors = found[0]
    assert all(type(info) is TensorInfo for info in tensors.values())
    assert tensors["a"].shape is tensors["c"].shape and tensors["a"].dtype is tensors["c"].dtype


def test_it_leaves_what_is_written_otherwise_to_python():
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    other = [
        b'{"a":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"b":' + entry + b"}",
        b'{ "a":' + entry + b"}",
        b'{"a":' + entry + b"}\n",
        b'{"a":' + entry + b',"__metadata__":{}}',
        b'{"__metadata__":{"a":"\\n"},"a":' + entry + b"}",
        b'{"\\u0061":' + entry + b"}",
        '{"ä":'.encode() + entry + b"}",
        b"{}",
        b'{"__metadata__":{"format":"pt"}}',
    ]
    for text in other:
        assert native(text) is None and python(text) is not None, text


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_name_that_stands_twice(name):
    text = written({name: ("U8", [0]), "b": ("U8", [1])})
    assert native(text.replace(b'"b"', f'"{name}"'.encode())) is None


def test_the_tuples_it_makes_are_given_back():
    with pytest.raises(TypeError, match="tuple"):
        _native.read_header(SOUND, BITS, dict, 0, 0)  # type: ignore[type-var]
    native(SOUND)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            native(SOUND)
            native(SOUND.replace(b'"b.weight_packed"', b'"a.weight_packed"'))
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()


def test_any_byte_in_any_place():
    """Half of the header are names and metadata, where another byte often makes another sound header."""
    taken = 0
    for byte in b'\0 "\\{}[]:,.-+eE019aU\x7f\x80\xff':
        for place in range(len(SOUND)):
            taken += same(SOUND[:place] + bytes([byte]) + SOUND[place + 1 :])
            taken += same(SOUND[:place] + bytes([byte]) + SOUND[place:])
    assert taken > 1000
    assert not any(map(same, (SOUND[:place] for place in range(len(SOUND)))))


_PARTS = st.sampled_from(
    [b"", b"0", b"00", b"-1", b"1e1", b"1.0", b"true", b"null", b"9" * 18, b"9" * 19, b"4294967296,4294967296"]
    + [b"[]", b"{}", b"\\u0061", "ä".encode(), b"\xed\xa0\x80", b'"a":1,', b'"__metadata__":{},', b'"shape":[],']
    + [b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"x":{"dtype":"U8","shape":[0,9],"data_offsets":']
)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A sound header with parts cut out, moved, doubled, exchanged or put in, mostly at the seams of its JSON."""
    text = SOUND + b" " * draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 3))):
        seams = [place for place, byte in enumerate(text) if byte in b'"{}[]:,'] or [0]
        place = st.sampled_from(seams) | st.integers(0, len(text))
        begin, end, to = sorted((draw(place), draw(place))) + [draw(place)]
        kind = draw(st.sampled_from(["cut", "double", "move", "put", "exchange"]))
        part = text[begin:end]
        if kind == "cut":
            text = text[:begin] + text[end:]
        elif kind == "double":
            text = text[:end] + part + text[end:]
        elif kind == "move":
            rest = text[:begin] + text[end:]
            text = rest[:to] + part + rest[to:]
        elif kind == "put":
            text = text[:to] + draw(_PARTS) + text[to:]
        else:
            text = text[:begin] + draw(_PARTS) + text[end:]
    return text


@settings(max_examples=3000)
@given(changed())
def test_a_changed_header(text):
    same(text)


_NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=12)


@given(
    tensors=st.dictionaries(
        _NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([*DTYPES]), st.lists(st.integers(0, 1 << 10).map(lambda size: 8 * size), max_size=4)),
        min_size=1,
        max_size=8,
    ),
    metadata=st.none() | st.dictionaries(_NAMES, _NAMES, max_size=3),
    spaces=st.integers(0, 7),
)
def test_takes_all_tensors_with_plain_names(tensors, metadata, spaces):
    tensors = {name: (dtype, shape or [8]) for name, (dtype, shape) in tensors.items()}
    assert same(written(tensors, metadata) + b" " * spaces)
