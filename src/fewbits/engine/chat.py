"""Chat templates: from a list of messages to the text the model was trained on.

A template is a program from a file nobody vouches for. It runs in Jinja's sandbox, in a process of its own
with limits on time, memory and output (`template_worker`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.engine.tokenizer import Tokenizer
from fewbits.errors import CheckpointError, UsageError

Message = Mapping[str, Any]  # at least "role" and "content"

_LIMIT = 4_000_000  # bytes of a template; long ones have some 50,000
_WALL_SECONDS = 30  # the worker limits its own CPU time; this is for a machine that does not let it run


def template_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """(template, where it stands). chat_template.jinja goes before tokenizer_config.json, as in transformers.

    Raises UsageError where the checkpoint has none.
    """
    path = tokenizer.checkpoint.folder / "chat_template.jinja"
    if path.is_file():
        data = tokenizer.checkpoint.file(path.name, _LIMIT, "chat-template-invalid")
        try:
            return data.decode(), path.name
        except UnicodeDecodeError as error:
            raise CheckpointError("chat-template-invalid", f"can't be read: {error}", module=path.name) from None
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str):
        raise UsageError(
            "chat-template-missing",
            "the checkpoint has no chat template",
            source=str(tokenizer.checkpoint.folder),
            hint="--prompt continues a text without one",
        )
    source = "tokenizer_config.json, chat_template"
    if len(found) > _LIMIT:
        text = f"it has {len(found)} characters, more than {_LIMIT}"
        raise CheckpointError("chat-template-invalid", text, module=source)
    return found, source


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The prompt for the assistant's next message. Special tokens are in the text already: add none.

    Raises CheckpointError for a template that fails or goes on too long, UsageError for one that refuses
    these messages.
    """
    template, source = template_of(tokenizer)
    variables = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
    answer = _work({"template": template, "variables": variables | tokenizer.special_tokens}, source)
    if "refused" in answer:
        raise UsageError("chat-template-refused", f"the chat template says: {answer['refused']}", source=source)
    if "error" in answer:
        raise CheckpointError("chat-template-invalid", answer["error"], module=source)
    return answer["text"]


def _work(request: dict[str, Any], source: str) -> dict[str, str]:
    # -P keeps the current directory, which may be the checkpoint's, out of the module search path.
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_long(source) from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _too_long(source)
    if done.returncode:
        raise RuntimeError(f"the template process ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def _too_long(source: str) -> CheckpointError:
    return CheckpointError("chat-template-invalid", "it didn't come to an end within its time", module=source)
