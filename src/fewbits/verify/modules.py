"""One module at a time: decoded, packed for its kernel, compared with the definition, forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint import TensorReader
from fewbits.errors import CheckpointError, Notice
from fewbits.kernels import Kernel, bind, bind_apart
from fewbits.kernels.latent import Halves, halves, quantized_latents
from fewbits.kernels.reference.bound import product_parts, row_parts
from fewbits.kernels.reference.linear import linear_exact
from fewbits.kernels.reference.probes import probes
from fewbits.load import Progress, decode, kernel_for, norm_vector, stored_bytes, vector
from fewbits.plan import LoadPlan, Row
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec

Array = NDArray[Any]

Half = Literal["keys", "values"]

_ALONE = (slice(1, 2), slice(-1, None), slice(2, 5))  # rows that are computed again without the others


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module. `error` and `bound` belong to the result that came nearest to its bound, as shares of |x| |w|,
    the Euclidean norms of the input and of the weight's row; None where there was nothing to compare. Modules
    without a kernel, such as norms, are listed only with a problem.
    """

    name: str
    spec: QuantSpec
    kernel: str | None
    executed_as: str
    error: float | None
    bound: float | None
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


class Stopped(Exception):
    """The reference model can't be run, or not on; says why."""


class _Worst:
    """The result that comes nearest to its bound, or goes farthest beyond it."""

    def __init__(self) -> None:
        self.ratio = -1.0
        self.error = self.bound = 0.0
        self.row = 0

    def add(self, got: Array, exact: Array, bound: Array, size: Array, rows: Array) -> None:
        """All [M, n], `rows` [M] their numbers."""
        error = np.abs(got - exact)
        ratio = np.where(np.isinf(bound), 0, np.nan_to_num(error / bound, nan=np.inf))
        if not ratio.size or ratio.max() <= self.ratio:
            return
        index = np.unravel_index(int(ratio.argmax()), ratio.shape)
        unit = float(np.broadcast_to(size, ratio.shape)[index]) or 1.0
        self.ratio, self.row = float(ratio[index]), int(rows[index[0]])
        self.error, self.bound = float(error[index]) / unit, float(bound[index]) / unit

    def problem(self, label: str) -> str | None:
        if self.ratio <= 1:
            return None
        if not math.isfinite(self.error):
            return f"gives NaN or infinities for {label}"
        return f"is off by {self.error:.2g} of |x| |w| where rounding explains {self.bound:.2g}, for {label}"


class _Halves(NamedTuple):
    """A product of latents: as its halves run, and by its definition."""

    row: Row
    linear: QLinear
    run_as: Halves
    exact: Halves


class ModuleChecks:
    """Checks modules when asked and keeps what was found. Each is read once."""

    def __init__(self, planned: LoadPlan, reader: TensorReader, progress: Progress) -> None:
        assert planned.checkpoint is not None
        checkpoint = planned.checkpoint
        self.rows = {row.name: row for row in planned.rows if row.runs}
        self.reader = reader
        self.warnings: list[Notice] = []  # that only the data could show
        self._plan, self._progress = planned, progress
        self._bytes = {name: stored_bytes(checkpoint, row) for name, row in self.rows.items()}
        self._total, self._done = sum(self._bytes.values()), 0
        self._read: set[str] = set()
        self._problems: dict[str, str] = {}
        self._compared: dict[str, tuple[Kernel, QuantSpec, _Worst]] = {}
        self._latent: _Halves | None = None

    def fail(self, name: str, problem: str) -> None:
        """The first problem of a module is the one that counts."""
        self._problems.setdefault(name, problem)

    def stop(self, name: str, problem: str) -> Stopped:
        """A problem with which the model can't go on; to be raised."""
        self.fail(name, problem)
        return Stopped(f"stopped at {name}")

    def blame(self, name: str, error: CheckpointError) -> Stopped:
        """A module whose data is bad; an error of the disk is raised as it is."""
        if error.code.startswith("file-"):
            raise error
        return self.stop(name, f"{error.what} ({error.code}: {error.module})")

    def results(self) -> list[ModuleResult]:
        return [self._result(row) for row in self.rows.values() if row.kernel or row.name in self._problems]

    def _result(self, row: Row) -> ModuleResult:
        kernel, spec, error, bound = row.kernel, row.spec, None, None
        if row.name in self._compared:
            kernel, spec, worst = self._compared[row.name]
            if math.isfinite(worst.error) and math.isfinite(worst.bound):
                error, bound = worst.error, worst.bound
        how: str = row.executed_as
        if kernel is not None and how != "dequantized":
            how = "reference" if kernel.reference else "native"
        name = kernel.name if kernel is not None else None
        return ModuleResult(row.name, spec, name, how, error, bound, self._problems.get(row.name))

    def check_the_rest(self) -> None:
        """Modules that the model's run didn't come to, on probes alone."""
        for name, row in self.rows.items():
            if name in self._read:
                continue
            try:
                if row.kind == "norm":
                    self.norm(row)
                elif row.kind == "embedding":
                    self.embedding(row, np.empty(0, np.int64))
                elif row.heads is not None:
                    self.latents(row, np.empty((0, row.matrix[1]), np.float32))
                    heads = self._heads(row)
                    self.of_latents(row, "keys", np.empty((0, row.heads.keys * heads), np.float32))
                    self.of_latents(row, "values", np.empty((0, row.matrix[1] * heads), np.float32))
                elif row.kernel is not None:
                    self.linears([row], np.empty((0, row.matrix[1]), np.float32))
            except Stopped:
                pass

    # ---- kinds of modules ------------------------------------------------------------------------------------------

    def linears(self, rows: Sequence[Row], x: Array) -> list[Array]:
        """Projections that share x float32 [M, K] and run in one call: each one's definition, float32 [M, N].

        Compared are these products, those of `probes`, and some rows by themselves, which must be the same bits.
        """
        names, rest = probes(x.shape[1])
        labels = [f"the model's own token {token}" for token in range(len(x))] + names
        inputs = np.concatenate([x, rest])
        linears = self._decode(rows)
        kernels = [
            kernel_for(row, linear, only_reference=False, allow_reference=True)
            for row, linear in zip(rows, linears, strict=True)
        ]
        run = bind([(kernel, kernel.pack(linear)) for kernel, linear in zip(kernels, linears, strict=True)])
        got = run(inputs)
        alone = [(some, run(inputs[some])) for some in _ALONE]
        outputs = []
        for index, (row, linear, kernel) in enumerate(zip(rows, linears, kernels, strict=True)):
            outputs.append(self._product(row, linear, kernel, inputs, got[index], labels)[: len(x)])
            if any(not np.array_equal(got[index][some], y[index], equal_nan=True) for some, y in alone):
                self.fail(row.name, "gives a row other numbers when it is alone")
        for row, y in zip(rows, outputs, strict=True):
            if not np.isfinite(y).all():
                raise self.stop(row.name, "its output holds NaN or infinities")
            if x.any() and not y.any():
                self.fail(row.name, "its output is all zeros")
        return outputs

    def latents(self, row: Row, latents: Array) -> Array:
        """What a product of latents takes of them: float32 [T, rank], as its input is quantized. It is read here, and
        its halves are good until the next one is.
        """
        [linear] = self._decode([row])
        assert row.heads is not None
        self._latent = _Halves(row, linear, halves(linear, row.heads), halves(linear, row.heads, exact=True))
        return quantized_latents(linear)(latents)

    def of_latents(self, row: Row, half: Half, x: Array) -> Array:
        """One half of the product that `latents` has read, by its definition: x float32 [M, heads x K] → float32
        [M, heads x N]. Compared are these products of the weights as they run, those of `probes`, and some rows alone.
        """
        if self._latent is None or self._latent.row is not row:
            self.latents(row, np.empty((0, row.matrix[1]), np.float32))
        assert self._latent is not None
        run_as, exact = (getattr(one, half) for one in (self._latent.run_as, self._latent.exact))
        kernel = kernel_for(row, self._latent.linear, only_reference=False, allow_reference=True)
        K = run_as[0].weight.shape[1]
        names, rest = probes(K)
        labels = [f"the model's own token {token}" for token in range(len(x))] + names
        inputs = np.concatenate([x, np.tile(rest, (1, len(run_as)))])
        run = bind_apart([(kernel, kernel.pack(one)) for one in run_as])
        got = run(inputs)
        if any(not np.array_equal(got[some], run(inputs[some]), equal_nan=True) for some in _ALONE):
            self.fail(row.name, "gives a row other numbers when it is alone")
        parts = np.split(inputs, len(run_as), axis=1)
        for ours, head, part in zip(np.split(got, len(run_as), axis=1), run_as, parts, strict=True):
            self._product(row, head, kernel, np.ascontiguousarray(part), ours, labels)
        outputs = [linear_exact(head, part[: len(x)]) for head, part in zip(exact, parts, strict=True)]
        y = np.concatenate(outputs, axis=1).astype(np.float32)
        if not np.isfinite(y).all():
            raise self.stop(row.name, "its output holds NaN or infinities")
        return y

    def _heads(self, row: Row) -> int:
        assert row.heads is not None
        return row.matrix[0] // sum(row.heads)

    def _product(self, row: Row, linear: QLinear, kernel: Kernel, x: Array, got: Array, labels: Sequence[str]) -> Array:
        worst, numbers = _Worst(), np.arange(len(x))
        sizes = np.linalg.norm(x.astype(np.float64), axis=1)[:, np.newaxis]
        y, norms = np.empty(got.shape, np.float32), np.empty(got.shape[1])
        for part in product_parts(linear, x, kernel.arithmetic(linear.spec, linear.weight.shape)):
            y[:, part.rows], norms[part.rows] = part.exact, part.norms
            worst.add(got[:, part.rows], part.exact, part.bound, sizes * part.norms, numbers)
        if linear.bias is not None and not np.isfinite(linear.bias).all():
            self.fail(row.name, "its bias holds NaN or infinities")
        self._judge(row, linear, kernel, norms, worst, labels[worst.row])
        return y

    def embedding(self, row: Row, token_ids: Array) -> Array:
        """Rows of the table by definition, float32 [T, K]. Compared are these, the first, the last and some others."""
        last = row.shape[0] - 1
        others = np.random.default_rng(0).integers(0, last, 29, endpoint=True)
        ids = np.concatenate([token_ids, [0, last, last], others])
        [table] = self._decode([row])
        kernel = kernel_for(row, table, only_reference=False, allow_reference=True)
        got = kernel.bind([kernel.pack(table)])(ids)
        worst, y, norms = _Worst(), np.empty(got.shape, np.float32), np.empty(row.shape[0])
        for found, part in row_parts(table, ids, kernel.arithmetic(table.spec, table.weight.shape)):
            y[found], norms[part.rows] = part.exact, part.norms
            worst.add(got[found], part.exact, part.bound, norms[ids[found], np.newaxis], found)
        self._judge(row, table, kernel, norms, worst, f"token {ids[worst.row]}")
        if not np.isfinite(y[: len(token_ids)]).all():
            raise self.stop(row.name, "its output holds NaN or infinities")
        return y[: len(token_ids)]

    def norm(self, row: Row) -> Array:
        """The vector, which must be finite."""
        self._count(row)
        try:
            return norm_vector(self._plan, row, self.reader)
        except CheckpointError as error:
            raise self.blame(row.name, error) from None

    def vector(self, name: str) -> Array:
        """One of the plan's vectors, which belongs to the row that shows it."""
        try:
            return vector(name, self.reader)
        except CheckpointError as error:
            raise self.blame(next(row.name for row in self.rows.values() if name in row.others), error) from None

    # ---- what they share -------------------------------------------------------------------------------------------

    def _decode(self, rows: Sequence[Row]) -> list[QLinear]:
        """Arrays of these are good until the next call. Where one is bad, the others count as not read."""
        self.reader.reset(sum(self._bytes[row.name] for row in rows))
        linears, warnings = [], []
        stopped: Stopped | None = None
        for row in rows:
            try:
                linear, found = decode(self._plan, row, self.reader)
            except CheckpointError as error:
                self._count(row)
                blamed = self.blame(row.name, error)
                stopped = stopped or blamed
                continue
            linears.append(linear)
            warnings += [] if row.tied else found
        if stopped is not None:
            raise stopped
        self.warnings += warnings
        for row in rows:
            self._count(row)
        return linears

    def _judge(self, row: Row, linear: QLinear, kernel: Kernel, norms: Array, worst: _Worst, label: str) -> None:
        before = self._compared.get(row.name)  # of another head
        if before is None or before[2].ratio < worst.ratio:
            self._compared[row.name] = (kernel, row.spec if row.heads is not None else linear.spec, worst)
        finite = np.isfinite(norms)
        problem = worst.problem(label)
        if not finite.all():
            problem = f"row {int(np.argmin(finite))} of its weight holds NaN or infinities"
        elif not norms.any():
            problem = "all of its weights are zero"
        if problem is not None:
            self.fail(row.name, problem)

    def _count(self, row: Row) -> None:
        self._read.add(row.name)
        self._done += self._bytes[row.name]
        self._progress(self._done, self._total)
