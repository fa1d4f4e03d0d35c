"""From the plan to a model: read each row's tensors, decode them, pack them for the row's kernel, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint import Checkpoint, TensorReader, open_checkpoint
from fewbits.checkpoint.collector import paused
from fewbits.errors import CheckpointError, Notice, PlanError
from fewbits.kernels import KERNELS, Kernel, Op, choose, latent
from fewbits.kernels.batch import CacheDtype, CacheLayer
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.ops import Ops
from fewbits.kernels.tasks import Run, at_once
from fewbits.models import family_for, with_mtp
from fewbits.models.decoder import Decoder, DecoderConfig
from fewbits.plan import Execution, LoadPlan, Row, no_kernel, plan, require_runnable
from fewbits.plan.activations import Activations
from fewbits.qweight import QLinear
from fewbits.workers import Workers

Progress = Callable[[int, int], None]  # bytes of tensors done, bytes in all


@dataclass(slots=True, eq=False)
class Loaded:
    """A model, ready to run, and what it came from. `params` are those that the decoder was made of."""

    checkpoint: Checkpoint
    plan: LoadPlan
    decoder: Decoder
    params: Mapping[str, Any]
    ops: Ops
    cache_layers: tuple[CacheLayer, ...]
    notices: list[Notice]  # warnings that only the data could show


Codes = Literal["read", "in blocks", "mapped"]
_CODES = ("weight", "weight_packed", "qweight")


class _ModuleArrays(Mapping[str, NDArray[Any]]):
    """The tensors of a row by suffix, read when asked for; `codes` says how the largest are given."""

    def __init__(self, reader: TensorReader, row: Row, codes: Codes) -> None:
        self._reader, self._row, self._codes = reader, row, codes

    def __getitem__(self, suffix: str) -> NDArray[Any]:
        if suffix not in self._row.suffixes:
            raise KeyError(suffix)
        source = self._row.source(suffix)
        if suffix not in _CODES or self._codes == "read":
            array = self._reader.read(*source)
            turned = suffix == "weight" and self._row.stack is not None and self._row.stack.transposed
            return np.ascontiguousarray(array.T) if turned else array
        stored = self._reader.stored(*source)
        return stored.mapped() if self._codes == "mapped" else cast(NDArray[Any], stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._row.suffixes)

    def __len__(self) -> int:
        return len(self._row.suffixes)


@paused()
def inspect(folder: str | Path, activations: Activations = "stored") -> LoadPlan:
    """The plan of a folder; `activations` as for `plan`.

    Raises CheckpointError when config.json or a header can't be read.
    """
    checkpoint = open_checkpoint(folder)
    return plan(checkpoint, family_for(checkpoint.config), activations)


def decode(planned: LoadPlan, row: Row, reader: TensorReader, codes: Codes = "read") -> tuple[QLinear, list[Notice]]:
    """One row's weight in canonical form, and the warnings that its data gave.

    Its codes are read; or read and decoded "in blocks", a slice of rows at a time, while `reader` is open; or "mapped".
    """
    assert row.resolved is not None and planned.format is not None
    notices: list[Notice] = []
    if row.kind == "router" or row.in_turn or row.heads is not None or (row.stack is not None and row.stack.transposed):
        codes = "read"  # to be changed as a whole

    def warn(code: str, text: str) -> None:
        notices.append(Notice(code, row.module, text))

    linear = planned.format.decode(row.module, row.resolved, _ModuleArrays(reader, row, codes), warn)
    if row.kind == "router" and row.runs_as != row.spec:
        linear = replace(linear, weight=linear.weight.in_float32())
    return linear.evens_first() if row.in_turn else linear, notices


def load(
    folder: str | Path | Checkpoint,
    allow_reference: bool = False,
    progress: Progress | None = None,
    ops: Ops | None = None,
    threads: int = 1,
    activations: Activations = "stored",
    kv_dtype: CacheDtype | None = None,
    mtp: bool = False,
) -> Loaded:
    """Plan a folder and load its model.

    `allow_reference` runs modules without a native kernel in NumPy. `ops` is the back end, the native one unless
    given; with the reference's, every module runs in the reference. `threads` read and pack. `activations` "int8"
    quantizes the inputs of integer weights, and `kv_dtype` keeps the cache in another way than the checkpoint says (not
    "fp8", which takes the checkpoint's scales): deviations that are asked for. `mtp` loads the modules for multi-token
    prediction too. Raises CheckpointError and PlanError.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    family = family_for(checkpoint.config)
    if mtp and family is not None:
        family = with_mtp(family)
    planned = plan(checkpoint, family, activations)
    ops = ops or CpuOps()
    require_runnable(planned, allow_reference or ops.name == "reference")
    if not isinstance(planned.model, DecoderConfig):
        raise PlanError(
            "draft-alone",
            "is a drafter, which reads what another model computes, and runs only beside it",
            module=str(checkpoint.folder),
            hint="fewbits run TARGET --draft FOLDER",
        )
    params, notices = pack(planned, planned.rows, ops, allow_reference, progress, threads)
    scales: dict[int, tuple[list[float], list[float]]] = {}
    if kv_dtype is None:
        with checkpoint.reader() as reader:
            scales = kv_scales(planned, reader)
    cache_layers = planned.model.cache_layers(kv_dtype or planned.cache_dtype, scales)
    decoder = Decoder(planned.model, params, ops)
    return Loaded(checkpoint, planned, decoder, params, ops, cache_layers, notices)


def pack(
    planned: LoadPlan,
    rows: Sequence[Row],
    ops: Ops,
    allow_reference: bool,
    progress: Progress | None = None,
    threads: int = 1,
) -> tuple[dict[str, Any], list[Notice]]:
    """Those of the plan's rows that run, and its vectors, ready for `ops`: by name, and the warnings that their data
    gave.
    """
    checkpoint = planned.checkpoint
    assert checkpoint is not None
    only_reference = ops.name == "reference"
    rows = [row for row in rows if row.runs]
    total = sum(stored_bytes(checkpoint, row) for row in rows)
    params: dict[str, Any] = {}
    notices: list[Notice] = []
    done = 0
    with checkpoint.reader() as reader:
        with Workers(threads) as workers:

            def place(row: Row, codes: Codes, run: Run) -> None:
                linear, found = decode(planned, row, reader, codes)
                kernel = kernel_for(row, linear, only_reference, allow_reference)
                if codes != "read" and kernel.reference:  # the data made another spec of it than the headers
                    linear, _ = decode(planned, row, reader)
                if row.heads is not None:
                    params[row.name] = latent.pack(linear, row.heads, kernel, run)
                else:
                    params[row.name] = (kernel, kernel.pack(linear, run))
                notices.extend([] if row.tied else found)

            for name in planned.vectors:
                params[name] = ops.vector(vector(name, reader))
            for name in planned.indices:
                params[name] = reader.read(name).reshape(-1).astype(np.int64)
            for row in rows:
                if row.kind == "norm":
                    params[row.name] = ops.vector(norm_vector(planned, row, reader))
                elif row.kernel is None:  # one of `vectors`
                    continue
                elif only_reference or row.executed_as != "native":
                    place(row, "read", workers)  # the reference keeps views of whole arrays
                elif row.kind == "embedding" and not row.spec.weight.quantized:
                    workers(partial(place, row, "mapped", at_once))
                else:
                    place(row, "in blocks", workers)  # native kernels copy them into their own layout
                done += stored_bytes(checkpoint, row)
                if progress is not None:
                    progress(done, total)
    return params, notices


def load_linear(
    folder: str | Path, name: str, allow_reference: bool = False
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """One projection of a checkpoint, of any family: a callable on float32 [M, K] that gives float32 [M, N].

    Raises PlanError where the module doesn't exist or can't run, CheckpointError where its data is bad.
    """
    planned = inspect(folder)
    row = next((row for row in planned.rows if row.name == name and row.resolved is not None), None)
    if row is None or row.kind not in ("linear", "head", "expert", "router") or len(row.shape) != 2 or 0 in row.shape:
        raise PlanError("module-missing", "is not a linear module of this checkpoint", module=name)
    assert planned.checkpoint is not None and planned.format is not None and row.resolved is not None
    for error in planned.format.report().errors:
        raise PlanError(error.code, error.text, module=name)
    if row.resolved.error is not None:
        raise PlanError(*row.resolved.error, module=name)
    if row.executed_as == "refused":
        code = next((error.code for error in planned.errors if error.text.startswith(row.reason)), "kernel-none")
        raise PlanError(code, row.reason, module=name)
    if planned.checkpoint.header_only:
        raise PlanError("header-only", "the files have headers but no data", module=name)
    with planned.checkpoint.reader() as reader:
        linear, _ = decode(planned, row, reader)
    if row.heads is not None:  # as a product by itself, which isn't taken apart
        row = row._replace(heads=None, execution=Execution("native"))
    kernel = kernel_for(row, linear, False, allow_reference)
    run = kernel.bind([kernel.pack(linear)])

    def call(x: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = run(np.ascontiguousarray(x, np.float32))[0]
        return result

    return call


def kernel_for(row: Row, linear: QLinear, only_reference: bool, allow_reference: bool) -> Kernel:
    """The plan's kernel; chosen anew where the data made another spec of it than the headers."""
    op: Op = "embedding" if row.kind == "embedding" else "linear"
    if only_reference:
        return next(kernel for kernel in KERNELS if kernel.op == op and kernel.reference)
    planned, spec = row.kernel, linear.spec
    if row.heads is not None:
        spec = latent.runs_as(spec.weight)
    if planned is not None and spec == row.runs_as and (allow_reference or not planned.reference):
        return planned
    choice = choose(op, spec, row.matrix, allow_reference)
    if choice.kernel is None:
        raise no_kernel(row, spec, choice.declined)
    return choice.kernel


def stored_bytes(checkpoint: Checkpoint, row: Row) -> int:
    """Of its tensors, or its part of them."""
    tensors, total = checkpoint.tensors, 0
    for suffix in row.suffixes:
        name, part = row.source(suffix)
        total += tensors[name].nbytes if part is None else tensors[name].part(part).nbytes
    return total + sum(tensors[name].nbytes for name in row.others)


def vector(name: str, reader: TensorReader) -> NDArray[np.float32]:
    """A tensor of `LoadPlan.vectors`. Raises CheckpointError where it holds what isn't finite in float32."""
    stored = reader.read(name).reshape(-1)
    with np.errstate(over="ignore"):
        values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise CheckpointError("weight-nan", f"holds {float(values[place])} at [{place}]", module=name)
    return values


def norm_vector(planned: LoadPlan, row: Row, reader: TensorReader) -> NDArray[np.float32]:
    linear, _ = decode(planned, row, reader)
    with np.errstate(over="ignore"):  # beyond float32: infinite, and the logits say so
        return linear.weight.dequantize().astype(np.float32).reshape(-1)


def kv_scales(planned: LoadPlan, reader: TensorReader) -> dict[int, tuple[list[float], list[float]]]:
    found = {}
    for layer, names in planned.kv_scales.items():
        heads = planned.model.layers[layer].attention.kv_heads
        values = [_positive(name, reader.read(name), heads) for name in names]
        found[layer] = (values[0], values[1])
    return found


def _positive(name: str, scale: NDArray[Any], heads: int) -> list[float]:
    with np.errstate(over="ignore"):
        values = scale.real.astype(np.float32).reshape(-1)
    fine = not np.iscomplexobj(scale) and bool((np.isfinite(values) & (values > 0)).all())
    if not fine or len(values) not in (1, heads):
        wanted = f"one positive number or one for each of {heads} heads"
        raise CheckpointError("scale-invalid", f"must hold {wanted}, not {scale.reshape(-1)[:4].tolist()}", module=name)
    return [float(value) for value in values]
