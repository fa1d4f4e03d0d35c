"""What must hold of any folder: it is planned, printed and run, or explained; nothing is forgotten, nothing twice."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np

import fewbits
from fewbits import load, report
from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import FewbitsError
from fewbits.kernels.ops import Ops
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.plan import LoadPlan


def total(plan: LoadPlan) -> None:
    """Every tensor is claimed by one module or left over. Rows of stacked experts and tied heads share theirs."""
    assert plan.checkpoint is not None
    owners: dict[str, str] = {}
    for row in plan.rows:
        for name in row.tensors:
            assert owners.setdefault(name, row.stored) == row.stored, f"{name} is claimed twice"
    left = set(plan.leftover_tensors)
    assert len(left) == len(plan.leftover_tensors) and not left & owners.keys()
    assert left | owners.keys() == plan.checkpoint.tensors.keys()


def planned(folder: Path) -> LoadPlan | None:
    """The plan, total and printable; None where the folder is refused."""
    try:
        plan = fewbits.inspect(folder)
    except FewbitsError as error:
        assert str(error)
        return None
    total(plan)
    json.dumps(report.to_json(plan), allow_nan=False)
    report.print_table(plan, io.StringIO())
    return plan


def run(folder: Path, ops: Ops | None = None) -> bool:
    """Two tokens through the model, by the reference unless told otherwise; False where it is refused."""
    plan = planned(folder)
    if plan is None:
        return False
    try:
        loaded = load.load(folder, allow_reference=True, ops=ops or ReferenceOps())
    except FewbitsError as error:
        assert str(error)
        return False
    cache = KVCache(loaded.cache_layers, max_pages=1)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers overflow where scales are absurd
        logits = loaded.decoder.forward(cache.batch([Part(0, [1, 2], 2)]), cache).logits
    assert logits.shape == (2, loaded.decoder.config.vocab)
    return True
