"""How fast a checkpoint decodes and prefills on this machine, beside what the machine allows; and where the time goes.

Cases are interleaved and repeated, and the machine's limits are measured before each case each time: the rate at
which a virtual machine reads memory changes by half within minutes. Figures are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fewbits.bench.cost import Cost, Rates, pass_cost
from fewbits.bench.passes import CONTEXT, Case, Passes, decode, prefill
from fewbits.bench.profile import Operation, profile
from fewbits.engine import limits
from fewbits.engine.llm import LLM
from fewbits.kernels.arithmetic import Dot

__all__ = ["CASES", "CONTEXT", "Benchmark", "Case", "Cost", "Measured", "Operation", "Rates", "bench"]

CASES = (*map(decode, (1, 2, 4, 8, 16)), *map(prefill, (128, 512, 2048)))
PROFILED = (decode(1), decode(16), prefill(512))
_PROFILE_REPEATS = 2

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Measured:
    """A case: seconds of a pass, repeat by repeat, and the limit at the rates measured just before."""

    case: Case
    cost: Cost
    times: list[float] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.case.tokens / statistics.median(self.times)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest repeat, of the median."""
        return (max(self.times) - min(self.times)) / statistics.median(self.times)

    @property
    def limit_tokens_per_s(self) -> float | None:
        known = [limit for limit in self.limits if limit is not None]
        return self.case.tokens / statistics.median(known) if known else None

    @property
    def share(self) -> float | None:
        """Of the limit: the median of limit ÷ time."""
        shares = [limit / time for limit, time in zip(self.limits, self.times, strict=True) if limit is not None]
        return statistics.median(shares) if shares else None


@dataclass(slots=True)
class Benchmark:
    """`rates`: medians of what was measured. `in_cache`: a decode step reads no more than the last-level cache holds,
    so that memory isn't its limit. `skipped`: cases that the checkpoint can't run, and why.
    """

    rates: Rates
    in_cache: bool
    measured: list[Measured]
    profiles: Mapping[Case, Sequence[Operation]]
    skipped: Mapping[Case, str]


def bench(
    llm: LLM, cases: Sequence[Case] = CASES, repeats: int = 5, progress: Progress = lambda done, total: None
) -> Benchmark:
    """Measure a loaded model. `progress` is called with (passes done, passes in all)."""
    total = repeats * len(cases) + len(cases) + len(PROFILED)
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        progress(done, total)

    meter = limits.ReadMeter()
    attention = _attention_dot(limits.dot_rates())
    measured: list[Measured] = []
    passes: list[Passes] = []
    skipped: dict[Case, str] = {}
    layers = llm._loaded.cache_layers
    for case in cases:
        try:
            passes.append(Passes(llm, case))
        except ValueError as error:
            skipped[case] = str(error)
            advance(1 + repeats)
            continue
        measured.append(Measured(case, pass_cost(llm.plan, layers, case.spans, attention)))
        advance()
    seen: list[Rates] = []
    for _ in range(repeats):
        for one, its in zip(measured, passes, strict=True):
            rates = Rates(meter.rate(), limits.dot_rates())
            seen.append(rates)
            one.limits.append(one.cost.limit(rates))
            one.times.append(its.seconds())
            advance()
    profiles = {}
    for case in PROFILED:
        if case not in skipped:
            profiles[case] = profile(llm, case, _PROFILE_REPEATS)
        advance()
    smallest = min((one.cost.nbytes for one in measured), default=0)
    in_cache = smallest < (limits.last_level_cache() or 0)
    return Benchmark(_median(seen), in_cache, measured, profiles, skipped)


def _attention_dot(dots: Mapping[Dot, float]) -> Dot:
    return "bf16" if "bf16" in dots else "f32"


def _median(seen: Sequence[Rates]) -> Rates:
    read = [rates.read for rates in seen if rates.read is not None]
    dots = {dot: statistics.median(rates.dots[dot] for rates in seen) for dot in seen[0].dots} if seen else {}
    return Rates(statistics.median(read) if read else None, dots)
