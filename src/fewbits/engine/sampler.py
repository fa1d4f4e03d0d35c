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
    scaled = logits / np.float32(params.temperature)
    lowest = -np.inf
    if params.min_p > 0.0:  # p >= min_p * p_max, before the exponential
        lowest = float(scaled.max()) + math.log(params.min_p)
    if 0 < params.top_k < len(scaled):  # tokens equal to the k-th all stay
        lowest = max(lowest, float(np.partition(scaled, -params.top_k)[-params.top_k]))
    kept: Any = slice(None) if lowest == -np.inf else np.flatnonzero(scaled >= lowest)
    p = _softmax(scaled[kept])
    if params.top_p < 1.0:
        p[~_top_p(p, params.top_p)] = 0.0
        p /= p.sum()
    whole = np.zeros(len(logits))
    whole[kept] = p
    return whole


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
    # Whatever is below the average of the part that goes lies in that part: only the rest must be sorted.
    keep = p > (1.0 - top_p) / len(p)
    candidates = np.flatnonzero(keep)
    below = 1.0 - p[candidates].sum()
    ascending = candidates[np.argsort(-p[candidates], kind="stable")][::-1]
    share = (below + np.cumsum(p[ascending])).astype(np.float32)
    gone = share <= np.float32(1.0 - top_p)
    gone[-1:] = False
    keep[ascending[gone]] = False
    return keep


def pick(p: Array, uniform: float) -> int:
    """The token at `uniform` (in [0, 1)) of the cumulative distribution; never one of probability 0."""
    cumulative = np.cumsum(p)
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(token, int(np.flatnonzero(p)[-1]))


def sample(logits: Array, request: Request) -> int:
    """The request's next token from its row of logits, float32 [V].

    Raises CheckpointError where the model computed something that isn't a number.
    """
    highest = logits.max()
    if not np.isfinite(highest):
        raise CheckpointError(
            "logits-not-finite",
            f"the model computed {highest} for token {request.computed} of a sequence",
            hint="fewbits inspect shows which layers are quantized and how; scales that overflow do this",
        )
    params = request.params
    logits = adjust(logits, params, request.prompt_ids, request.output_ids, request.end_ids)
    if params.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    return pick(distribution(logits, params), request.generator.random())
