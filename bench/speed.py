"""How fast a checkpoint decodes and prefills on this machine, beside the rate at which its memory can be read.

    python bench/speed.py FOLDER [--threads N] [--repeats 5] [--csv FILE]

Cases are interleaved and repeated; figures are medians. A pass that decodes must read the packed weights once and
each sequence's cache: `share` is the time that takes at the measured rate over the time it took. Where everything
fits into the last-level cache memory isn't the limit, and there is no share. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fewbits import LLM, __version__
from fewbits.engine import limits, machine
from fewbits.engine.kvcache import PAGE_SIZE, KVCache, Part

PROMPT = 64  # tokens in the cache of each sequence before decoding is timed
STEPS = 16  # decode passes timed together


@dataclass(frozen=True)
class Case:
    """`tokens` a pass: one for each of `batch` sequences when decoding, all of one sequence in prefill."""

    what: str
    batch: int
    tokens: int


CASES = [Case("decode", batch, batch) for batch in (1, 4, 8, 16)] + [
    Case("prefill", 1, tokens) for tokens in (128, 512)
]


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Bench:
    def __init__(self, folder: str) -> None:
        self.llm = LLM(folder)
        loaded = self.llm._loaded  # the passes below go without requests and sampling
        self.decoder, self.layers = loaded.decoder, loaded.cache_layers

    def seconds(self, case: Case) -> float:
        """Of one pass."""
        ids = [index % self.llm.vocabulary for index in range(max(PROMPT, case.tokens))]
        entries = case.batch * (max(PROMPT, case.tokens) + STEPS)
        cache = KVCache(self.layers, max_pages=entries // PAGE_SIZE + 2 * case.batch)

        def forward(count: int) -> None:
            parts = [Part(sequence, ids[:count]) for sequence in range(case.batch)]
            self.decoder.forward(cache.batch(parts), cache)

        if case.what == "prefill":
            return timed(lambda: forward(case.tokens))
        forward(PROMPT)
        return timed(lambda: [forward(1) for _ in range(STEPS)]) / STEPS

    def bytes_read(self, case: Case) -> int:
        return self.llm.bytes_per_token(case.batch * (PROMPT + STEPS // 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append a row per case")
    arguments = parser.parse_args()
    threads = machine.prepare(arguments.threads)
    bench = Bench(arguments.folder)
    rate = limits.read_rate(threads)
    measured: dict[Case, list[float]] = {case: [] for case in CASES}
    for _ in range(arguments.repeats):
        for case in CASES:
            measured[case].append(bench.seconds(case))
    system = machine.describe()
    common = {
        "version": __version__,
        "checkpoint": Path(arguments.folder).name,
        "tier": system["cpu"]["tier"],
        "threads": threads,
        "read_gb_s": None if rate is None else round(rate / 1e9, 1),
    }
    rows = []
    for case, times in measured.items():
        median = statistics.median(times)
        size = bench.bytes_read(case)
        in_cache = size < (limits.last_level_cache() or 0)
        share = None if rate is None or in_cache or case.what == "prefill" else round(size / rate / median, 3)
        spread = (max(times) - min(times)) / median
        figures = {"tokens_per_s": round(case.tokens / median, 1), "spread": round(spread, 2)}
        rows.append({**common, **asdict(case), **figures, "in_cache": in_cache, "share": share})
        shown = "in cache" if in_cache else "" if share is None else f"{share:.0%} of the memory limit"
        name = f"{case.what} {case.tokens}" if case.what == "prefill" else f"decode, batch {case.batch}"
        print(f"{name:<18}{case.tokens / median:>10,.0f} tokens/s  ±{spread:.0%}  {shown}", file=sys.stderr)
    if arguments.csv is not None:
        fresh = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
