"""What this machine can give: memory, last-level cache, and the rate at which memory can be read.

A decode step reads every packed weight once, so bytes a token ÷ the reading rate is the time below which no
program gets. The rate is measured, in at most 150 ms, by reading with NumPy what doesn't fit into the cache.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_MIB = 1 << 20
_MEASURE_SECONDS = 0.15
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


def read_rate(threads: int) -> float | None:
    """Bytes per second that `threads` threads read together; None without the memory to find out."""
    begin = time.perf_counter()
    size = max(64 * _MIB, 2 * (last_level_cache() or 0)) // _MIB * _MIB
    if size > (available_memory() or 0) // 4:
        return None
    buffer = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # 4 KiB pages take longer to appear than the whole measurement may
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages
            pass
    array = np.frombuffer(buffer, np.float32)
    array.fill(0.0)
    parts = np.array_split(array, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        while best == float("inf") or time.perf_counter() - begin < _MEASURE_SECONDS:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return size / best
