"""A program of its own that renders one chat template: JSON on stdin, JSON on stdout.

Jinja's sandbox keeps a template from the file system but not from running forever or filling the memory, and
a thread can't be stopped; a process can. It imports nothing of fewbits, so that it starts quickly, and finds
the same names as in transformers: raise_exception, strftime_now, tojson, loop controls, the generation block.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 3
MEMORY_BYTES = 320_000_000
OUTPUT_CHARACTERS = 4_000_000


class _Refused(Exception):
    """The template called raise_exception."""


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's text for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    for what, amount in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_SECONDS)):
        try:
            resource.setrlimit(what, (amount, amount))
        except (OSError, ValueError):  # macOS refuses RLIMIT_AS; the caller's timeout still holds
            pass


def render(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """{"text": …}, or {"error": why it can't be rendered}, or {"refused": what the template says}."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    pieces = []
    size = 0
    try:
        for piece in environment.from_string(template).generate(**variables):
            size += len(piece)
            if size > OUTPUT_CHARACTERS:
                return {"error": f"it writes more than {OUTPUT_CHARACTERS} characters"}
            pieces.append(piece)
    except _Refused as refusal:
        return {"refused": str(refusal)[:1000]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:1000]}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES // 1_000_000} MB"}
    except Exception as error:  # whatever an expression of the template can raise
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    return {"text": "".join(pieces)}


if __name__ == "__main__":
    _limit()
    request = json.load(sys.stdin)
    json.dump(render(request["template"], request["variables"]), sys.stdout)
