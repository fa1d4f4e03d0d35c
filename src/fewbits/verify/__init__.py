"""Does a checkpoint compute what its numbers say? Every module's kernel against the definition, then the logits.

What the data of a module shows to be bad is a finding, with the module's name. What headers and config show, and
files that can't be read, end the check with a FewbitsError as they end `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fewbits.checkpoint import open_checkpoint
from fewbits.errors import Notice, PlanError
from fewbits.load import Progress
from fewbits.models import family_for
from fewbits.plan import plan, require_runnable
from fewbits.plan.activations import Activations
from fewbits.verify.model import LogitsResult, compare_logits, loaded_logits, reference_logits, relative_difference
from fewbits.verify.modules import ModuleChecks, ModuleResult, Stopped

__all__ = ["LogitsResult", "ModuleResult", "Verification", "verify"]


@dataclass(slots=True)
class Verification:
    """`modules` in the order of the forward pass; `not_checked` names those that fewbits doesn't run. `not_run` says
    why there are no logits. `activations_cost` is how far activations that were asked for take the logits from those of
    the checkpoint as it is stored, a share of their norm.
    """

    modules: list[ModuleResult] = field(default_factory=list)
    logits: LogitsResult | None = None
    not_run: str | None = None
    not_checked: list[str] = field(default_factory=list)
    activations_cost: float | None = None
    warnings: list[Notice] = field(default_factory=list)

    @property
    def first_problem(self) -> str | None:
        for module in self.modules:
            if not module.ok:
                return f"{module.name}: {module.problem}"
        return None if self.logits is None else self.logits.problem

    @property
    def ok(self) -> bool:
        return self.first_problem is None


def verify(
    folder: str | Path, progress: Progress = lambda done, total: None, activations: Activations = "stored"
) -> Verification:
    """Check a checkpoint folder; modules without a native kernel are checked in the reference.

    `progress` is called with (bytes of tensors done, bytes in all). Raises CheckpointError and PlanError as `load`
    does, but not for an unknown family: its modules are checked one by one.
    """
    checkpoint = open_checkpoint(folder)
    planned = plan(checkpoint, family_for(checkpoint.config), activations)
    if planned.model is not None or planned.errors:
        require_runnable(planned, allow_reference=True)
    elif checkpoint.header_only:
        raise PlanError("header-only", "the files have headers but no data", module=str(checkpoint.folder))
    # Over the tensors: the checks, loading, and loading as stored.
    passes = 1 if planned.model is None else 2 if activations == "stored" else 3

    found = Verification(warnings=[*planned.warnings])
    found.not_checked = [row.name for row in planned.rows if not row.runs]
    logits = None
    with np.errstate(all="ignore"):  # what isn't finite is found and named
        with checkpoint.reader(reuse=True) as reader:
            checks = ModuleChecks(planned, reader, lambda done, total: progress(done, passes * total))
            try:
                logits, chosen = reference_logits(planned, checks)
            except Stopped as stop:
                found.not_run = str(stop)
            checks.check_the_rest()
        if logits is not None:
            ours = loaded_logits(
                checkpoint, activations, chosen, lambda done, total: progress(total + done, passes * total)
            )
            found.logits = compare_logits(logits, ours)
            if activations != "stored":
                stored = loaded_logits(
                    checkpoint, "stored", chosen, lambda done, total: progress(2 * total + done, passes * total)
                )
                found.activations_cost = relative_difference(ours, stored)
    found.modules = checks.results()
    found.warnings += checks.warnings
    return found
