"""`fewbits verify`: what `fewbits.verify` found, for people or as JSON; exit code 1 where that is a difference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from fewbits import hub
from fewbits.commands.progress import LoadingBar, say
from fewbits.engine import machine
from fewbits.verify import ModuleResult, Verification, verify

SCHEMA = 1
_TITLES = ("module", "count", "stored as", "runs as", "error", "bound", "share")
_MOST_PROBLEMS = 20


def run(arguments: argparse.Namespace) -> int:
    machine.prepare(arguments.threads)
    folder = hub.resolve(arguments.checkpoint)
    with LoadingBar("verifying") as bar:
        found = verify(folder, bar, arguments.activations)
    for warning in found.warnings:
        say(f"warning: {warning}")
    if arguments.json:
        print(json.dumps(_object(found), ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return 0 if found.ok else 1


def _object(found: Verification) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "modules": [
            {
                "name": module.name,
                "spec": str(module.spec),
                "kernel": module.kernel,
                "executed_as": module.executed_as,
                "error": module.error,
                "bound": module.bound,
                "ok": module.ok,
                "problem": module.problem,
            }
            for module in found.modules
        ],
        "logits": found.logits
        and {
            "relative_difference": found.logits.relative_difference,
            "bound": found.logits.bound,
            "argmax_agreement": found.logits.argmax_agreement,
            "tokens": found.logits.tokens,
        },
        "activations_cost": found.activations_cost,
        "not_run": found.not_run,
        "not_checked": found.not_checked,
        "ok": found.ok,
        "first_problem": found.first_problem,
    }


def _lines(found: Verification) -> Iterator[str]:
    yield from _table([_TITLES, *_folded(found.modules)])
    yield ""
    yield "error and bound: shares of |x| |w|, of the result nearest to its bound"
    logits = found.logits
    if logits is not None:
        difference = "NaN" if logits.relative_difference is None else f"{logits.relative_difference:.1e}"
        same = round(logits.argmax_agreement * logits.tokens)
        yield (
            f"logits: differ by {difference} of their norm, bound {logits.bound:.1e};"
            f" the same most probable token after {same} of {logits.tokens}"
        )
    if found.activations_cost is not None:
        yield f"activations as asked take the logits {found.activations_cost:.1e} of their norm from those as stored"
    if found.not_run is not None:
        yield f"the whole model was not run: {found.not_run}"
    if found.not_checked:
        count, first = len(found.not_checked), found.not_checked[0]
        yield f"not checked, since fewbits doesn't run them: {count} modules, {first} first"
    if found.ok:
        checked = f"{len(found.modules)} modules" + (" and the logits" if logits is not None else "")
        yield f"ok: {checked} are within their bounds"
        return
    yield f"failed: {found.first_problem}"
    others = [f"also: {module.name}: {module.problem}" for module in found.modules if not module.ok][1:]
    yield from others[:_MOST_PROBLEMS]
    if len(others) > _MOST_PROBLEMS:
        yield f"and {len(others) - _MOST_PROBLEMS} more (--json lists them all)"


def _folded(modules: list[ModuleResult]) -> Iterator[tuple[str, ...]]:
    """One row for modules that differ only in the numbers of their names, the worst first; one for each problem."""
    groups: dict[tuple[object, ...], list[ModuleResult]] = {}
    for module in modules:
        pattern = ".".join("*" if part.isdigit() else part for part in module.name.split("."))
        alike = (pattern, module.spec, module.kernel, module.executed_as)
        groups.setdefault(alike if module.ok else (module.name,), []).append(module)
    for key, group in sorted(groups.items(), key=lambda item: max(map(_badness, item[1])), reverse=True):
        worst = max(group, key=_badness)
        name = str(key[0]) if len(group) > 1 else worst.name
        numbers = ("-", "-", "-")
        if worst.error is not None and worst.bound is not None:
            numbers = (f"{worst.error:.1e}", f"{worst.bound:.1e}", f"{_share(worst):.2f}")
        yield (name, str(len(group)), str(worst.spec), worst.kernel or worst.executed_as, *numbers)


def _badness(module: ModuleResult) -> tuple[bool, float]:
    return (not module.ok, _share(module))


def _share(module: ModuleResult) -> float:
    return module.error / module.bound if module.error is not None and module.bound else 0.0


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
