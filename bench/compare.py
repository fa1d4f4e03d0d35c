"""fewbits and its peers on the same shapes, in turns, beside what the machine can give.

    python bench/compare.py --peers DIR [--repeats 5] [--groups '4 bits' …] [--programs fewbits llama.cpp …]

DIR has an environment per peer and a folder `models` (bench/README.md says how they are made); what is missing is
skipped, with the reason in the results. Each program runs in a process of its own with as many threads as fewbits, and
all answer one case before any answers the next. Writes bench/results/comparison.csv and machine.csv after every round;
prints the table. `python tools/generate_docs.py` then draws the plot.
"""

from __future__ import annotations

import argparse
import fcntl
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from comparison import (
    CASES,
    FEWBITS,
    FIRST_TOKEN,
    RESULTS,
    VARIANTS,
    Case,
    Fact,
    Result,
    Variant,
    cost,
    read,
    read_machine,
    shape_of,
    write,
)
from comparison_table import tables
from peers.process import PATIENCE, Worker, WorkerError
from processor import processor

from fewbits.bench import Rates
from fewbits.engine import limits, machine
from fewbits.kernels.arithmetic import Dot

STARTS = 3
LONG_START = 20.0  # seconds; what takes longer is started once
PAUSE = 0.3  # until the threads of the program that has just answered sleep
TURN = 45.0  # seconds that the lock is held at a stretch; a program that is asked then still answers
SHAPE = "bf16"  # the model whose config.json has the shape of all


class Turns:
    """Holds a lock while something is measured, and lets go between two measurements: `--lock`."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._held: IO[bytes] | None = None
        self._since = 0.0

    def begin(self) -> None:
        if self._held is not None and time.monotonic() - self._since > TURN:
            self.end()
        if self._path is not None and self._held is None:
            self._held = self._path.open("ab")
            fcntl.flock(self._held, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def end(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


@dataclass(slots=True)
class Entrant:
    """A variant that is measured, or skipped for a reason. `about`: bench/peers/worker.py."""

    variant: Variant
    starts: list[float] = field(default_factory=list)
    worker: Worker | None = None
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[Case, Result] = field(default_factory=dict)
    skipped: str = ""

    def result(self, case: str, tokens: int, seconds: list[float]) -> Result:
        of = self.variant
        known = (of.group, of.program, of.scheme, self.about["version"], self.about["activations"])
        return Result(*known, case, tokens, seconds)

    @property
    def rows(self) -> list[Result]:
        if self.skipped:
            return [Result(self.variant.group, self.variant.program, self.variant.scheme, note=self.skipped)]
        return [*self.results.values(), self.result(FIRST_TOKEN, 1, self.starts)]

    def __str__(self) -> str:
        return f"{self.variant.program} {self.variant.scheme}"


Measured = tuple[list[Result], list[Fact]]


class Comparison:
    """`peers`: the folder of environments and models."""

    def __init__(self, peers: Path, threads: int, repeats: int, turns: Turns) -> None:
        self._peers, self._models = peers, peers / "models"
        self._threads, self._repeats, self._turns = threads, repeats, turns
        self._meter = limits.ReadMeter()
        self._shape = shape_of(self._models / SHAPE)

    def group(self, variants: Sequence[Variant], cases: Sequence[Case] = CASES) -> Iterator[Measured]:
        """Measures variants in turns; yields all results so far, and what the machine gave, after every round."""
        entrants = [Entrant(variant) for variant in variants]
        seen: list[Rates] = []
        try:
            for start in range(STARTS):
                for entrant in entrants:
                    self._start(entrant, start == STARTS - 1)
            running = [entrant for entrant in entrants if entrant.worker is not None]
            for entrant in running:
                assert entrant.worker is not None
                entrant.about = entrant.worker.ask({"kind": "about"})["about"]
                entrant.results = {case: entrant.result(str(case), case.tokens, []) for case in cases}
            for repeat in range(self._repeats):
                for case in cases:
                    # Each is first in turn: what comes first finds the machine as the last one of the case left it.
                    for number in range(len(running)):
                        entrant = running[(number + repeat) % len(running)]
                        seen += self._measure(entrant, case, f"{repeat + 1}/{self._repeats}")
                yield [row for entrant in entrants for row in entrant.rows], self._facts(variants[0].group, seen)
        finally:
            self._turns.end()
            for entrant in entrants:
                if entrant.worker is not None:
                    entrant.worker.close()

    def _start(self, entrant: Entrant, last: bool) -> None:
        if entrant.skipped or entrant.worker is not None:
            return
        variant = entrant.variant
        program = Path(sys.executable) if variant.program == FEWBITS else self._peers / variant.worker / "bin/python"
        model = self._models / variant.model
        for what, path in (("environment", program), ("model", model)):
            if not path.exists():
                entrant.skipped = f"there is no {what} for it"
        if not entrant.skipped:
            if not entrant.starts:
                _cache(model)
            self._turns.begin()
            entrant.worker = Worker(program, variant.worker, model, self._threads)
            try:
                if not entrant.worker.wait(TURN):
                    self._turns.end()  # minutes, where it compiles
                    if not entrant.worker.wait():
                        entrant.skipped = f"no first token within {PATIENCE:.0f} s"
            except WorkerError as error:
                entrant.skipped = str(error)
        if entrant.skipped:
            _say(f"{entrant} is skipped: {entrant.skipped}")
            if entrant.worker is not None:
                entrant.worker.close()
                entrant.worker = None
            return
        assert entrant.worker is not None
        entrant.starts.append(entrant.worker.started)
        _say(f"{entrant}: first token after {entrant.starts[-1]:.2f} s")
        if not last and entrant.starts[-1] < LONG_START:
            entrant.worker.close()
            entrant.worker = None

    def _measure(self, entrant: Entrant, case: Case, which: str) -> list[Rates]:
        """One pass; the rates of the machine just before, if it was measured."""
        result = entrant.results[case]
        assert entrant.worker is not None
        if result.note:
            return []
        self._turns.begin()
        time.sleep(PAUSE)
        rates = Rates(self._meter.rate(), limits.dot_rates())
        try:
            seconds = entrant.worker.ask(case.question)["seconds"]
        except WorkerError as error:
            result.note = str(error)
            return []
        result.seconds.append(seconds)
        attention: Dot = "bf16" if "bf16" in rates.dots else "f32"
        limit = cost(self._shape, entrant.about, case, attention).limit(rates)
        if limit is not None:
            result.limits.append(limit)
        _say(f"{which} {entrant}, {case}: {case.tokens / seconds:.1f} tokens/s")
        return [rates]

    def _facts(self, group: str, seen: list[Rates]) -> list[Fact]:
        facts = [
            Fact(group, "date", time.strftime("%Y-%m-%d")),
            Fact(group, "processor", processor()),
            Fact(group, "tier", machine.tier()),
            Fact(group, "threads", str(self._threads)),
        ]
        read = [rates.read / 1e9 for rates in seen if rates.read is not None]
        rates = {"read GB/s": read} if read else {}
        for dot in seen[0].dots if seen else ():
            rates[f"{dot} GMAC/s"] = [one.dots[dot] / 1e9 for one in seen]
        for name, values in rates.items():
            facts.append(Fact(group, name, *(f"{of(values):.1f}" for of in (statistics.median, min, max))))
        return facts


def _cache(model: Path) -> None:
    """Reads a model's files, so that they lie in the page cache."""
    for path in model.iterdir() if model.is_dir() else [model]:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(variant.group for variant in VARIANTS))
    programs = list(dict.fromkeys(variant.program for variant in VARIANTS))
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="environments and models")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each program (one per CPU)")
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups, help="the others' results are kept")
    parser.add_argument("--programs", nargs="+", choices=programs, default=programs)
    parser.add_argument("--lock", type=Path, metavar="FILE", help="hold a flock on it while something is measured")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(bench/results)")
    arguments = parser.parse_args()
    peers = arguments.peers
    if not (peers / "models" / SHAPE / "config.json").exists():
        parser.error(f"{peers} has no models/{SHAPE}; sh bench/peers/set_up.sh {peers} models makes it")
    threads = machine.prepare(arguments.threads)
    comparison = Comparison(peers, threads, arguments.repeats, Turns(arguments.lock))
    results, facts = arguments.out / "comparison.csv", arguments.out / "machine.csv"
    for group in arguments.groups:
        chosen = [one for one in VARIANTS if one.group == group and one.program in arguments.programs]
        for rows, machines in comparison.group(chosen):
            kept = [row for row in read(results) if row.group != group]
            write(results, sorted([*kept, *rows], key=lambda row: groups.index(row.group)))
            known = [fact for fact in read_machine(facts) if fact.group != group]
            write(facts, sorted([*known, *machines], key=lambda fact: groups.index(fact.group)))
    print(tables(read(results), read_machine(facts)))


if __name__ == "__main__":
    main()
