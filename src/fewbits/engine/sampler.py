"""From logits to the next token, in the order of vLLM's sampler.

    minimum length, bias → repetition, frequency, presence penalties → greedy, or
    temperature → min-p → top-k → top-p → one uniform number picks the token

One number per token is drawn from the request's own generator, so a request's tokens don't depend on what
else is in the batch. `distribution` is the definition of what is sampled from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.engine.request import Request, SamplingParams
from fewbits.errors import CheckpointError, UsageError

Array = NDArray[Any]

_BLOCK = 256  # logits whose maximum is looked at first, where the largest are wanted
GREEDY_BELOW = 1e-5  # temperatures below divide logits into infinities; vLLM's border


def adjust(
    logits: Array,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    end_ids: Collection[int] = (),
) -> Array:
    """Logits float32 [V] → a new float32 [V] with minimum length, bias and penalties applied.

    Raises UsageError for ids of the bias that aren't rows of the head.
    """
    logits = logits.astype(np.float32)
    size = len(logits)
    if len(output_ids) < params.min_tokens:
        logits[[token for token in end_ids if token < size]] = -np.inf
    for token, bias in params.logit_bias.items():
        if not 0 <= token < size:
            raise UsageError("token-out-of-range", f"logit_bias names token {token}, but the head has {size} rows")
        logits[token] += np.float32(bias)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*prompt_ids, *output_ids], np.int64))
        seen = seen[seen < size]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if output_ids and (params.frequency_penalty or params.presence_penalty):
        tokens, counts = np.unique(np.array(output_ids, np.int64), return_counts=True)
        logits[tokens] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        logits[tokens] -= np.float32(params.presence_penalty)
    return logits


def distribution(logits: Array, params: SamplingParams) -> Array:
    """Adjusted logits [V] → what is sampled from: probabilities float64 [V]. Temperature must not be 0."""
    kept, p = _kept(logits, params)
    whole = np.zeros(len(logits))
    whole[slice(None) if kept is None else kept] = p
    return whole


def _kept(logits: Array, params: SamplingParams) -> tuple[Array | None, Array]:
    """Adjusted logits [V] → the tokens that stay, in order (None: all), and their probabilities."""
    scaled = logits / np.float32(params.temperature)
    lowest = -np.inf
    if params.min_p > 0.0:  # p >= min_p * p_max, before the exponential
        lowest = float(scaled.max()) + math.log(params.min_p)
    if 0 < params.top_k < len(scaled):  # tokens equal to the k-th all stay
        lowest = max(lowest, _kth_largest(scaled, params.top_k))
    kept = None if lowest == -np.inf else np.flatnonzero(scaled >= lowest)
    p = _softmax(scaled if kept is None else scaled[kept])
    if params.top_p < 1.0:
        stay = _top_p(p, params.top_p)
        p[~stay] = 0.0
        p = (p / p.sum())[stay]
        kept = np.flatnonzero(stay) if kept is None else kept[stay]
    return kept, p


def _kth_largest(x: Array, k: int) -> float:
    # k blocks have a number at or above the k-th largest of the blocks' maxima, so that the k-th of all is there too:
    # few others are.
    whole = x[: len(x) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    if k < len(whole):
        x = x[x >= np.partition(whole.max(axis=1), -k)[-k]]
    return float(np.partition(x, -k)[-k])


def _softmax(logits: Array) -> Array:
    p: Array = np.exp(logits - logits.max()).astype(np.float64)
    p /= p.sum()
    return p


def _top_p(p: Array, top_p: float) -> Array:
    """Which tokens stay, bool [V]: from the least probable on, those go whose cumulative share is ≤ 1 -
    top_p.

    Shares are compared in float32, where the usual ties (.05 + .15 against 1 - .8) come out as written. Of
    equally probable tokens the higher ids go first; the best token always stays.
    """
    # Whatever is below the average of the part that goes lies in that part: only the rest must be sorted. Where all are
    # equal and top_p vanishes beside 1, the average is the best one's.
    ascending = p[p > min((1.0 - top_p) / len(p), float(np.nextafter(p.max(), 0.0)))]
    below = 1.0 - ascending.sum()
    ascending.sort()
    share = (below + np.cumsum(ascending)).astype(np.float32)
    gone = min(int(np.searchsorted(share, np.float32(1.0 - top_p), side="right")), len(ascending) - 1)
    border = ascending[gone]  # the least probable that stays
    keep: Array = p >= border
    equals_gone = gone - int(np.searchsorted(ascending, border))
    if equals_gone:
        keep[np.flatnonzero(p == border)[-equals_gone:]] = False
    return keep


def pick(p: Array, uniform: float) -> int:
    """The token at `uniform` (in [0, 1)) of the cumulative distribution; never one of probability 0."""
    cumulative = np.cumsum(p)
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # The product may round up to the whole.
    return token if token < len(p) else int(np.flatnonzero(p)[-1])


def sample(logits: Array, best: int, request: Request) -> int:
    """The request's next token from its row of logits, float32 [V], whose `Ops.argmax` is `best`.

    Raises CheckpointError where the model computed something that isn't a number.
    """
    highest = logits[best]
    if not np.isfinite(highest):
        raise CheckpointError(
            "logits-not-finite",
            f"the model computed {highest} for token {request.computed} of a sequence",
            hint="fewbits inspect shows which layers are quantized and how; scales that overflow do this",
        )
    params = request.params
    if params.adjusts:
        logits = adjust(logits, params, request.prompt_ids, request.output_ids, request.end_ids)
        best = int(logits.argmax())
    if params.temperature < GREEDY_BELOW:
        return best
    kept, p = _kept(logits, params)
    token = pick(p, request.generator.random())
    return token if kept is None else int(kept[token])
