"""The interactive chat. Ctrl-C stops an answer or drops a line, Ctrl-D ends."""

from __future__ import annotations

import sys

from fewbits.commands.progress import say
from fewbits.engine.llm import LLM
from fewbits.engine.request import SamplingParams


def converse(llm: LLM, params: SamplingParams) -> None:
    """Lines from stdin, answers to stdout, until the input ends. Raises as `LLM.encode_chat` does."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  (gives input() its line editing)
        except ImportError:  # a Python built without it
            pass
        say("Ctrl-C stops an answer, Ctrl-D ends the chat.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = _line(interactive)
        except KeyboardInterrupt:
            say("")
            continue
        if line is None:
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})


def _line(interactive: bool) -> str | None:
    """The next line without its end, None at the end of the input."""
    if interactive:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    stream = llm.stream(llm.encode_chat(messages), params)
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    print(flush=True)
    return stream.result.text
