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
        (b'{"a": NaN}', "expected a JSON value: line 1 column 7"),
        (b'{"a": -Infinity}', "no digit after sign: line 1 column 8"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "depth limit exceeded"),
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


_BLANKS = st.text(" \t\r\n", max_size=2)
_NAMES = st.sampled_from(["a", "b", "a:b", ":", "\\u003a", "\\u0061", '\\"', ""])


def _object(draw: st.DrawFn, depth: int) -> tuple[str, bool]:
    """The text of an object, and whether some object in it has a key twice."""
    texts, names, twice = [], [], False
    for _ in range(draw(st.integers(0, 3))):
        name = draw(_NAMES)
        text = draw(st.sampled_from(["1", '":"', '[{"a": 1}]', '[{"a": 1, "a": 2}]', "{}", "object"]))
        twice |= text == '[{"a": 1, "a": 2}]'
        if text == "object":
            text, inner = _object(draw, depth - 1) if depth else ("null", False)
            twice |= inner
        texts.append(f'{draw(_BLANKS)}"{name}"{draw(_BLANKS)}:{draw(_BLANKS)}{text}')
        names.append(json.loads(f'"{name}"'))
    return "{" + ",".join(texts) + "}", twice or len(set(names)) < len(names)


@given(st.data())
def test_a_key_twice_is_found_wherever_it_stands(data):
    text, twice = _object(data.draw, 3)
    if twice:
        with pytest.raises(CheckpointError, match="stands twice"):
            strict_json.parse(text.encode(), "config.json", "json-invalid")
    else:
        assert strict_json.parse(text.encode(), "config.json", "json-invalid") == json.loads(text)


def test_surrogate_pairs_are_characters():
    assert strict_json.parse(b'{"a": "\\ud83d\\ude00"}', "x", "json-invalid") == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize(
    ("value", "whole"),
    [(0, True), (-(1 << 63), True), ((1 << 63) - 1, True), (1 << 63, False), (True, False), (1.0, False), ("1", False)],
)
def test_integers_have_64_bits(value, whole):
    assert strict_json.is_int(value) is whole
