"""`fewbits demo`: the example checkpoint continues a line of Python."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fewbits import report
from fewbits.commands import run as run_command
from fewbits.commands import speed
from fewbits.commands.progress import say
from fewbits.engine.request import SamplingParams
from fewbits.errors import UsageError

PROMPT = "def read_json(path):"
PARAMS = SamplingParams(max_tokens=160)


def run(arguments: argparse.Namespace) -> int:
    if not Path(arguments.checkpoint).exists():
        raise UsageError(
            "checkpoint-not-found",
            f"there is no folder {arguments.checkpoint}",
            hint="the example is in the source tree: run this there, or give a folder",
        )
    llm = run_command.load(arguments)
    say(report.summary(llm.plan))
    sys.stdout.write(PROMPT)
    sys.stdout.flush()
    result = run_command.write(llm, llm.encode(PROMPT), PARAMS)
    speed.report(llm, result)
    return 0
