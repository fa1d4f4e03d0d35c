"""JSON from files nobody vouches for: duplicate keys, NaN, endless nesting and endless numbers are refused."""

from __future__ import annotations

import json
from typing import Any

import orjson  # twice as fast as json, and stricter: a header may hold a hundred thousand tensors

from fewbits.errors import CheckpointError

_INTEGER_LIMIT = 1 << 63


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return result


def _keys(data: bytes, value: Any) -> int:
    """Keys of an object and of the objects in it, layer by layer; lists are not looked into."""
    keys, layer = 0, [value] if isinstance(value, dict) else []
    unseen = data.count(b"{")  # at least as many objects as there are
    while layer:
        keys += sum(map(len, layer))
        unseen -= len(layer)
        layer = [child for outer in layer for child in outer.values() if type(child) is dict] if unseen else []
    return keys


def _surely_unique(data: bytes, value: Any) -> bool:
    """Whether no key stands twice, by counting: each key of the text has a colon of its own, so as many colons as keys
    that were kept means that none was dropped. A tenth of the time that a hook on each object takes.
    """
    return data.count(b":") == _keys(data, value)


def parse(data: bytes, source: str, code: str) -> dict[str, Any]:
    """The object that `data` holds. Raises CheckpointError(`code`) naming `source` when it isn't one."""
    try:
        value = orjson.loads(data)
        if not _surely_unique(data, value):
            json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise CheckpointError(code, "JSON is nested too deeply", module=source) from None
    except ValueError as error:  # bad JSON, bad UTF-8, a key that stands twice
        raise CheckpointError(code, f"not valid JSON: {error}", module=source) from None
    if not isinstance(value, dict):
        raise CheckpointError(code, "the JSON value is not an object", module=source)
    return value


def is_int(value: Any) -> bool:
    """An integer of at most 64 bits; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -_INTEGER_LIMIT <= value < _INTEGER_LIMIT
