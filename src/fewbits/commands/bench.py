"""`fewbits bench`: what `fewbits.bench` measured, for people or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fewbits
from fewbits.bench import CASES, CONTEXT, Benchmark, Case, Measured, Operation, bench
from fewbits.commands.progress import LoadingBar
from fewbits.commands.run import load
from fewbits.engine import machine
from fewbits.engine.llm import LLM
from fewbits.errors import UsageError

SCHEMA = 1


def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise UsageError("usage", f"{arguments.repeats} repeats measure nothing")
    llm = load(arguments)
    with LoadingBar("measuring", patience=0.0, counts="passes") as bar:
        found = bench(llm, CASES, arguments.repeats, bar)
    if arguments.json:
        print(json.dumps(_object(arguments.checkpoint, llm, found), ensure_ascii=False))
    else:
        print("\n".join(_lines(llm, found)))
    return 0


def _object(checkpoint: str, llm: LLM, found: Benchmark) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": fewbits.__version__,
        "checkpoint": Path(checkpoint).name,
        "tier": machine.tier(),
        "threads": llm.threads,
        "limits": machine.limits_object(found.rates.read, found.rates.dots),
        "in_cache": found.in_cache,
        "context": CONTEXT,
        "decode": [{"batch": one.case.sequences} | _figures(one, found) for one in _of(found, "decode")],
        "prefill": [{"tokens": one.case.tokens} | _figures(one, found) for one in _of(found, "prefill")],
        "profiles": [_profile(case, operations) for case, operations in found.profiles.items()],
        "skipped": {str(case): reason for case, reason in found.skipped.items()},
    }


def _of(found: Benchmark, kind: str) -> list[Measured]:
    return [one for one in found.measured if one.case.kind == kind]


def _figures(one: Measured, found: Benchmark) -> dict[str, Any]:
    limit, share = one.limit_tokens_per_s, one.share
    known = limit is not None and share is not None and not _cached(one, found)
    return {
        "tokens_per_s": round(one.tokens_per_s, 2),
        "spread": round(one.spread, 3),
        "limit_tokens_per_s": round(limit, 2) if known and limit is not None else None,
        "share": round(share, 3) if known and share is not None else None,
    }


def _cached(one: Measured, found: Benchmark) -> bool:
    """A prefill's limit is the cores, wherever the weights lie."""
    return found.in_cache and one.case.kind == "decode"


def _profile(case: Case, operations: Sequence[Operation]) -> dict[str, Any]:
    return {
        "case": str(case),
        "operations": [
            {"name": one.name, "ms": round(1000 * one.seconds, 4), "share": round(one.share, 4)} for one in operations
        ],
    }


def _lines(llm: LLM, found: Benchmark) -> Iterator[str]:
    rates = machine.limits_object(found.rates.read, found.rates.dots)
    read = "memory not measured" if rates["read_gb_s"] is None else f"reads {rates['read_gb_s']} GB/s"
    peaks = "".join(f", {dot} {rate:g} GMAC/s" for dot, rate in rates["dot_gmac_s"].items())
    yield f"{machine.tier()}, {llm.threads} threads: {read}{peaks}"
    yield ""
    yield f"{'':<18}{'tokens/s':>10}{'spread':>9}{'limit':>10}{'share':>8}"
    for one in found.measured:
        figures = _figures(one, found)
        limit, share = figures["limit_tokens_per_s"], figures["share"]
        beside = (
            f"{limit:>10,.1f}{share:>8.0%}"
            if share is not None
            else f"{'in cache' if _cached(one, found) else '-':>10}"
        )
        yield f"{one.case!s:<18}{one.tokens_per_s:>10,.1f}{one.spread:>9.0%}{beside}"
    for case, reason in found.skipped.items():
        yield f"{case!s:<18}{'-':>10}  {reason}"
    for case, operations in found.profiles.items():
        yield ""
        yield f"{case!s:<18}{'ms':>10}{'share':>9}"
        for operation in operations:
            yield f"{operation.name:<18}{1000 * operation.seconds:>10.3f}{operation.share:>9.1%}"
