"""JSON that nobody vouches for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.checkpoint import strict_json
from fewbits.errors import CheckpointError

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=5), st.booleans())
def test_reads_what_json_is(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert strict_json.parse(data, "config.json", "json-invalid") == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"\\udfff": 1}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
    ],
    ids=lambda value: value[:20].decode("latin1") if isinstance(value, bytes) else "",
)
def test_refuses_what_json_is_not(data, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        strict_json.parse(data, "config.json", "json-invalid")
    assert caught.value.code == "json-invalid"
    assert caught.value.module == "config.json"
    assert len(str(caught.value)) < 500


def test_surrogate_pairs_are_characters():
    assert strict_json.parse(b'{"a": "\\ud83d\\ude00"}', "x", "json-invalid") == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize(
    ("value", "whole"),
    [(0, True), (-(1 << 63), True), ((1 << 63) - 1, True), (1 << 63, False), (True, False), (1.0, False), ("1", False)],
)
def test_integers_have_64_bits(value, whole):
    assert strict_json.is_int(value) is whole
