"""The machine as the native module sees it: threads, instruction sets; and what `inspect --system` shows."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from typing import Any

import fewbits
from fewbits import _native
from fewbits.engine import limits
from fewbits.errors import UsageError
from fewbits.kernels.arithmetic import Dot


def prepare(threads: int | None = None) -> int:
    """Sizes the process's pool of native threads where a number is given; returns its size.

    Raises UsageError for a number below 1, and for a FEWBITS_ISA that this machine can't run.
    """
    tier()
    if threads is not None:
        if threads < 1:
            raise UsageError("threads-range", f"{threads} threads can't compute anything")
        _native.set_thread_count(threads)
    return _native.thread_count()


def tier() -> str:
    """The instruction set tier that native kernels use."""
    try:
        return _native.tier()
    except ValueError as error:
        raise UsageError("isa-unsupported", str(error), source="environment, FEWBITS_ISA") from None


def describe() -> dict[str, Any]:
    """What `inspect --system --json` prints; measures the limits, which takes 300 ms."""
    threads = prepare()
    return {
        "schema": 1,
        "version": fewbits.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": {
            "features": [name for name, present in _native.cpu_features().items() if present],
            "tiers": _native.supported_tiers(),
            "tier": tier(),
            "last_level_cache": limits.last_level_cache(),
        },
        "threads": threads,
        "memory": {"available": limits.available_memory()},
        "limits": limits_object(limits.ReadMeter().rate(), limits.dot_rates()),
    }


def limits_object(read: float | None, dots: Mapping[Dot, float]) -> dict[str, Any]:
    """Rates in GB and GMAC a second; a dot that the tier has no instruction for isn't there."""
    return {
        "read_gb_s": None if read is None else round(read / 1e9, 2),
        "dot_gmac_s": {dot: round(rate / 1e9, 1) for dot, rate in dots.items()},
    }
