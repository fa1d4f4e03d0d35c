"""What this machine can give: memory, last-level cache, the rate at which memory can be read, and the peak of each dot.

A decode step reads every packed weight once, so bytes a token ÷ the reading rate is the time below which no program
gets; a prefill's is its multiply-accumulates ÷ the peak of the instruction that they use.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fewbits import _native
from fewbits.kernels.arithmetic import DOTS, Dot

_MIB = 1 << 20
# What is read over and over is eight times the last-level cache: with twice or four times as much, part of it stays
# there, and 128 MiB read 39 GB/s where 512 MiB read 34 (Zen 4, 32 MiB of cache).
_CACHES_READ = 8
_LEAST_READ, _MOST_READ = 128 * _MIB, 2048 * _MIB
_READ_SECONDS = 0.1
_DOT_SECONDS = 0.025
_SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, within the control group's limit; None where nobody says."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            found.append(max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: half of what is built in
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(found) if found else None


def last_level_cache() -> int | None:
    """Bytes of the largest cache that the first CPU sees; None where the system doesn't say."""
    sizes = []
    for path in _SYSFS_CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text[-1:] in _UNITS and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=None)


class ReadMeter:
    """Measures the reading rate; keeps the memory that it reads for as long as it lives."""

    def __init__(self) -> None:
        size = min(max(_LEAST_READ, _CACHES_READ * (last_level_cache() or 0)), _MOST_READ)
        self._probe = _native.ReadProbe(size) if size <= (available_memory() or 0) // 4 else None

    def rate(self) -> float | None:
        """Bytes per second that all threads read together, of a pass in the middle of those that take 100 ms.

        None where there wasn't the memory to find out.
        """
        if self._probe is None:
            return None
        return statistics.median(_measured(self._probe.rate, _READ_SECONDS))


def dot_rates() -> dict[Dot, float]:
    """Multiply-accumulates per second of all threads, of each dot that the tier in use has an instruction for.

    The best of what 25 ms show: unlike the memory, the cores aren't shared, and a pass is slowed down by nothing else.
    """
    rates = {dot: max(_measured(partial(_native.dot_rate, dot), _DOT_SECONDS)) for dot in DOTS}
    return {dot: rate for dot, rate in rates.items() if rate > 0}


def _measured(measure: Callable[[], float], seconds: float) -> list[float]:
    """Results of as many calls as take `seconds`; the first, which wakes the threads, isn't among them."""
    measure()
    begin = time.perf_counter()
    results: list[float] = []
    while not results or time.perf_counter() - begin < seconds:
        results.append(measure())
    return results
