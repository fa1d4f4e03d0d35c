"""What a forward pass must do whatever the program, and the time that takes at the machine's limits.

The limit is the larger of two times: bytes that must be read (packed weights once, each sequence's cache once) over
the reading rate, and multiply-accumulates over the peak of the dot that computes them. Activations, norms, rotations,
the softmax and the embedding's rows cost nothing here. Experts are read if a token of the pass goes to them: as many as
that would be if each token chose at random.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewbits.kernels.arithmetic import Dot
from fewbits.kernels.batch import CacheLayer
from fewbits.models.attention import AnyAttention
from fewbits.plan import LoadPlan, Row


@dataclass(frozen=True, slots=True)
class Rates:
    """Of the machine: bytes a second, None where unknown; multiply-accumulates a second of the dots it has."""

    read: float | None
    dots: Mapping[Dot, float]


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes to read and multiply-accumulates by the dot that computes them."""

    nbytes: int
    macs: Mapping[Dot, int]

    def limit(self, rates: Rates) -> float | None:
        """Seconds below which the pass can't be; None where a rate that it takes isn't known."""
        if rates.read is None or not self.macs.keys() <= rates.dots.keys():
            return None
        return max(self.nbytes / rates.read, sum(count / rates.dots[dot] for dot, count in self.macs.items()))


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence in a pass: `new` tokens at the end of `entries` in the cache, and logits of the last of them."""

    new: int
    entries: int
    logits: int = 1


def pass_cost(planned: LoadPlan, layers: Sequence[CacheLayer], sequences: Sequence[Span], attention: Dot) -> Cost:
    """Of one pass over sequences; attention's products use `attention`."""
    tokens = sum(sequence.new for sequence in sequences)
    logits = sum(sequence.logits for sequence in sequences)
    macs: Counter[Dot] = Counter()
    nbytes = 0
    expected: defaultdict[Dot, float] = defaultdict(float)
    expected_bytes = 0.0
    for row in planned.rows:
        if row.kernel is None or not row.runs or row.kind not in ("linear", "head", "router", "expert"):
            continue
        whole, taken = row.execution.packed_bytes, row.matrix[0] * row.matrix[1]
        if row.kind == "expert":
            share = planned.model.share_of_tokens(row.name)
            expected_bytes += whole * (1 - (1 - share) ** tokens)
            expected[_dot(row)] += taken * tokens * share
            continue
        nbytes += whole
        macs[_dot(row)] += taken * (logits if row.kind == "head" else tokens)
    nbytes += round(expected_bytes)
    for dot, count in expected.items():
        macs[dot] += round(count)
    for config, layer in zip(planned.model.layers, layers, strict=True):
        for sequence in sequences:
            nbytes += layer.token_bytes * _seen_by_pass(sequence, layer.window)
            macs[attention] += _attention_macs(config.attention, sequence)
    return Cost(nbytes, +macs)


def _dot(row: Row) -> Dot:
    assert row.kernel is not None
    return row.kernel.arithmetic(row.runs_as, row.matrix).dot


def _seen_by_pass(sequence: Span, window: int) -> int:
    """Entries that at least one of the new tokens sees."""
    return min(sequence.entries, sequence.new + window - 1) if window else sequence.entries


def _attention_macs(config: AnyAttention, sequence: Span) -> int:
    """Of q k and of the weights times v, over what each token sees."""
    first = sequence.entries - sequence.new + 1
    seen = sum(min(entries, config.window or entries) for entries in range(first, sequence.entries + 1))
    return config.macs * seen
