"""What this machine's processor is called, for tables of what was measured on it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    parted = (line.partition(":") for line in lines)
    values = {name.strip(): value.strip() for name, _, value in parted}
    names = ("model name", "cpu family", "model")
    return ", ".join(f"{name} {values[name]}" for name in names if name in values) or platform.processor()
