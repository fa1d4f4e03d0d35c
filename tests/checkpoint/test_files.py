"""Headers and data of safetensors files: what the library writes is read alike, what it refuses is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from make import Raw, file_bytes, safetensors_bytes
from safetensors import SafetensorError
from safetensors import numpy as library

from fewbits.checkpoint.files import DTYPES, TensorReader, read_header
from fewbits.errors import CheckpointError

LIBRARY_DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16]
_ARRAYS = st.sampled_from(LIBRARY_DTYPES).flatmap(
    lambda dtype: arrays.arrays(
        np.uint8 if np.dtype(dtype).itemsize == 1 else np.dtype(f"u{np.dtype(dtype).itemsize}"),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
        elements=st.integers(0, 1 if dtype == "bool" else 255),
    ).map(lambda array: array.view(dtype))
)


def put(folder: Path, data: bytes, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refused(folder: Path, data: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(put(folder, data), 0)
    assert caught.value.module == "model.safetensors"
    assert len(str(caught.value)) < 600
    return caught.value


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(
    tensors=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), _ARRAYS, max_size=5),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_reads_what_the_library_writes(folder, tensors, metadata):
    tensors.pop("__metadata__", None)
    # Without a tensor the library writes metadata as JSON that it can't read itself.
    path = put(folder, library.save(tensors, metadata if tensors else None))
    infos, header_only = read_header(path, 3)
    assert not header_only
    assert infos.keys() == tensors.keys()
    for reuse in (False, True):
        with TensorReader([path] * 4, infos, reuse) as reader:
            reader.reset(sum(info.nbytes for info in infos.values()))
            for name, array in tensors.items():
                read = reader.read(name)
                assert (read.dtype, read.shape, infos[name].file) == (array.dtype, array.shape, 3)
                assert read.tobytes() == array.tobytes()


def test_every_dtype_of_the_library_is_known():
    """Its own list, from the words of its error."""
    with pytest.raises(SafetensorError) as caught:
        library.load(file_bytes({"a": entry("NO_SUCH_DTYPE")}, bytes(4)))
    listed = {word.strip("`,. ") for word in str(caught.value).partition("expected one of")[2].split()}
    listed.discard("")
    assert len(listed) > 10
    known = {name for name in listed if name[0].isupper() and name.upper() == name and "_METADATA_" not in name}
    assert known <= DTYPES.keys() | {"C64"}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_floats_of_eight_bits_come_as_their_dtype(folder, dtype):
    path = put(folder, safetensors_bytes({"a": Raw(dtype, (2, 2), bytes([0, 1, 2, 0x38]))}))
    infos, _ = read_header(path, 0)
    with TensorReader([path], infos) as reader:
        read = reader.read("a")
    assert read.shape == (2, 2) and read.dtype == DTYPES[dtype][1] and read.dtype != np.uint8
    assert read.view(np.uint8).tolist() == [[0, 1], [2, 0x38]]


def test_floats_below_a_byte_come_as_raw_bytes(folder):
    path = put(folder, safetensors_bytes({"a": Raw("F4", (2, 3), b"\x12\x34\x56"), "b": Raw("F6_E2M3", (4,), b"abc")}))
    infos, _ = read_header(path, 0)
    with TensorReader([path], infos) as reader:
        assert reader.read("a").tolist() == [0x12, 0x34, 0x56]
        assert reader.read("b").tobytes() == b"abc"


HUGE = 10**4299
BAD_ENTRIES = {
    "no shape": {"dtype": "U8", "data_offsets": [0, 4]},
    "no dtype": {"shape": [4], "data_offsets": [0, 4]},
    "no offsets": {"dtype": "U8", "shape": [4]},
    "a list": ["U8", [4], [0, 4]],
    "a number": 4,
    "null": None,
    "an extra key": entry() | {"strides": [1]},
    "one offset": entry(offsets=[0]),
    "three offsets": entry(offsets=[0, 4, 4]),
    "offsets in an object": entry(offsets={"begin": 0, "end": 4}),
    "offsets in a string": entry(offsets="04"),
    "negative begin": entry(offsets=[-4, 0]),
    "end before begin": entry(offsets=[4, 0]),
    "true as an offset": entry(shape=[1], offsets=[0, True]),
    "floats as offsets": entry(offsets=[0.0, 4.0]),
    "shape as a number": entry(shape=4),
    "shape as an object": entry(shape={"0": 4}),
    "true as a size": entry(shape=[4, True]),
    "a float as a size": entry(shape=[4.0]),
    "a negative size": entry(shape=[-4]),
    "two negative sizes": entry(shape=[-2, -2]),
    "too few bytes": entry(offsets=[0, 3]),
    "too many bytes": entry(offsets=[0, 5]),
    "wrong dtype for its bytes": entry("F32"),
    "half a byte": entry("F4", [3], [0, 2]),
    "a size of 2^63": entry(shape=[1 << 63], offsets=[0, 1 << 63]),
    "sizes that overflow 64 bits": entry(shape=[1 << 32, 1 << 32, 4]),
    "2^63 of nothing": entry(shape=[1 << 63, 0], offsets=[0, 0]),
    "sizes that overflow beside an empty axis": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0]),
    "4300 digits": entry(shape=[HUGE], offsets=[0, HUGE]),
    "offsets of 4300 digits": entry(offsets=[HUGE, HUGE + 4]),
    "nine axes": entry(shape=[1] * 8 + [4]),
    "a hundred thousand axes": entry(shape=[3] * 100_000),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
@pytest.mark.parametrize("data", [bytes(4), b""], ids=["with data", "header only"])
def test_an_entry_that_makes_no_tensor(folder, name, data):
    assert refused(folder, file_bytes({"a.weight": BAD_ENTRIES[name]}, data)).code == "header-invalid"


def test_an_endless_name(folder):
    error = refused(folder, file_bytes({"x" * 5000: entry()}, bytes(4)))
    assert error.code == "header-invalid" and "5000 characters" in error.what


@pytest.mark.parametrize("dtype", ["F80", "", "f32", "U128", "F8_E3M4"])
def test_an_unknown_dtype(folder, dtype):
    error = refused(folder, file_bytes({"a": entry(dtype)}, bytes(4)))
    assert error.code == "header-dtype" and repr(dtype) in error.what


@pytest.mark.parametrize("dtype", [None, 3, ["U8"], {"U8": 1}])
def test_a_dtype_that_is_no_string(folder, dtype):
    assert refused(folder, file_bytes({"a": entry(dtype)}, bytes(4))).code == "header-dtype"


ONE = {"a": entry()}
BAD_FILES = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a length and no header": (100).to_bytes(8, "little"),
    "a header larger than the file": file_bytes(ONE, bytes(4), length=100_000),
    "a header of 2^64 - 1 bytes": file_bytes(ONE, bytes(4), length=(1 << 64) - 1),
    "a header one byte too short": file_bytes(ONE, bytes(4), length=len(file_bytes(ONE)) - 9),
    "a header that ends in the data": file_bytes(ONE, bytes(4), length=len(file_bytes(ONE)) - 7),
    "no header at all": file_bytes(b""),
    "a list": file_bytes(b"[]"),
    "a key twice": file_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
    "bad UTF-8": file_bytes(b'{"\xff": 1}'),
    "half a surrogate": file_bytes(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "deep nesting": file_bytes(b'{"a":' * 100_000 + b"}" * 100_000),
    "NaN": file_bytes(b'{"a": NaN}'),
    "metadata that is a list": file_bytes({"__metadata__": []}),
    "metadata with a number": file_bytes({"__metadata__": {"a": 1}}),
    "overlapping tensors": file_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
    "the same bytes twice": file_bytes({"a": entry(), "b": entry()}, bytes(4)),
    "a hole between": file_bytes({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)),
    "a hole before": file_bytes({"a": entry(offsets=[1, 5])}, bytes(5)),
    "an empty tensor inside another": file_bytes({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, bytes(4)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_with_a_bad_header(folder, name):
    data = BAD_FILES[name]
    assert refused(folder, data).code == "header-invalid"
    with pytest.raises(SafetensorError):
        library.load(data)


def test_deep_values_are_quoted_without_recursion(folder):
    """Nested as deeply as the parser lets pass: the message must not fall into the same pit."""
    for depth in range(100, 1000, 50):
        text = b'{"a": {"dtype": ' + b"[" * depth + b"]" * depth + b', "shape": [], "data_offsets": [0, 0]}}'
        assert refused(folder, file_bytes(text)).code in ("header-dtype", "header-invalid")


def test_a_header_begins_with_its_brace(folder):
    assert refused(folder, file_bytes(b" {}")).code == "header-invalid"


@pytest.mark.parametrize("cut", [1, 3])
def test_a_truncated_file(folder, cut):
    data = safetensors_bytes({"a": np.arange(4, dtype=np.uint8)})
    error = refused(folder, data[:-cut])
    assert error.code == "file-size" and "fetch" in error.hint


def test_trailing_bytes(folder):
    data = safetensors_bytes({"a": np.arange(4, dtype=np.uint8)})
    assert refused(folder, data + b"\0").code == "file-size"
    empty = safetensors_bytes({"a": np.empty(0, np.uint8)})
    assert refused(folder, empty + b"\0").code == "file-size"


def test_a_header_without_data(folder):
    path = put(folder, safetensors_bytes({"a": np.zeros(4, np.uint8)}, header_only=True))
    infos, header_only = read_header(path, 0)
    assert header_only and infos["a"].shape == (4,)


def test_a_file_whose_tensors_are_all_empty_is_whole(folder):
    path = put(folder, safetensors_bytes({"a": np.zeros((0, 8), np.uint8), "b": np.zeros((2, 0), np.float32)}))
    infos, header_only = read_header(path, 0)
    assert not header_only and len(infos) == 2


def test_a_header_padded_with_spaces(folder):
    """The library pads headers to eight bytes."""
    text = json.dumps(ONE).encode() + b" " * 7
    infos, _ = read_header(put(folder, file_bytes(text, bytes(4))), 0)
    assert list(infos) == ["a"]


def test_a_folder_in_place_of_a_file(folder):
    (folder / "sub.safetensors").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        read_header(folder / "sub.safetensors", 0)
    assert caught.value.code == "file-unreadable"


def test_a_file_that_shrinks_once_opened(tmp_path):
    path = put(tmp_path, safetensors_bytes({"a": np.zeros(5000, np.uint8), "b": np.ones(5000, np.uint8)}))
    infos, _ = read_header(path, 0)
    with TensorReader([path], infos) as reader:
        reader.read("a")
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="ends inside b") as caught:
            reader.read("b")
    assert caught.value.code == "file-size"


def test_a_file_that_disappears(tmp_path):
    path = put(tmp_path, safetensors_bytes({"a": np.zeros(4, np.uint8)}))
    infos, _ = read_header(path, 0)
    path.unlink()
    with TensorReader([path], infos) as reader, pytest.raises(CheckpointError) as caught:
        reader.read("a")
    assert caught.value.code == "file-unreadable"


def test_a_reusing_reader_keeps_the_arrays_of_one_module_apart(folder):
    tensors = {name: np.full(1000, place, np.uint8) for place, name in enumerate("abcdef")}
    path = put(folder, safetensors_bytes(tensors))
    infos, _ = read_header(path, 0)
    with TensorReader([path], infos, reuse=True) as reader:
        reader.reset(3000)
        first = [reader.read(name) for name in "abc"]
        assert all((array == place).all() for place, array in enumerate(first))
        owner = first[0].base
        reader.reset(3000)
        second = [reader.read(name) for name in "def"]
        assert all((array == place + 3).all() for place, array in enumerate(second))
        assert all(array.base is owner for array in (*first, *second)), "the buffer isn't reused"
        assert (first[0] == 3).all(), "void after reset: the memory was handed out again"


def test_a_reusing_reader_takes_more_than_it_was_promised(folder):
    path = put(folder, safetensors_bytes({"a": np.full(9000, 1, np.uint8), "b": np.full(9000, 2, np.uint8)}))
    infos, _ = read_header(path, 0)
    with TensorReader([path], infos, reuse=True) as reader:
        reader.reset(9000)
        a, b = reader.read("a"), reader.read("b")
        assert (a == 1).all() and (b == 2).all()


def test_a_reader_leaves_no_descriptor_open(tmp_path):
    folder_of_descriptors = Path("/proc/self/fd")
    if not folder_of_descriptors.exists():
        pytest.skip("no /proc")
    path = put(tmp_path, safetensors_bytes({"a": np.zeros(4, np.uint8)}))
    infos, _ = read_header(path, 0)
    before = len(list(folder_of_descriptors.iterdir()))
    with TensorReader([path], infos) as reader:
        reader.read("a")
        assert len(list(folder_of_descriptors.iterdir())) == before + 1
    assert len(list(folder_of_descriptors.iterdir())) == before
