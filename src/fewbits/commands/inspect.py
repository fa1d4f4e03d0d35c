"""`fewbits inspect`: the plan of a checkpoint, of a drafter beside it too, or this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TypeVar

from fewbits import hub, load, report
from fewbits.commands.numbers import numbers
from fewbits.draft_plan import DraftPlan, plan_draft
from fewbits.errors import FewbitsError, UsageError
from fewbits.plan import LoadPlan, failed

Plan = TypeVar("Plan", LoadPlan, DraftPlan)


def run(arguments: argparse.Namespace) -> int:
    if arguments.system:
        if arguments.checkpoint is not None:
            raise UsageError("usage", "--system describes the machine; leave the checkpoint out")
        return _system(arguments.json)
    if arguments.checkpoint is None:
        raise UsageError("usage", "there is nothing to inspect", hint="fewbits inspect FOLDER, or --system")
    if arguments.draft is None and arguments.draft_layers is not None:
        raise UsageError("usage", "there is no drafter: --draft-layers needs --draft")
    layers = None if arguments.draft_layers is None else numbers(arguments.draft_layers, "--draft-layers")
    plan = _read(
        arguments, lambda: load.inspect(hub.resolve(arguments.checkpoint), arguments.activations), lambda plan: plan
    )
    draft = None
    if arguments.draft is not None:
        draft = _read(arguments, lambda: plan_draft(hub.resolve(arguments.draft), plan, layers), DraftPlan)
    if arguments.json:
        report.write_json(plan, sys.stdout, draft)
    else:
        report.print_table(plan, sys.stdout)
        if draft is not None:
            print("\ndrafter:")
            report.print_draft(draft, sys.stdout)
    return 2 if plan.errors or (draft is not None and draft.plan.errors) else 0


def _read(arguments: argparse.Namespace, read: Callable[[], Plan], unread: Callable[[LoadPlan], Plan]) -> Plan:
    """The plan; for a script also of a folder that can't be read, with nothing but the reason."""
    try:
        return read()
    except FewbitsError as error:
        if not arguments.json:
            raise
        print(report.failure_text(error), file=sys.stderr)
        return unread(failed(error))


def _system(as_json: bool) -> int:
    from fewbits.engine import machine

    found = machine.describe()
    if as_json:
        print(json.dumps(found))
        return 0
    cpu, memory, limits = found["cpu"], found["memory"], found["limits"]
    lines = (
        ("fewbits", f"{found['version']} (Python {found['python']}, {found['platform']})"),
        ("CPU features", " ".join(cpu["features"]) or "none that kernels use"),
        ("kernels", f"{cpu['tier']} (of {', '.join(cpu['tiers'])})"),
        ("threads", str(found["threads"])),
        ("last-level cache", _size(cpu["last_level_cache"])),
        ("free memory", _size(memory["available"])),
        ("read rate", "not measured" if limits["read_gb_s"] is None else f"{limits['read_gb_s']} GB/s"),
        *((f"{dot} peak", f"{rate} GMAC/s") for dot, rate in limits["dot_gmac_s"].items()),
    )
    for name, value in lines:
        print(f"{name:<18}{value}")
    return 0


def _size(count: int | None) -> str:
    return "unknown" if count is None else report.gigabytes(count)
