"""A drafter's checkpoint, loaded beside its target: its own plan, its own specs, and the target's modules where the two
share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.draft_plan import DraftPlan, plan_draft
from fewbits.errors import Notice, PlanError
from fewbits.kernels.batch import CacheLayer
from fewbits.load import Loaded, kv_scales, pack
from fewbits.models.eagle3 import Drafter, DraftHead, Eagle3Config, Names
from fewbits.plan import require_runnable

_SAMPLED_ROWS = 64  # of two embeddings, to see whether they have anything in common
_UNLIKE = 0.1  # mean cosine; that of unrelated tables is near 0


@dataclass(slots=True, eq=False)
class LoadedDrafter:
    """A drafter, ready to run."""

    planned: DraftPlan
    drafter: Drafter
    cache_layers: tuple[CacheLayer, ...]
    notices: list[Notice]


def load_drafter(
    folder: str | Path,
    target: Loaded,
    allow_reference: bool = False,
    boundaries: Sequence[int] | None = None,
    threads: int = 1,
) -> LoadedDrafter:
    """Plan and load a drafter for a target; `boundaries` replace those of its config.

    Raises CheckpointError and PlanError: those of its plan beside the target's, draft-vocabulary, and those of `load`.
    """
    ops = target.ops
    found = plan_draft(folder, target.plan, boundaries)
    planned, config = found.plan, found.plan.model
    require_runnable(planned, allow_reference or ops.name == "reference")
    assert isinstance(config, Eagle3Config) and planned.checkpoint is not None
    names = Names({row.name for row in planned.rows})
    with planned.checkpoint.reader() as own:
        scales = kv_scales(planned, own)
        ids = _ids(config, own.read(names.offsets).reshape(-1)) if config.reduced else None
    params, notices = pack(planned, planned.rows, ops, allow_reference, None, threads)
    its_table = target.params["model.embed_tokens"]
    embedding = its_table if "embedding" in found.of_target else params[names.embedding]
    of_target = "head" in found.of_target
    head = DraftHead(target.params["lm_head"] if of_target else params[names.head], ids, of_target and ids is not None)
    if "embedding" not in found.of_target and config.hidden == target.decoder.config.hidden:
        notices += _unlike(embedding, its_table, config.vocab, names.embedding)
    drafter = Drafter(config, params, embedding, head, len(found.boundaries), ops)
    return LoadedDrafter(found, drafter, config.cache_layers(planned.cache_dtype, scales), notices)


def _ids(config: Eagle3Config, offsets: NDArray[Any]) -> NDArray[np.int64]:
    """The target's ids of the draft vocabulary: i + d2t[i]."""
    ids = np.arange(len(offsets)) + offsets.astype(np.int64)
    if len(ids) and (ids[0] < 0 or ids[-1] >= config.vocab or (np.diff(ids) <= 0).any()):
        place = int(np.argmax(np.diff(ids, prepend=-1) <= 0))
        text = (
            f"gives row {place} the token {int(ids[place])}: offsets make ids that rise, and end below {config.vocab}"
        )
        raise PlanError("draft-vocabulary", text, module="d2t")
    return ids


def _unlike(mine: Any, other: Any, vocab: int, name: str) -> list[Notice]:
    """A warning where the drafter's embedding has nothing in common with the target's."""
    some = np.linspace(0, vocab - 1, min(_SAMPLED_ROWS, vocab)).astype(np.int64)
    rows = [np.asarray(kernel.bind([packed])(some), np.float64) for kernel, packed in (mine, other)]
    norms = [np.linalg.norm(one, axis=1) for one in rows]
    known = (norms[0] > 0) & (norms[1] > 0)
    cosines = (rows[0] * rows[1]).sum(axis=1)[known] / (norms[0] * norms[1])[known]
    likeness = float(cosines.mean()) if known.any() else 0.0
    if likeness >= _UNLIKE:
        return []
    text = f"differs from the target's and has nothing in common with it (mean cosine {likeness:.2f}); it is kept"
    return [Notice("draft-embedding", name, text)]
