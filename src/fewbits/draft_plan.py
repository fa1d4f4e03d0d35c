"""A drafter's plan beside its target's: which states it reads, and which modules of the target it takes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fewbits.checkpoint import TensorReader, open_checkpoint
from fewbits.errors import Notice, PlanError
from fewbits.models import family_for
from fewbits.models.eagle3 import Eagle3Config, Names, check_boundaries
from fewbits.plan import Execution, LoadPlan, Row, plan

ABSENT = "it isn't stored"
EQUAL = "its own is equal to it"


@dataclass(slots=True, eq=False)
class DraftPlan:
    """`boundaries` are the states of the target that it reads, `why` says who decided. `of_target` maps what it shares
    with the target, "embedding" and "head", to the reason; the rows of such modules don't run.
    """

    plan: LoadPlan
    boundaries: tuple[int, ...] = ()
    why: str = ""
    of_target: dict[str, str] = field(default_factory=dict)


def plan_draft(folder: str | Path, target: LoadPlan, boundaries: Sequence[int] | None = None) -> DraftPlan:
    """Plan a drafter for a target; `boundaries` replace those of its config. What doesn't fit is among the plan's
    errors: draft-not-a-drafter, draft-mismatch. Of weights only tables are read, to see whether they are equal; not
    where a folder has headers alone.

    Raises CheckpointError as `load.inspect` does.
    """
    checkpoint = open_checkpoint(folder)
    planned = plan(checkpoint, family_for(checkpoint.config))
    found = DraftPlan(planned)
    if planned.errors or planned.model is None or target.model is None:
        return found
    if not isinstance(planned.model, Eagle3Config):
        text = f"is a model of the {planned.family} family and no drafter"
        planned.errors.append(Notice("draft-not-a-drafter", str(checkpoint.folder), text))
        return found
    try:
        _read_states(found, target, planned.model, boundaries)
        _share(found, target, planned.model)
    except PlanError as error:
        planned.errors.append(error.notice())
    return found


def _read_states(found: DraftPlan, target: LoadPlan, config: Eagle3Config, boundaries: Sequence[int] | None) -> None:
    model = target.model
    for key, own, its in (
        ("vocab_size", config.vocab, model.vocab),
        ("target_hidden_size", config.target_hidden, model.hidden),
    ):
        if own != its:
            raise PlanError("draft-mismatch", f"{key} is {own}, and the target's {its} (config.json)")
    rows = {row.name: row for row in found.plan.rows}
    fc = Names(rows).fc
    width, layers = rows[fc].shape[1], len(model.layers)
    states, rest = divmod(width, config.target_hidden)
    if rest or not states:
        text = f"takes in {width} numbers, which aren't states of {config.target_hidden}"
        raise PlanError("draft-mismatch", text, module=fc)
    if boundaries is None:
        found.boundaries, found.why = config.layer_ids.boundaries(layers, states)
        return
    if len(boundaries) != states:
        raise PlanError("draft-mismatch", f"takes in {states} states, not {len(boundaries)}", module=fc)
    check_boundaries(tuple(boundaries), layers)
    found.boundaries, found.why = tuple(boundaries), "as asked"


def _share(found: DraftPlan, target: LoadPlan, config: Eagle3Config) -> None:
    planned = found.plan
    assert planned.checkpoint is not None and target.checkpoint is not None
    rows, its_rows = ({row.name: row for row in one.rows} for one in (planned, target))
    names = Names(rows)
    readable = not (planned.checkpoint.header_only or target.checkpoint.header_only)
    with planned.checkpoint.reader() as own, target.checkpoint.reader() as theirs:
        for part, name, its_name in (
            ("embedding", names.embedding, "model.embed_tokens"),
            ("head", names.head, "lm_head"),
        ):
            row = rows[name]
            if not row.runs:
                if config.hidden != target.model.hidden:
                    text = f"isn't stored, and the target's is {target.model.hidden} wide, the drafter {config.hidden}"
                    raise PlanError("draft-mismatch", text, module=name)
                found.of_target[part] = ABSENT
            elif readable and _equal(row, own, its_rows[its_name], theirs):
                found.of_target[part] = EQUAL
                rows[name] = row._replace(execution=Execution("not_run", f"the target's takes its place: {EQUAL}"))
    planned.rows = list(rows.values())


def _equal(row: Row, own: TensorReader, its: Row, theirs: TensorReader) -> bool:
    """Whether two modules are stored with the same bytes; spec, codes and scales are equal then."""
    if row.spec != its.spec or row.shape != its.shape or set(row.suffixes) != set(its.suffixes):
        return False
    for suffix in row.suffixes:
        mine, other = own.stored(*row.source(suffix)).mapped(), theirs.stored(*its.source(suffix)).mapped()
        if mine.dtype != other.dtype or mine.shape != other.shape:
            return False
        if not np.array_equal(mine.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)):
            return False
    return True
