"""A drafter's checkpoint beside its loaded target: its own plan, its own specs, and what the two share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint import TensorReader, open_checkpoint
from fewbits.errors import Notice, PlanError
from fewbits.kernels.batch import CacheLayer
from fewbits.load import Loaded, kv_scales, pack
from fewbits.models import family_for
from fewbits.models.eagle3 import Drafter, Eagle3Config, Names, check_boundaries
from fewbits.plan import LoadPlan, Row, plan, require_runnable

_SAMPLED_ROWS = 64  # of two embeddings, to see whether they have anything in common
_UNLIKE = 0.1  # mean cosine; that of unrelated tables is near 0


@dataclass(slots=True, eq=False)
class LoadedDrafter:
    """A drafter, ready to run. `ids` int64 [draft vocabulary] are the target's ids of its tokens, None where they are
    the same. `boundaries` are the states of the target that it reads, `why` says who decided. `of_target` maps what it
    shares with the target, "embedding" and "head", to the reason. `from_columns`: the head is the target's, whose
    logits at `ids` are the drafter's.
    """

    plan: LoadPlan
    drafter: Drafter
    cache_layers: tuple[CacheLayer, ...]
    boundaries: tuple[int, ...]
    why: str
    ids: NDArray[np.int64] | None
    of_target: dict[str, str]
    from_columns: bool
    notices: list[Notice]


def load_drafter(
    folder: str | Path,
    target: Loaded,
    allow_reference: bool = False,
    boundaries: Sequence[int] | None = None,
    threads: int = 1,
) -> LoadedDrafter:
    """Plan and load a drafter for a target; `boundaries` replace those of its config.

    Raises CheckpointError and PlanError: draft-not-a-drafter, draft-mismatch, draft-vocabulary, and those of `load`.
    """
    checkpoint = open_checkpoint(folder)
    planned = plan(checkpoint, family_for(checkpoint.config))
    config, ops = planned.model, target.ops
    if planned.model is not None and not isinstance(config, Eagle3Config):
        text = f"is a model of the {planned.family} family and no drafter"
        raise PlanError("draft-not-a-drafter", text, module=str(checkpoint.folder))
    require_runnable(planned, allow_reference or ops.name == "reference")
    assert isinstance(config, Eagle3Config)
    rows = {row.name: row for row in planned.rows}
    names = Names(rows)
    _fits(config, target)
    width = rows[names.fc].shape[1]
    states, rest = divmod(width, config.target_hidden)
    if rest or not states:
        text = f"takes in {width} numbers, which aren't states of {config.target_hidden}"
        raise PlanError("draft-mismatch", text, module=names.fc)
    layers = len(target.decoder.config.layers)
    if boundaries is None:
        chosen, why = config.layer_ids.boundaries(layers, states)
    else:
        chosen, why = tuple(boundaries), "as asked"
        if len(chosen) != states:
            raise PlanError("draft-mismatch", f"takes in {states} states, not {len(chosen)}", module=names.fc)
        check_boundaries(chosen, layers)

    notices: list[Notice] = []
    of_target: dict[str, str] = {}
    with checkpoint.reader() as own, target.checkpoint.reader() as theirs:
        for part, name, module in (
            ("embedding", names.embedding, "model.embed_tokens"),
            ("head", names.head, "lm_head"),
        ):
            row, its = rows[name], next(row for row in target.plan.rows if row.name == module)
            if not row.runs:
                of_target[part] = "it isn't stored"
            elif _equal(row, own, its, theirs):
                of_target[part] = "its own is equal to it"
        scales = kv_scales(planned, own)
        ids = _ids(config, own.read(names.offsets).reshape(-1)) if config.reduced else None
    for part, name in (("embedding", names.embedding), ("head", names.head)):
        if part in of_target and config.hidden != target.decoder.config.hidden:
            text = f"isn't stored, and the target's is {target.decoder.config.hidden} wide, the drafter {config.hidden}"
            raise PlanError("draft-mismatch", text, module=name)
    shared = {name for part, name in (("embedding", names.embedding), ("head", names.head)) if part in of_target}
    needed = [row for row in planned.rows if row.name not in shared]
    params, found = pack(planned, needed, ops, allow_reference, None, threads)
    embedding = target.params["model.embed_tokens"] if "embedding" in of_target else params[names.embedding]
    head = target.params["lm_head"] if "head" in of_target else params[names.head]
    if "embedding" not in of_target and config.hidden == target.decoder.config.hidden:
        notices += _unlike(embedding, target.params["model.embed_tokens"], config.vocab, names.embedding)
    drafter = Drafter(config, params, embedding, head, ops)
    from_columns = "head" in of_target and ids is not None
    layers_kept = config.cache_layers(planned.cache_dtype, scales)
    return LoadedDrafter(planned, drafter, layers_kept, chosen, why, ids, of_target, from_columns, [*found, *notices])


def _fits(config: Eagle3Config, target: Loaded) -> None:
    model = target.decoder.config
    for key, own, its in (
        ("vocab_size", config.vocab, model.vocab),
        ("target_hidden_size", config.target_hidden, model.hidden),
    ):
        if own != its:
            raise PlanError("draft-mismatch", f"{key} is {own}, and the target's {its}", source=f"config.json, {key}")


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
