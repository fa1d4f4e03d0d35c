"""Limits on code that reads what means harm: whatever hangs or takes all memory is ended, and is a failure."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Hangs(BaseException):
    """Nothing may take it for an error of its own: neither the code under test nor a library of it."""


@contextmanager
def limited(seconds: int, megabytes: int) -> Iterator[None]:
    """Seconds on the clock before `Hangs`; beyond so many megabytes more than now, a MemoryError (on Linux)."""

    def stop(*_: Any) -> None:
        raise Hangs

    memory = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, stop)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + megabytes * 1_000_000, memory[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, memory)
        signal.signal(signal.SIGALRM, handler)


def _data_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024
