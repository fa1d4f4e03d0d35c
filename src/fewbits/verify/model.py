"""The whole model: a run of the reference that checks every module it comes to, and what the logits may differ by.

The reference runs once, its tokens twice in one batch: as they are, and with the input of every product rounded to
bfloat16. Each projection is fed the reference's own input, so errors don't add up, and is decoded when the pass comes
to it, so one module is in memory at a time.

Which experts a token goes to changes all at once where two are nearly as good, and says nothing of either: the rounded
tokens, and the native model, go where the exact ones go. Whether native routing chooses as the reference does is
checked with the reference's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint import Checkpoint
from fewbits.engine.kvcache import PAGE_SIZE, KVCache, Part
from fewbits.errors import CheckpointError
from fewbits.kernels import KERNELS, Kernel, Op
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.cpu.program import Program
from fewbits.kernels.ops import Chosen, Routing
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.load import Progress, kv_scales, load
from fewbits.models.decoder import Decoder, DecoderConfig
from fewbits.plan import LoadPlan, Row
from fewbits.plan.activations import Activations
from fewbits.verify.modules import Half, ModuleChecks, Stopped

Array = NDArray[Any]

TOKENS = 24

# The tolerance of the logits. A product of unquantized activations may round its input to bfloat16; the second copy
# of the tokens does, so its logits show what that is worth in this model. The AVX-512 BF16 kernels, whose attention
# rounds queries and exponentials too, differ from the reference by up to 1.21 of that on the test fixtures, the others,
# which round neither, by 1e-5 to 0.05 of it; a kernel that rounds at other places is another draw of the same noise,
# hence the factor.
# A product of quantized activations rounds nothing but sums, yet a difference in the last bit of float32 may move an
# input over the border to the next code, and one such step brings others with it in the layers above: on the fixtures
# one step moved the logits by up to 0.4 of what bfloat16 does, which makes many of them. So the second copy
# rounds there too, before the quantization. Only the comparison of each module is sharp then.
# The floor is float32 in norms, attention and activations: 2e-7 to 1e-6 on the float32 fixtures.
_NOISE_FACTOR = 2.0
_NOISE_FLOOR = 1e-5
_WEIGHTS = 1e-6  # weights of experts are computed in float64 and rounded to float32


@dataclass(frozen=True, slots=True)
class LogitsResult:
    """The native model's logits beside the reference's: norm of the difference as a share of the norm, None where
    they aren't finite; the share of tokens with the same most probable successor.
    """

    relative_difference: float | None
    bound: float
    argmax_agreement: float
    tokens: int

    @property
    def problem(self) -> str | None:
        if self.relative_difference is None:
            return "the logits of the native model hold NaN or infinities; those of the reference don't"
        if self.relative_difference <= self.bound:
            return None
        return f"the logits differ by {self.relative_difference:.2g} of their norm, rounding explains {self.bound:.2g}"


def reference_logits(planned: LoadPlan, checks: ModuleChecks) -> tuple[Array, list[Chosen]]:
    """Logits float32 [2 T, V] of the fixed tokens: the exact ones, then those with inputs in bfloat16; and which
    experts the exact ones went to, block by block.

    Raises Stopped.
    """
    model = planned.model
    if model is None:
        raise Stopped("the family of the model is unknown")
    ops = _WatchedOps(checks)
    linear = replace(_reference("linear"), bind=lambda rows: _products(checks, rows))
    embedding = replace(_reference("embedding"), bind=lambda rows: lambda ids: checks.embedding(rows[0], ids))
    params: dict[str, Any] = {}
    for row in checks.rows.values():
        if row.kind == "norm":
            params[row.name] = ops.named(row.name, checks.norm(row))
        elif row.heads is not None:
            params[row.name] = _Latents(checks, row)
        else:
            params[row.name] = (embedding if row.kind == "embedding" else linear, row)
    for name in planned.vectors:
        params[name] = ops.vector(checks.vector(name))
    try:
        layers = model.cache_layers(planned.cache_dtype, kv_scales(planned, checks.reader))
    except CheckpointError as error:
        owner = next(row.name for row in planned.rows if error.module in row.tensors)
        raise checks.blame(owner, error) from None
    ids = _token_ids(model)
    cache = KVCache(layers, max_pages=2 * -(-TOKENS // PAGE_SIZE))
    batch = cache.batch([Part(copy, ids, len(ids)) for copy in (0, 1)])
    logits: Array = Decoder(model, params, ops).forward(batch, cache).logits
    return logits, ops.chosen


def loaded_logits(
    checkpoint: Checkpoint, activations: Activations, chosen: Sequence[Chosen], progress: Progress
) -> Array:
    """Of the model as `run` loads it, for the tokens and the experts of `reference_logits`: float32 [tokens, V]."""
    ops = _ToldOps(chosen)
    loaded = load(checkpoint, allow_reference=True, progress=progress, ops=ops, activations=activations)
    ids = _token_ids(loaded.decoder.config)
    cache = KVCache(loaded.cache_layers, max_pages=-(-TOKENS // PAGE_SIZE))
    logits: Array = loaded.decoder.forward(cache.batch([Part(0, ids, len(ids))]), cache).logits
    return logits


def relative_difference(logits: Array, others: Array) -> float:
    """|logits - others| / |others|, of Euclidean norms."""
    exact = others.astype(np.float64)
    return float(np.linalg.norm(logits - exact)) / (float(np.linalg.norm(exact)) or 1.0)


def compare_logits(reference: Array, logits: Array) -> LogitsResult:
    """`loaded_logits` against `reference_logits`."""
    tokens = len(logits)
    exact, rounded = reference[:tokens], reference[tokens:]
    difference, noise = (relative_difference(other, exact) for other in (logits, rounded))
    return LogitsResult(
        difference if np.isfinite(logits).all() else None,
        _NOISE_FACTOR * noise + _NOISE_FLOOR,
        float(np.mean(logits.argmax(axis=1) == exact.argmax(axis=1))),
        tokens,
    )


def _token_ids(model: DecoderConfig) -> list[int]:
    """The same for every model of a vocabulary; no more than its context takes."""
    count = min(TOKENS, model.max_positions or TOKENS)
    ids: list[int] = np.random.default_rng(0).integers(0, model.vocab, count).tolist()
    return ids


def _reference(op: Op) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.op == op and kernel.reference)


def _products(checks: ModuleChecks, rows: Sequence[Row]) -> Callable[..., tuple[Array, ...]]:
    """A runner of projections that share x, as `Kernel.bind` makes it."""

    def run(x: Array, add_to: Array | None = None) -> tuple[Array, ...]:
        outputs = checks.linears(rows, _second_rounded(checks, rows[0], x))
        if add_to is None:
            return tuple(outputs)
        add_to += outputs[0]
        return (add_to,)

    return run


class _Latents:
    """A product of latents, as `kernels.ops.Latents`, by its definition. Tokens come twice, and the inputs of the
    second are rounded to bfloat16; latents are an input of both halves, as they are of the whole product.
    """

    def __init__(self, checks: ModuleChecks, row: Row) -> None:
        self._checks, self._row = checks, row

    def taken(self, latents: Array) -> Array:
        return self._checks.latents(self._row, _second_rounded(self._checks, self._row, latents))

    def bind(self) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        def run(half: Half) -> Callable[[Array], Array]:
            return lambda x: self._checks.of_latents(self._row, half, _second_rounded(self._checks, self._row, x))

        return run("keys"), run("values")


def _second_rounded(checks: ModuleChecks, row: Row, x: Array) -> Array:
    x = np.asarray(x)
    if not np.isfinite(x).all():
        raise checks.stop(row.name, "its input holds NaN or infinities")
    half = len(x) // 2
    return np.concatenate([x[:half], x[half:].astype(ml_dtypes.bfloat16).astype(np.float32)])


class _WatchedOps(ReferenceOps):
    """The reference, with an eye on what norms are given and give: the residual stream of every layer; and on routing.

    Tokens come twice, and the second time they go where they went the first. `chosen` grows block by block.
    """

    def __init__(self, checks: ModuleChecks) -> None:
        super().__init__()
        self._checks = checks
        self.chosen: list[Chosen] = []
        self._named: dict[int, tuple[str, Array]] = {}  # by the identity of the vector, which is kept for that

    def named(self, name: str, values: Array) -> Array:
        vector = self.vector(values)
        self._named[id(vector)] = (name, vector)
        return vector

    def norm(self, weight: Array, eps: float, offset: float) -> Callable[[Array], Array]:
        run, (name, _) = super().norm(weight, eps, offset), self._named[id(weight)]

        def watched(x: Array) -> Array:
            y = run(x)
            for what, values in (("what it is given", x), ("its output", y)):
                if not np.isfinite(values).all():
                    raise self._checks.stop(name, f"{what} holds NaN or infinities")
                if not values.any():
                    self._checks.fail(name, f"{what} is all zeros")
            return y

        return watched

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        run, native = super().route(routing, bias), CpuOps().route(routing, bias)

        def watched(logits: Array) -> Chosen:
            first = logits[: len(logits) // 2]
            chosen, ours = run(first), native(first)
            same = np.array_equal(chosen.experts, ours.experts)
            if not same or not np.allclose(chosen.weights, ours.weights, rtol=_WEIGHTS, atol=0):
                raise Stopped(f"stopped in block {len(self.chosen)} of experts: native routing isn't the reference's")
            self.chosen.append(chosen)
            return Chosen(*(np.concatenate([part, part]) for part in chosen))

        return watched


class _ToldOps(CpuOps):
    """Native operations that send tokens where they are told, block by block."""

    def __init__(self, chosen: Sequence[Chosen]) -> None:
        super().__init__()
        self._told = bool(chosen)
        self._chosen = iter(chosen)

    def route(self, routing: Routing, bias: Array | None) -> Callable[[Array], Chosen]:
        return lambda logits: next(self._chosen)

    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> Program | None:
        """Models with experts run operation by operation: native programs route by themselves."""
        return None if self._told else super().fused(block, widths, caches)
