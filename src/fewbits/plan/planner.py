"""Making the plan: every module resolved, its kernel chosen, and nothing of the file left unaccounted for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.collector import paused
from fewbits.checkpoint.config import HARMLESS
from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import FewbitsError, Notice
from fewbits.formats import open_format
from fewbits.formats.resolved import ModuleKind, Resolved, StoredModule
from fewbits.kernels import Op, choose, latent
from fewbits.plan import kv_cache, stacks
from fewbits.plan.activations import Activations, with_int8
from fewbits.plan.modules import Modules, expert_parents, group, kind_of
from fewbits.plan.rows import ExecutedAs, Execution, Family, LoadPlan, Need, Row
from fewbits.plan.stacks import Stack
from fewbits.spec import HeadRows, QuantSpec, dense, widened

_NO_USE = ("rotary_emb.inv_freq", ".masked_bias")  # stored by old writers, read by nobody
_dtype_and_shape = itemgetter(0, 1)  # of a TensorInfo
_VECTOR = Execution("native")  # norms, and what else has no kernel of its own
_NOT_COMPUTED = Execution("not_run", "not a module that fewbits computes")
_FLOATS = ("F32", "F16", "BF16", "F64")
_INTEGERS = ("I64", "I32")
_MOST_EXPERTS = 100_000  # rows for stacked experts; a header of 100 bytes may claim any number


@paused()
def plan(checkpoint: Checkpoint, family: Family | None = None, activations: Activations = "stored") -> LoadPlan:
    """Resolve every module of a checkpoint. Reads no weights; faults are collected in `errors`, not raised.

    `activations` "int8" quantizes the inputs of integer weights that the checkpoint leaves as they are.
    Raises CheckpointError only where the quantization block itself can't be read.
    """
    return _Planner(checkpoint, family, activations).run()


class _Notices:
    """Warnings and errors; one that concerns many modules is one that names the first and counts the rest."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str], list[str]] = {}

    def add(self, code: str, module: str, text: str) -> None:
        self._modules.setdefault((code, text), []).append(module)

    def __iter__(self) -> Iterator[Notice]:
        for (code, text), modules in self._modules.items():
            more = f" (and {len(modules) - 1} more modules)" if len(modules) > 1 else ""
            yield Notice(code, modules[0], text + more)


class _Known(NamedTuple):
    """What modules that are alike have in common; no `execution` where each has warnings or errors of its own."""

    resolved: Resolved
    dtype: str
    execution: Execution | None = None


class _Planner:
    def __init__(self, checkpoint: Checkpoint, family: Family | None, activations: Activations) -> None:
        self.checkpoint = checkpoint
        self.activations = activations
        self.plan = LoadPlan(checkpoint=checkpoint)
        self.warnings = _Notices()
        self.errors = _Notices()
        self.plan.format = self.format = open_format(checkpoint)
        self._configure(family)
        self.needs: dict[str, Need] = {}
        self._dtype_of_config = self._config_dtype()
        self._executions: dict[tuple[Op, QuantSpec, tuple[int, ...]], Execution] = {}
        self._known: dict[tuple[object, ...], _Known] = {}
        self._reasons: dict[str, Execution] = {}
        self._vectors: set[str] = set()  # that the model asks for and are stored
        self._beside: dict[str, list[str]] = {}  # module → vectors that its row shows
        self._reader = checkpoint.reader()
        self._experts_seen = 0
        self._peeked = False

    def _configure(self, family: Family | None) -> None:
        config = self.checkpoint.config
        if family is None:
            names = config.get("architectures", list, []) or [config.get("model_type", str, "without a name")]
            self.warnings.add("family-unknown", "", f"{names[0]} is not a family that fewbits runs")
            return
        self.plan.family = family.name
        try:
            self.plan.model = family.configure(config)
        except FewbitsError as error:
            self.errors.add(error.code, error.module, f"{error.what} ({error.source})" if error.source else error.what)

    def run(self) -> LoadPlan:
        plan, tensors = self.plan, self.checkpoint.tensors
        modules, loose = group(tensors)
        scales = kv_cache.take_scales(modules, loose)
        stacked = self._take_stacks(modules, loose)
        if plan.model is not None:
            stored = modules.keys() | {stack.row(0) for stack in stacked} | {*loose}
            self.needs = {need.name: need for need in plan.model.modules(stored)}
        parents = expert_parents(modules) | {stack.block for stack in stacked}
        with self._reader:
            for name, tensors_of in modules.items():
                need = self.needs.get(name)
                if need is not None and need.kind == "other":  # a vector, which a module is none of
                    need = None
                if need is None and len(tensors_of) == 1 and "bias" in tensors_of:
                    loose.append(f"{name}.bias")
                    continue
                kind = need.kind if need is not None else kind_of(name, tensors_of, parents)
                self._module(name, need, kind, tensors_of)
            for stack in stacked:
                self._stack(stack)
        for name in loose:
            self._loose(name)
        self._place()
        kv_cache.show_scales(plan, scales)
        kv_cache.choose_cache(plan, scales, self.format.report().kv_cache, self._dtype_of_config, self.warnings.add)
        plan.leftover_tensors.sort()
        if plan.leftover_tensors:
            first = plan.leftover_tensors[0]
            unused = f"{len(plan.leftover_tensors)} tensors belong to no module, the first is {first}"
            self.warnings.add("tensors-unclaimed", "", unused)
        self._report()
        plan.nbytes = sum(info.nbytes for info in tensors.values())
        plan.parameters = self._parameters()
        return plan

    # ---- modules ---------------------------------------------------------------------------------------------------

    def _module(self, name: str, need: Need | None, kind: ModuleKind, stored: dict[str, TensorInfo]) -> None:
        rule = self.format.rule(name, kind)
        # Thousands of modules are alike: what their headers and the config make of one holds for all.
        asked = (need.shape, need.bias) if need is not None else self._why_not(name)
        key = (rule, kind, asked, *stored, *map(_dtype_and_shape, stored.values()))
        known = self._known.get(key)
        if known is None:
            known = self._resolve(StoredModule(name, kind, stored, _matrix(need), self._peek(name)), rule, key)
        resolved, dtype, execution = known
        for code, text in resolved.notices:
            self.warnings.add(code, name, text)
        if execution is None:
            execution = self._execution(name, need, kind, resolved, stored.get("bias"))
            alike = "bias" not in stored and resolved.error is None and execution.executed_as != "refused"
            if alike and key in self._known:
                self._known[key] = _Known(resolved, dtype, execution)
        claimed, decided_by = resolved.claimed, resolved.decided_by
        row = Row(name, kind, resolved.shape, resolved.spec, dtype, claimed, decided_by, execution, name, resolved)
        if need is not None and (need.in_turn or need.heads is not None):
            row = row._replace(in_turn=need.in_turn, heads=need.heads)
        self.plan.rows.append(row)
        if len(claimed) != len(stored):
            self.plan.leftover_tensors += [f"{name}.{suffix}" for suffix in stored if suffix not in claimed]

    def _peek(self, module: str, stack: Stack | None = None) -> Callable[[str], Any]:
        """Reads a small tensor of a module; of a stack, the first expert's."""

        def peek(suffix: str) -> Any:
            self._peeked = True
            if self.checkpoint.header_only:
                return None
            if stack is None:
                return self._reader.read(f"{module}.{suffix}")
            tensor, has_parts = stack.tensors[suffix]
            return self._reader.read(tensor, 0 if has_parts else None)

        return peek

    def _resolve(self, module: StoredModule, rule: Any, key: tuple[object, ...]) -> _Known:
        """What a module and all with the same key are; not kept where the module's data decided."""
        self._peeked = False
        resolved = self.format.resolve(module, rule)
        if self.activations == "int8":
            resolved = with_int8(resolved, module.kind)
        known = _Known(resolved, self._dtype(resolved))
        if not self._peeked:
            self._known[key] = known
        return known

    def _execution(
        self, name: str, need: Need | None, kind: ModuleKind, resolved: Resolved, bias: TensorInfo | None
    ) -> Execution:
        problem = resolved.error or _bad_bias(bias, kind, resolved.shape)
        if self.needs and need is None:  # stored, and no part of the model: its faults are no errors
            if problem is not None:
                self.warnings.add(problem[0], name, problem[1])
            return self._not_run(self._why_not(name))
        if problem is None and need is not None:
            problem = self._unfit(need, resolved)
        if problem is not None:
            self.errors.add(problem[0], name, problem[1])
            return Execution("refused", problem[1])
        if need is not None and need.heads is not None:
            return self._absorbed(name, resolved, need.heads)
        return self._choose(name, kind, resolved.shape, resolved.spec)

    def _absorbed(self, name: str, resolved: Resolved, heads: HeadRows) -> Execution:
        """Of a product of latents, which runs in halves, one of them transposed."""
        spec, shape = resolved.spec.weight, resolved.shape
        how = self._choose(name, "linear", shape, latent.runs_as(spec))
        if how.kernel is None:
            return how
        how = replace(how, packed_bytes=latent.nbytes(how.kernel, spec, (shape[0], shape[1]), heads))
        if latent.runs_as(spec).weight == spec:
            return how
        text = "queries are multiplied by its transpose, where its scales lie across the sum; it runs as bfloat16"
        if resolved.spec.act is not None:
            text += ", and latents are quantized as its inputs are before they are cached"
        return replace(how, executed_as="dequantized", reason=text)

    def _why_not(self, name: str) -> str:
        """Why a module that the model doesn't ask for isn't run."""
        if not self.needs:
            return ""
        found: str = self.plan.model.why_not(name)
        return found or f"not part of the {self.plan.family} decoder"

    def _not_run(self, reason: str) -> Execution:
        return self._reasons.setdefault(reason, Execution("not_run", reason))

    def _unfit(self, need: Need, resolved: Resolved) -> tuple[str, str] | None:
        """What keeps a stored module from filling its place in the model."""
        if not _fits(resolved.shape, need.shape):
            return "shape-mismatch", f"has shape {list(resolved.shape)}, the config makes it {_shown(need.shape)}"
        if need.in_turn and resolved.spec.weight.block[0] > 1:
            return "tensors-disagree", f"{resolved.spec.weight}: rows of gate and up, which come in turn, share scales"
        has_bias = any(suffix.partition(".")[0] == "bias" for suffix in resolved.claimed)
        if need.bias == "yes" and not has_bias:
            return "bias-missing", f"the {self.plan.family} family has a bias here, none is stored"
        if has_bias and need.kind in ("norm", "embedding"):
            return "tensors-disagree", f"has a bias, which no {need.kind} of the {self.plan.family} family has"
        if has_bias and need.bias == "no":
            self.warnings.add("bias-unexpected", need.name, "a bias is stored though the config says none; it is added")
        if need.kind == "norm" and resolved.spec.weight.quantized:
            return "tensors-disagree", f"a norm stored as {resolved.spec.weight}"
        return None

    def _choose(self, name: str, kind: ModuleKind, shape: tuple[int, ...], spec: QuantSpec) -> Execution:
        if kind == "norm":
            return _VECTOR
        if kind in ("conv", "other") or len(shape) != 2 or 0 in shape:
            return _NOT_COMPUTED
        op: Op = "embedding" if kind == "embedding" else "linear"
        if kind == "router":
            spec = widened(spec)
        key = (op, spec, shape)
        found = self._executions.get(key)
        if found is None:
            choice = choose(op, spec, (shape[0], shape[1]), allow_reference=True)
            why = "; ".join(f"{kernel}: {sentence}" for kernel, sentence in choice.declined)
            how: ExecutedAs = "refused"
            nbytes = 0
            if choice.kernel is not None:
                how = "reference" if choice.kernel.reference else "native"
                nbytes = choice.kernel.nbytes(spec, (shape[0], shape[1]))
            found = self._executions[key] = Execution(how, why, choice.kernel, choice.declined, nbytes)
        if found.kernel is None:
            self.errors.add("kernel-none", name, f"no kernel runs {spec}: {found.reason}")
        return found

    # ---- stacks of experts -----------------------------------------------------------------------------------------

    def _take_stacks(self, modules: Modules, loose: list[str]) -> list[Stack]:
        """The stacks, taken out of what is still to be resolved."""
        tensors = self.checkpoint.tensors
        found = [
            stacks.of_module(name, stored)
            for name, stored in modules.items()
            if stacks.holds_experts(name, stacks.weight_of(stored))
        ]
        for stack in found:
            del modules[stack.module]
        of_tensors = stacks.of_tensors(loose, tensors)
        taken = {tensor for stack in of_tensors for tensor, _ in stack.tensors.values()}
        loose[:] = [name for name in loose if name not in taken]
        return [*found, *of_tensors]

    def _stack(self, stack: Stack) -> None:
        """A row for each expert; all are what the first is, and what is wrong with it is said once, of the stack."""
        name, need = stack.module, self.needs.get(stack.row(0))
        if need is not None and need.transposed:
            stack = stack.as_stored_transposed(need.shape)
        first = stack.first
        rule = self.format.rule(name, "expert")
        module = StoredModule(name, "expert", first, _matrix(need), self._peek(name, stack))
        resolved = self.format.resolve(module, rule)
        if self.activations == "int8":
            resolved = with_int8(resolved, "expert")
        self._experts_seen += stack.experts
        names: list[str] = [name]
        shape = (stack.experts, *resolved.shape)
        if self._experts_seen > _MOST_EXPERTS:
            text = f"is a stack of {stack.experts} experts, which makes more than {_MOST_EXPERTS} in all"
            resolved = replace(resolved, error=("tensors-disagree", text))
        else:
            names = [stack.row(expert) for expert in range(stack.experts)]
            shape = resolved.shape
            problem = stack.problem or (None if names else ("tensors-disagree", "is a stack of no experts"))
            if problem is not None:
                resolved, names = replace(resolved, error=problem), names or [name]
        for code, text in resolved.notices:
            self.warnings.add(code, name, text)
        dtype, claimed, decided_by = self._dtype(resolved), resolved.claimed, resolved.decided_by
        execution = self._execution(name, need, "expert", resolved, first.get("bias"))
        unwanted = self._not_run(self._why_not(name)) if self.needs else execution
        spec = resolved.spec
        alike = Row(name, "expert", shape, spec, dtype, claimed, decided_by, execution, name, resolved, stack=stack)
        alike = alike._replace(in_turn=need is not None and need.in_turn)
        for expert, row in enumerate(names):
            how = execution if need is None or row in self.needs else unwanted
            self.plan.rows.append(alike._replace(name=row, execution=how, expert=expert))
        self.plan.leftover_tensors += [tensor for suffix, (tensor, _) in stack.tensors.items() if suffix not in claimed]

    # ---- tensors without a module ----------------------------------------------------------------------------------

    def _loose(self, name: str) -> None:
        """A tensor with a name of its own: a vector that the model asks for, else a leftover in a known family that has
        no reason not to run it, else a row of kind `other`.
        """
        need = self.needs.get(name)
        known = self.plan.model.why_not(name) if self.needs and need is None else ""
        if (self.needs and need is None and not known) or name.endswith(_NO_USE):
            self.plan.leftover_tensors.append(name)
            return
        info = self.checkpoint.tensors[name]
        execution = self._not_run(known) if known else _NOT_COMPUTED
        if need is not None:
            execution = self._vector(need, info)
            if need.owner is not None:
                self._beside.setdefault(need.owner, []).append(name)
                return
        module = StoredModule(name, "other", {"weight": info})
        spec = self.format.resolve(module, self.format.rule(name, "other")).spec
        dtype = DTYPES[info.dtype][1].name
        self.plan.rows.append(
            Row(name, "other", info.shape, spec, dtype, (), "its name", execution, name, others=(name,))
        )

    def _vector(self, need: Need, info: TensorInfo) -> Execution:
        self._vectors.add(need.name)
        problem = None
        if math.prod(info.shape) != need.shape[0] or max(info.shape, default=1) != need.shape[0]:
            problem = "shape-mismatch", f"has shape {list(info.shape)}, the config makes it {_shown(need.shape)}"
        elif info.dtype not in (_INTEGERS if need.integers else _FLOATS):
            wanted = "integers" if need.integers else "floats of 16 bits or more"
            problem = "tensors-disagree", f"holds {info.dtype}, not {wanted}"
        if problem is None:
            (self.plan.indices if need.integers else self.plan.vectors).append(need.name)
            return _VECTOR
        self.errors.add(problem[0], need.name, problem[1])
        return Execution("refused", problem[1])

    def _place(self) -> None:
        """Rows in the order of the forward pass, each with the vectors that belong to it; what is missing is said."""
        plan = self.plan
        if not self.needs:
            return
        rows = {row.name: row for row in plan.rows}
        for need in self.needs.values():
            if need.name not in (self._vectors if need.kind == "other" else rows):
                self._missing(need, rows)
        if self._beside:
            plan.rows = [
                row._replace(others=(*row.others, *self._beside.pop(row.name))) if row.name in self._beside else row
                for row in plan.rows
            ]
            plan.leftover_tensors += [name for names in self._beside.values() for name in names]
        order = {name: place for place, name in enumerate(self.needs)}
        plan.rows.sort(key=lambda row: order.get(row.name, len(order)))

    def _missing(self, need: Need, rows: Mapping[str, Row]) -> None:
        owner = rows.get(need.tied_to) if need.tied_to is not None else None
        if owner is None:
            if not need.optional:
                text = f"the {self.plan.family} family needs it, and it isn't stored"
                self.errors.add("module-missing", need.name, text)
            elif need.instead:
                how = Execution("not_run", need.instead)
                shape = tuple(size or 0 for size in need.shape)
                spec = QuantSpec(dense("bfloat16"))
                self.plan.rows.append(Row(need.name, need.kind, shape, spec, "bfloat16", (), "not stored", how, ""))
            return
        if not self.plan.model.tied:
            text = "no head is stored though tie_word_embeddings is false; the embedding serves as the head"
            self.warnings.add("head-missing", need.name, text)
        execution = owner.execution
        if owner.runs:
            execution = self._choose(need.name, need.kind, owner.shape, owner.spec)
        tied = f"tied to {owner.name}"
        self.plan.rows.append(owner._replace(name=need.name, kind=need.kind, decided_by=tied, execution=execution))

    def _dtype(self, resolved: Resolved) -> str:
        """Of a quantized module, or one that is refused: the config's dtype, else that of its scales."""
        if resolved.dtype and not resolved.spec.weight.quantized:
            return resolved.dtype
        return self._dtype_of_config or resolved.dtype or "bfloat16"

    def _config_dtype(self) -> str:
        config = self.checkpoint.config
        text: str = config.get("torch_dtype", str, "") or config.get("dtype", str, "")
        return text.removeprefix("torch.")

    # ---- the rest ----------------------------------------------------------------------------------------------

    def _report(self) -> None:
        plan, report = self.plan, self.format.report()
        plan.patterns_without_match = report.patterns_without_match
        plan.config_keys = sorted({*report.config_keys, *self._model_keys()})
        plan.warnings = [*self.checkpoint.notices, *report.warnings, *self.warnings]
        plan.errors = [*report.errors, *self.errors]
        if plan.config_keys:
            shown = ", ".join(plan.config_keys[:5]) + (", …" if len(plan.config_keys) > 5 else "")
            text = f"{len(plan.config_keys)} keys carry a value that nothing reads: {shown}"
            plan.warnings.append(Notice("config-keys-unread", "", text))

    def _model_keys(self) -> list[str]:
        """Unread keys of config.json itself; only a family that was configured knows which there should be."""
        if self.plan.model is None:
            return []
        blocks = ("quantization_config", "compression_config", "quantization")
        keys = self.checkpoint.config.leftovers(HARMLESS)
        return [key for key in keys if not any(block in key.split(".") for block in blocks)]

    def _parameters(self) -> int:
        """Logical weights, norms and biases, each once."""
        tensors = self.checkpoint.tensors
        owned = [name for name in self.plan.vectors if self.needs[name].owner is not None]
        total = sum(math.prod(tensors[name].shape) for name in owned)
        for row in self.plan.rows:
            if not row.tied and row.name not in self.plan.indices:
                total += math.prod(row.shape)
                if row.resolved is not None and "bias" in row.resolved.claimed:
                    name, part = row.source("bias")
                    total += math.prod(tensors[name].shape[part is not None :])
        return total


def _matrix(need: Need | None) -> tuple[int, int] | None:
    """[N, K] as the model's family knows it."""
    if need is None or len(need.shape) != 2 or None in need.shape:
        return None
    return need.shape[0], need.shape[1]  # type: ignore[return-value]


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(two in (None, one) for one, two in zip(shape, wanted, strict=True))


def _shown(wanted: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in wanted)}]"


def _bad_bias(bias: TensorInfo | None, kind: ModuleKind, shape: tuple[int, ...]) -> tuple[str, str] | None:
    if bias is None or kind in ("conv", "other"):
        return None
    if bias.shape != shape[:1]:
        return "shape-mismatch", f"has a bias of shape {list(bias.shape)} and {shape[0]} rows"
    if bias.dtype not in _FLOATS:
        return "tensors-disagree", f"has a bias of dtype {bias.dtype}"
    return None
