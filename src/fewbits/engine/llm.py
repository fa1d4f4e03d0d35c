"""LLM: a checkpoint that is loaded and answers prompts. The public face of the engine.

prompts → requests → scheduler → step (batch, forward, sample) → text, until every request is done
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fewbits import hub, load
from fewbits.engine import chat, generation_config, limits, machine, runner
from fewbits.engine.detokenize import TextStream
from fewbits.engine.kvcache import PAGE_SIZE, KVCache, Part
from fewbits.engine.request import Request, Result, SamplingParams, Speculation
from fewbits.engine.scheduler import MAX_RUNNING, Scheduler
from fewbits.engine.speculative.driver import Driver
from fewbits.engine.speculative.eagle import LEAST, Eagle
from fewbits.engine.speculative.lengths import Adaptive, Fixed, Lengths, Whole
from fewbits.engine.speculative.mtp import Mtp
from fewbits.engine.speculative.ngram import NGram
from fewbits.engine.speculative.proposer import Proposer
from fewbits.engine.tokenizer import Tokenizer
from fewbits.errors import CheckpointError, Notice, UsageError
from fewbits.kernels.batch import CacheDtype, CacheLayer
from fewbits.load import Loaded
from fewbits.load_drafter import LoadedDrafter, load_drafter
from fewbits.models.mtp import MtpModule
from fewbits.plan.activations import Activations

Prompt = str | Sequence[int]

NGRAM, MTP = "ngram", "mtp"  # in the place of a drafter's folder

KV_DTYPES: tuple[CacheDtype, ...] = ("f32", "bf16", "f16", "int8")  # those that need no scales of the checkpoint

_MOST_DRAFT_TOKENS = 128  # vLLM's limit
_CACHE_SHARE = 2  # of the memory that is free after loading, one part in this many may become cache
_UNKNOWN_MEMORY = 8 << 30


class LLM:
    """A loaded model.

    `checkpoint` is a folder or a hub id. `allow_reference` runs layers without a native kernel in NumPy,
    slowly; `activations` "int8" quantizes the inputs of integer weights, which the checkpoint doesn't say, for speed;
    `threads` sizes the pool of native threads for the whole process; `kv_dtype` ("f32", "bf16", "f16" or
    "int8") keeps the cache in another way than the checkpoint says; `progress` is called with (bytes
    done, bytes in all) while loading. Not for use by several threads at once. Raises FewbitsError, explained,
    where the checkpoint can't be run faithfully.

    `draft` names what guesses tokens ahead, which the model then verifies several at a time: the folder or hub id of an
    Eagle3 drafter, "ngram", which looks up what followed earlier in the text, or "mtp", the model's own modules for
    multi-token prediction. Results are the same as without, only sooner. `draft_tokens` are guessed at a time, as many
    as pay where it is None. `draft_layers` are the numbers of layers behind which an Eagle3 drafter reads the model's
    states, instead of those of its config.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        allow_reference: bool = False,
        activations: Activations = "stored",
        threads: int | None = None,
        kv_dtype: CacheDtype | None = None,
        draft: str | Path | None = None,
        draft_tokens: int | None = None,
        draft_layers: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if draft_tokens is not None and not 1 <= draft_tokens <= _MOST_DRAFT_TOKENS:
            text = f"draft_tokens is {draft_tokens}, but must lie in 1 … {_MOST_DRAFT_TOKENS}"
            raise UsageError("sampling-range", text)
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise UsageError("usage", f"kv_dtype is one of {', '.join(KV_DTYPES)}, not {kv_dtype!r}")
        self.threads = machine.prepare(threads)
        folder = hub.resolve(checkpoint)
        self._loaded: Loaded = load.load(
            folder,
            allow_reference=allow_reference,
            progress=progress,
            threads=self.threads,
            activations=activations,
            kv_dtype=kv_dtype,
            mtp=draft == MTP,
        )
        self.plan = self._loaded.plan
        self.tokenizer = Tokenizer(self._loaded.checkpoint)
        self.vocabulary: int = self._loaded.decoder.config.vocab
        self.context: int | None = self._loaded.decoder.config.max_positions
        self.warnings = [*self.plan.warnings, *self._loaded.notices]
        self._end_ids = generation_config.end_ids(self._loaded.checkpoint)
        self._sequences = itertools.count()
        self._drafter: LoadedDrafter | None = None
        if draft is not None and draft not in (NGRAM, MTP):
            self._drafter = load_drafter(
                hub.resolve(draft), self._loaded, allow_reference, draft_layers, threads=self.threads
            )
            self.warnings += [*self._drafter.planned.plan.warnings, *self._drafter.notices]
        self._cache = self._make_cache()
        self._scheduler = Scheduler(self._cache.max_pages * PAGE_SIZE, PAGE_SIZE)
        self._driver: Driver | None = None
        if draft is not None:
            lengths: Lengths = Adaptive() if self._drafter is None else Whole()
            if draft_tokens is not None:
                lengths = Fixed(draft_tokens)
            self._driver = Driver(self._proposer(draft, counted=draft_tokens is not None), lengths)

    def _proposer(self, draft: str | Path, counted: bool) -> Proposer:
        if draft == NGRAM:
            return NGram()
        if draft == MTP:
            loaded, model = self._loaded, self._loaded.decoder.config
            assert model.mtp is not None
            count = len(model.mtp.layers)
            modules = [MtpModule(model.mtp, index, loaded.params, loaded.ops) for index in range(count)]
            norm = None
            if model.mtp.normed:
                norm = loaded.ops.norm(loaded.params["model.norm"], model.norm_eps, model.norm_offset)
            return Mtp(modules, len(model.layers), self._mtp_layers(), self._cache.max_pages, loaded.ops, norm)
        assert self._drafter is not None
        return Eagle(self._drafter, self._cache.max_pages, 0.0 if counted else LEAST)

    def _make_cache(self) -> KVCache:
        layers = self._loaded.cache_layers
        drafting = self._mtp_layers() if self._drafter is None else self._drafter.cache_layers
        room = (limits.available_memory() or _UNKNOWN_MEMORY) // _CACHE_SHARE
        pages = room // (PAGE_SIZE * sum(layer.token_bytes for layer in (*layers, *drafting)))
        if self.context is not None:
            pages = min(pages, MAX_RUNNING * -(-self.context // PAGE_SIZE))
        return KVCache(layers, max_pages=max(pages, 1))

    def _mtp_layers(self) -> tuple[CacheLayer, ...]:
        """What the caches of the model's MTP modules keep, where it drafts with them."""
        model = self._loaded.decoder.config
        if model.mtp is None or not model.drafts:
            return ()
        return tuple(model.mtp.cache_layer(index, self.plan.cache_dtype) for index in range(len(model.mtp.layers)))

    # Prompts

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; the checkpoint's own special tokens are added unless `special` is False."""
        ids = self.tokenizer.encode(text, special)
        if max(ids, default=0) >= self.vocabulary:
            raise CheckpointError(
                "vocabulary-mismatch",
                f"the tokenizer gives token {max(ids)}, but the model has {self.vocabulary}",
                module="tokenizer.json",
            )
        return ids

    def encode_chat(self, messages: Sequence[chat.Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers, by the chat template."""
        return self.encode(chat.render(self.tokenizer, messages), special=False)

    # Answers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Continue texts or lists of token ids, all in one batch; one result per prompt, in order.

        A result doesn't depend on the other prompts. `params` is one for all, one for each, or the default:
        greedy, 256 tokens.
        """
        several = _prompts(prompts)
        wishes = _one_each(params, len(several))
        requests = [self._request(prompt, wish) for prompt, wish in zip(several, wishes, strict=True)]
        try:
            for request in requests:
                self._submit(request)
            while not all(request.done for request in requests):
                self._step()
        finally:
            for request in requests:
                self._abort(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt; the text comes in pieces as it is certain."""
        request = self._request(prompt, params or SamplingParams())
        self._submit(request)
        return Stream(self, request)

    def logits(self, token_ids: Sequence[int]) -> Any:
        """Logits of every token, all in one prefill: float32 [tokens, rows of the head]."""
        ids = self._checked(token_ids, room=0)
        if self._scheduler.running:
            raise RuntimeError("logits() needs the cache for itself; finish or close the streams first")
        sequence = next(self._sequences)
        try:
            batch = self._cache.batch([Part(sequence, ids, logits=len(ids))])
            return self._loaded.decoder.forward(batch, self._cache).logits
        finally:
            self._cache.free(sequence)

    @property
    def model_sampling(self) -> dict[str, Any]:
        """What generation_config.json says about sampling, by the names of SamplingParams; {} for greedy."""
        return generation_config.sampling(self._loaded.checkpoint)

    def bytes_per_token(self, entries: int) -> int:
        """What a decode step must read: packed weights without the embedding, `entries` of the cache."""
        weights = sum(
            row.kernel.nbytes(row.spec, (row.shape[0], row.shape[1]))
            for row in self.plan.rows
            if row.kernel is not None and row.kind != "embedding" and row.executed_as in ("native", "reference")
        )
        return weights + entries * self._cache.token_bytes

    # The machinery

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self._checked(self.encode(prompt) if isinstance(prompt, str) else prompt, room=params.max_tokens)
        if params.stop and not self.tokenizer.available:
            raise UsageError("tokenizer-missing", "stop strings need a tokenizer, and the checkpoint has none")
        end = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids)
        limit = params.max_tokens
        if self.context is not None:
            limit = min(limit, self.context - len(ids))
        stream = TextStream(self.tokenizer.decode, params.stop) if self.tokenizer.available else None
        request = Request(next(self._sequences), ids, params, end, limit, stream, time.perf_counter())
        request.speculation = None if self._driver is None else Speculation()
        return request

    def _checked(self, token_ids: Sequence[int], room: int) -> list[int]:
        """The ids of a prompt as a list, if the model can take them and `room` says more are wanted."""
        ids = [int(token) for token in token_ids]
        if not ids:
            raise UsageError("prompt-empty", "the prompt has no token; a model continues at least one")
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise UsageError(
                    "token-out-of-range",
                    f"the prompt has token {token}, but the model has 0 … {self.vocabulary - 1}",
                )
        if self.context is not None and len(ids) + (room > 0) > self.context:
            raise UsageError(
                "prompt-too-long",
                f"the prompt has {len(ids)} tokens, and the model's context is {self.context}",
                source="config.json, max_position_embeddings",
            )
        return ids

    def _submit(self, request: Request) -> None:
        if request.length_limit == 0:
            request.finish_reason = "length"
            return
        needed = len(request.prompt_ids) + request.length_limit
        if needed > self._cache.max_pages * PAGE_SIZE:
            raise UsageError(
                "cache-too-small",
                f"{needed} tokens of prompt and answer don't fit into the memory for the cache"
                f" ({self._cache.max_pages * PAGE_SIZE} tokens of {self._cache.token_bytes} bytes)",
                hint="a smaller --max-tokens needs less",
            )
        self._scheduler.add(request)

    def _step(self) -> None:
        if self._driver is not None:
            self._driver.draft(self._scheduler.running)
        runner.step(self._loaded.decoder, self._cache, self._scheduler.next_step(), self._driver)
        for request in [request for request in self._scheduler.running if request.done]:
            self._abort(request)

    def _abort(self, request: Request) -> None:
        """Forgets a request, finished or not."""
        self._scheduler.remove(request)
        self._cache.free(request.sequence)
        if self._driver is not None:
            self._driver.forget(request)

    @property
    def drafter(self) -> LoadedDrafter | None:
        """The Eagle3 drafter, where there is one."""
        return self._drafter

    @property
    def doubt(self) -> Notice | None:
        """A warning where next to nothing of what is drafted is accepted."""
        return None if self._driver is None else self._driver.warning


class Stream(Iterator[str]):
    """The pieces of one answer. `result` is what has come so far, all of it once the pieces are used up."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self._llm = llm
        self._request = request

    def __next__(self) -> str:
        while not self._request.pieces:
            if self._request.error is not None:
                raise self._request.error
            if self._request.done:
                raise StopIteration
            self._llm._step()
        return self._request.pieces.popleft()

    @property
    def result(self) -> Result:
        return self._request.result()

    def close(self) -> None:
        """Stops generating. A stream that is dropped closes itself."""
        self._request.finish_reason = self._request.finish_reason or "length"
        self._llm._abort(self._request)

    def __del__(self) -> None:
        self.close()


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError("sampling-range", f"{len(params)} sampling parameters for {count} prompts")
    return list(params)
