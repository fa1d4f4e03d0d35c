"""A program of its own: runs commands on folders that mean harm, each folder in a process forked from this one.

stdin: a list of lists of command lines; stdout: a line of JSON for each list, as soon as it is done.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time

import rich.table
import tokenizers

from fewbits import _native, cli
from fewbits.commands import inspect, run, verify

# What the commands import when they need it: once, here, and not in each fork.
IMPORTED = (_native, inspect, rich.table, run, tokenizers, verify)
CPU_SECONDS, WALL_SECONDS, BYTES = 60, 60, 4 << 30
SHOWN = 4_000_000  # of what a command wrote, so that one that never stops doesn't stop the test


def command(line: list[str]) -> dict[str, object]:
    began = time.process_time()
    children = os.times().children_user + os.times().children_system
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)  # not sys.stdout alone: libraries that aren't Python's write too
        os.dup2(err.fileno(), 2)
        try:
            code = cli.main(line)
        except SystemExit as end:
            code = end.code
        except BaseException as error:  # what is no Exception: the command would show its traceback
            code = f"{type(error).__name__}: {error}"[:300]
        texts = []
        for stream, file in ((sys.stdout, out), (sys.stderr, err)):
            stream.flush()
            file.seek(0)
            texts.append(file.read(SHOWN))
    seconds = time.process_time() - began + os.times().children_user + os.times().children_system - children
    return {"line": line, "code": code, "stdout": texts[0], "stderr": texts[1], "seconds": seconds}


def work(lines: list[list[str]], send: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    with os.fdopen(send, "w") as stream:
        json.dump([command(line) for line in lines], stream)


def main() -> None:
    for lines in json.loads(sys.stdin.read()):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            signal.alarm(WALL_SECONDS)
            try:
                work(lines, send)
            finally:
                os._exit(0)
        os.close(send)
        with os.fdopen(receive) as stream:
            answer = stream.read()
        _, status, used = os.wait4(child, 0)
        unit = 1 if sys.platform == "darwin" else 1024
        commands = json.loads(answer) if answer else []
        found = {"status": status, "megabytes": used.ru_maxrss * unit / 1e6, "commands": commands}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
