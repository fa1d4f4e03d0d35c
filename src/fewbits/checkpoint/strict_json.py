"""JSON from files nobody vouches for: duplicate keys, NaN, endless nesting and endless integers are refused."""

from __future__ import annotations

import json
from typing import Any

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


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse(data: bytes, source: str, code: str) -> dict[str, Any]:
    """The object that `data` holds. Raises CheckpointError(`code`) naming `source` when it isn't one."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except RecursionError:
        raise CheckpointError(code, "JSON is nested too deeply", module=source) from None
    except ValueError as error:  # bad JSON, bad UTF-8, integers beyond Python's limit of digits
        raise CheckpointError(code, f"not valid JSON: {error}", module=source) from None
    if not isinstance(value, dict):
        raise CheckpointError(code, "the JSON value is not an object", module=source)
    return value


def is_int(value: Any) -> bool:
    """An integer of at most 64 bits; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -_INTEGER_LIMIT <= value < _INTEGER_LIMIT
