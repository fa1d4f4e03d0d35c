"""How long a checkpoint takes to load, how long until a fresh process has its first token, and the memory it takes.

    python bench/load.py FOLDER [--runs 7] [--threads N] [--json]

The file is read once first, so that it lies in the page cache. Then fresh processes take turns: one loads the
checkpoint, the other answers a prompt of 8 tokens with one. Shown are the median and the range. VmHWM is the peak of
resident memory of the one that loads; without a model a process with NumPy has some 40 MB. Memory that the machine has
to fetch from its host first makes single runs several times slower: the fastest run is the one to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOAD = """
import json, sys, time
began = time.perf_counter()
from fewbits.engine import machine
from fewbits.load import load
imported = time.perf_counter()
loaded = load(sys.argv[1], threads=machine.prepare(int(sys.argv[2]) or None))
seconds = time.perf_counter() - imported
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "import": imported - began, "load": seconds, "peak": int(peak) * 1024,
    "packed": loaded.plan.weight_bytes(), "stored": loaded.plan.nbytes,
}))
"""
PROMPT = ["--prompt-ids", "1,2,3,4,5,6,7,8", "--max-tokens", "1", "--json"]


def load(folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD, str(folder), str(threads)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def first_token(folder: Path, threads: int) -> float:
    """Seconds from the start of a process to its end, after one token."""
    command = [sys.executable, "-m", "fewbits", "run", str(folder), *PROMPT]
    began = time.perf_counter()
    subprocess.run([*command, *(("--threads", str(threads)) if threads else ())], check=True, capture_output=True)
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(of(values), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="native threads (one per CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    for path in arguments.folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    loads, firsts = [], []
    for _ in range(arguments.runs):
        loads.append(load(arguments.folder, arguments.threads))
        firsts.append(first_token(arguments.folder, arguments.threads))
    seconds = {name: spread([run[name] for run in loads]) for name in ("import", "load")}
    seconds["first token"] = spread(firsts)
    peak, packed, stored = max(run["peak"] for run in loads), loads[0]["packed"], loads[0]["stored"]
    if arguments.json:
        print(json.dumps({"seconds": seconds, "peak": peak, "packed": packed, "stored": stored}))
        return
    for name, found in seconds.items():
        print(f"{name:<12}{found['median']:>7.2f} s  ({found['min']:.2f} to {found['max']:.2f})")
    rate = stored / seconds["load"]["min"] / 1e9
    print(f"stored      {stored / 1e9:>7.3f} GB, loaded at {rate:.1f} GB/s in the fastest run")
    print(
        f"packed      {packed / 1e9:>7.3f} GB, peak of resident memory {peak / 1e9:.3f} GB: {peak / packed:.3f} of it"
    )


if __name__ == "__main__":
    main()
