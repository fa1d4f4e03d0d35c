"""`fewbits run`: text to stdout as it comes; warnings, the checkpoint's own sampling and speeds to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fewbits import report
from fewbits.commands import chat, speed
from fewbits.commands.numbers import numbers
from fewbits.commands.progress import LoadingBar, say
from fewbits.engine.llm import LLM, MTP, NGRAM
from fewbits.engine.request import Result, SamplingParams
from fewbits.errors import UsageError

_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    SamplingParams(**given)  # what is wrong with the options is said before a model is loaded
    ids = None if arguments.prompt_ids is None else numbers(arguments.prompt_ids, "--prompt-ids")
    layers = None if arguments.draft_layers is None else numbers(arguments.draft_layers, "--draft-layers")
    llm = load(arguments, draft=arguments.draft, draft_tokens=arguments.draft_tokens, draft_layers=layers)
    params = SamplingParams(**(_model_sampling(llm, arguments.sampling == "model") | given))
    if arguments.chat and arguments.prompt is None:
        chat.converse(llm, params)
        return 0
    if arguments.chat:
        ids = llm.encode_chat([{"role": "user", "content": arguments.prompt}])
    elif ids is None:
        ids = llm.encode(arguments.prompt, special=not arguments.raw)
    if arguments.logits is not None:
        _write_logits(llm, ids, arguments.logits)
    if arguments.json:
        [result] = llm.generate([ids], params)
        print(json.dumps(dict(result)))
    else:
        result = write(llm, ids, params)
    if not arguments.json or sys.stderr.isatty():
        speed.report(llm, result)
    if llm.doubt is not None:
        say(f"warning: {llm.doubt}")
    return 0


def load(arguments: argparse.Namespace, **more: Any) -> LLM:
    """The model, with a bar where that takes long; the plan's warnings on stderr. `more` as for LLM."""
    with LoadingBar("loading") as bar:
        llm = LLM(
            arguments.checkpoint,
            allow_reference=arguments.allow_reference,
            activations=arguments.activations,
            kv_dtype=arguments.kv_dtype,
            threads=arguments.threads,
            progress=bar,
            **more,
        )
    for warning in llm.warnings:
        say(f"warning: {warning}")
    if llm.drafter is not None:
        say(report.drafter(llm.drafter.planned))
    return llm


def write(llm: LLM, ids: list[int], params: SamplingParams) -> Result:
    """Streams the continuation to stdout, token ids where there is no tokenizer, and ends the line."""
    stream = llm.stream(ids, params)
    last = ""
    for last in stream:
        sys.stdout.write(last)
        sys.stdout.flush()
    if not llm.tokenizer.available:
        print(",".join(map(str, stream.result.token_ids)))
    elif not last.endswith("\n"):
        print()
    return stream.result


def _check(arguments: argparse.Namespace) -> None:
    interactive = arguments.chat and arguments.prompt is None
    if arguments.draft is None and (arguments.draft_tokens is not None or arguments.draft_layers is not None):
        raise UsageError("usage", "nothing drafts: --draft-tokens and --draft-layers need --draft")
    if arguments.draft in (NGRAM, MTP) and arguments.draft_layers is not None:
        raise UsageError("usage", f"{arguments.draft} has no choice of layers: --draft-layers is for a drafter")
    if arguments.prompt_ids is not None and (arguments.chat or arguments.raw):
        raise UsageError("usage", "--prompt-ids adds nothing: --chat and --raw have no meaning there")
    if arguments.prompt is None and arguments.prompt_ids is None and not arguments.chat:
        raise UsageError("usage", "there is nothing to continue", hint="--prompt TEXT, --prompt-ids IDS or --chat")
    if interactive and (arguments.json or arguments.logits):
        raise UsageError("usage", "an interactive chat has no --json and no --logits", hint="give a --prompt")


def _model_sampling(llm: LLM, used: bool) -> dict[str, Any]:
    """What generation_config.json says is always shown, and returned where it is used."""
    says = llm.model_sampling
    if says:
        shown = ", ".join(f"{name} {value:g}" for name, value in says.items())
        say(f"generation_config.json: {shown}" + ("" if used else " (not used; --sampling model uses it)"))
    return says if used else {}


def _write_logits(llm: LLM, ids: list[int], path: str) -> None:
    import numpy as np

    try:
        with open(path, "wb") as file:  # not by name: NumPy would add .npy to it
            np.save(file, llm.logits(ids))
    except OSError as error:
        raise UsageError("output-unwritable", f"can't be written: {error.strerror}", module=path) from None
