"""What is asked for, what is under way, what came out.

`SamplingParams` is one request's wish, `Request` its state between two steps, `Result` the answer.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from fewbits.engine.detokenize import TextStream
from fewbits.errors import FewbitsError, UsageError

FinishReason = Literal["stop", "length"]

# (name, lowest, highest) of every number that has a range; the penalties' are OpenAI's.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, 2**31),
    ("min_tokens", 0, 2**31),
    ("temperature", 0.0, 100.0),
    ("top_k", -1, 2**31),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-3, 1e3),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and where its text ends.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 keep every token. `repetition_penalty`
    counts prompt and output, the other two only output. `seed` None draws a fresh one. `stop` strings are cut
    from the text. `logit_bias` maps token ids to what is added to their logits. Raises UsageError for values
    out of range.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, lowest, highest in _RANGES:
            value = getattr(self, name)
            if not lowest <= value <= highest:  # NaN fails too
                raise UsageError("sampling-range", f"{name} is {value}, but must lie in {lowest:g} … {highest:g}")
        if self.top_p == 0.0:
            raise UsageError("sampling-range", "top_p is 0, which keeps no token", hint="use temperature 0 for greedy")
        if self.seed is not None and self.seed < 0:
            raise UsageError("sampling-range", f"seed is {self.seed}, but can't be negative")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stop:
            raise UsageError("sampling-range", "an empty stop string would end every text before it begins")
        object.__setattr__(self, "stop", stop)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return bool(self.min_tokens or self.logit_bias or penalties)


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request. `result.text` and `result["text"]` are the same; `dict(result)` is what `run
    --json` prints.

    `token_ids` are the generated ones without the end token. Rates are tokens per second of this request's
    own wall-clock time, None where nothing was timed (a single token has no decode rate).
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    speculation: dict[str, Any] | None = None

    def keys(self) -> Iterator[str]:
        return (item.name for item in fields(self))

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass(slots=True)
class Speculation:
    """What became of a request's draft tokens.

    `passes` are those that gave it tokens, behind the one that ended its prompt, and `tokens` what they gave; in
    `rounds` of them there were draft tokens to verify. `accepted[i]` counts rounds whose draft token i was accepted.
    """

    passes: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: list[int] = field(default_factory=list)

    def count(self, drafted: int, accepted: int, tokens: int) -> None:
        """A pass over so many draft tokens, of which the first `accepted` were; it gave `tokens`."""
        self.passes += 1
        self.tokens += tokens
        self.rounds += drafted > 0
        self.drafted += drafted
        self.accepted += [0] * (drafted - len(self.accepted))
        for position in range(accepted):
            self.accepted[position] += 1

    def add(self, other: Speculation) -> None:
        """Count what another has counted, too."""
        self.passes += other.passes
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.drafted += other.drafted
        pairs = itertools.zip_longest(self.accepted, other.accepted, fillvalue=0)
        self.accepted = [mine + its for mine, its in pairs]

    @property
    def acceptance(self) -> float | None:
        """Accepted draft tokens of those drafted."""
        return sum(self.accepted) / self.drafted if self.drafted else None

    def summary(self) -> dict[str, Any]:
        """As `run --json` prints it."""
        return {
            "drafted": self.drafted,
            "accepted": sum(self.accepted),
            "acceptance": self.acceptance,
            "per_position": [count / self.rounds for count in self.accepted],
            "mean_tokens_per_pass": self.tokens / self.passes if self.passes else None,
        }


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way. Tokens [0, computed) of prompt + output are in the cache.

    `draft_ids` are guesses at the tokens behind the output, for the next pass to verify. `speculation` is None where
    nobody drafts.
    """

    sequence: int
    prompt_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    length_limit: int
    text: TextStream | None
    submitted_at: float
    generator: np.random.Generator = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)
    speculation: Speculation | None = None
    computed: int = 0
    sampled: int = 0
    told: int = 0  # tokens of the output whose text is in `pieces`, or held back
    finish_reason: FinishReason | None = None
    error: FewbitsError | None = None
    pieces: deque[str] = field(default_factory=deque)
    started_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.generator = np.random.Generator(np.random.Philox(self.params.seed))

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def pending(self) -> int:
        """Tokens that are known but not in the cache yet; the last one's logits choose the next token."""
        return len(self.prompt_ids) + len(self.output_ids) - self.computed

    def known_ids(self, begin: int, end: int) -> list[int]:
        """Tokens [begin, end) of prompt + output."""
        in_prompt = self.prompt_ids[begin:end]
        if len(in_prompt) == end - begin:
            return in_prompt
        prompt = len(self.prompt_ids)
        return in_prompt + self.output_ids[max(begin - prompt, 0) : end - prompt]

    def next_ids(self, count: int) -> list[int]:
        """The first `count` tokens that aren't in the cache: those pending, then drafted ones."""
        pending = self.known_ids(self.computed, self.computed + min(count, self.pending))
        return pending + self.draft_ids[: count - len(pending)]

    def accept(self, token: int, now: float) -> None:
        """Takes a sampled token and sets `finish_reason` where it ends; `tell` adds the text that it completes to
        `pieces`.

        The order of the checks is vLLM's: end token, then the number of tokens, then stop strings in the
        text.
        """
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        self.sampled += 1
        if token in self.end_ids and len(self.output_ids) >= self.params.min_tokens:
            self._finish("stop")
            return
        self.output_ids.append(token)
        if self.text is not None and self.text.searched:
            self.tell()
            if self.text.stopped:
                self.finish_reason = "stop"
                return
        if len(self.output_ids) >= self.length_limit:
            self._finish("length")

    def tell(self) -> None:
        """Adds the text of tokens accepted since the last time: all of a pass at once, where no string ends it."""
        if self.text is not None and self.told < len(self.output_ids):
            new = self.output_ids[self.told :]
            self.told = len(self.output_ids)
            self._emit(self.text.feed(new, search=self.told > self.params.min_tokens))

    def _finish(self, reason: FinishReason) -> None:
        self.tell()
        self.finish_reason = reason
        if self.text is not None:
            self._emit(self.text.finish(search=len(self.output_ids) > self.params.min_tokens))
            if self.text.stopped:
                self.finish_reason = "stop"

    def _emit(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)

    def result(self) -> Result:
        """What `accept` has gathered so far; also of a request that was cut short."""
        prefill = self.first_token_at - self.started_at
        decode = self.last_token_at - self.first_token_at
        tokens = self.sampled - 1  # the first token belongs to the prefill; an end token was computed as well
        return Result(
            text="" if self.text is None else self.text.text,
            token_ids=list(self.output_ids),
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.output_ids),
            finish_reason=self.finish_reason or "length",
            prefill_tokens_per_s=len(self.prompt_ids) / prefill if prefill > 0 else None,
            decode_tokens_per_s=tokens / decode if tokens > 0 and decode > 0 else None,
            speculation=None if self.speculation is None else self.speculation.summary(),
        )
