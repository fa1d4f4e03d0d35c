"""Making the plan: every module resolved, its kernel chosen, and nothing of the file left unaccounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.collector import paused
from fewbits.checkpoint.config import HARMLESS
from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import FewbitsError, Notice
from fewbits.formats import open_format
from fewbits.formats.resolved import ModuleKind, Resolved, StoredModule
from fewbits.kernels import Op, choose
from fewbits.plan import kv_cache
from fewbits.plan.activations import Activations, with_int8
from fewbits.plan.modules import expert_parents, group, kind_of
from fewbits.plan.rows import ExecutedAs, Execution, Family, LoadPlan, Need, Row
from fewbits.spec import QuantSpec

_NO_USE = ("rotary_emb.inv_freq", ".masked_bias")  # stored by old writers, read by nobody
_dtype_and_shape = itemgetter(0, 1)  # of a TensorInfo
_NORM = Execution("native")
_NOT_COMPUTED = Execution("not_run", "not a module that fewbits computes")
_MOST_EXPERTS = 100_000  # rows for stacked experts; a header of 100 bytes may claim any number
_EXPERT = Execution("not_run", "experts aren't computed yet")


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
    """What modules that are alike have in common; `execution` is of those that the model doesn't ask for."""

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
        self.needs = self._configure(family)
        self._dtype_of_config = self._config_dtype()
        self._executions: dict[tuple[Op, QuantSpec, tuple[int, ...]], Execution] = {}
        self._known: dict[tuple[object, ...], _Known] = {}
        self._not_part = Execution("not_run", f"not part of the {self.plan.family} decoder")
        self._reader = checkpoint.reader()
        self._experts_seen = 0

    def _configure(self, family: Family | None) -> dict[str, Need]:
        """The modules that the family needs, by name; none where it is unknown or can't be configured."""
        config = self.checkpoint.config
        if family is None:
            names = config.get("architectures", list, []) or [config.get("model_type", str, "without a name")]
            self.warnings.add("family-unknown", "", f"{names[0]} is not a family that fewbits runs")
            return {}
        self.plan.family = family.name
        try:
            self.plan.model = family.configure(config)
        except FewbitsError as error:
            self.errors.add(error.code, error.module, f"{error.what} ({error.source})" if error.source else error.what)
            return {}
        return {need.name: need for need in self.plan.model.modules()}

    def run(self) -> LoadPlan:
        plan, tensors = self.plan, self.checkpoint.tensors
        modules, loose = group(tensors)
        scales = kv_cache.take_scales(modules, loose)
        parents = expert_parents(modules) | expert_parents(loose)
        with self._reader:
            for name, stored in modules.items():
                need = self.needs.get(name)
                if need is None and len(stored) == 1 and "bias" in stored:
                    loose.append(f"{name}.bias")
                    continue
                kind = need.kind if need is not None else kind_of(name, stored, parents)
                self._module(name, need, kind, stored)
        for name in loose:
            self._loose(name)
        if self.needs:
            rows = {row.name: row for row in plan.rows}
            for need in self.needs.values():
                if need.name not in rows:
                    self._missing(need, rows)
            order = {name: place for place, name in enumerate(self.needs)}
            plan.rows.sort(key=lambda row: order.get(row.name, len(order)))
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
        expected = (need.shape[0], need.shape[1]) if need is not None and len(need.shape) == 2 else None
        weight = stored.get("weight") or stored.get("weight_packed")
        if weight is not None and len(weight.shape) == 3 and (".experts" in name or ".moe." in name):
            self._stacked(name, stored, weight.shape[0])
            return

        rule = self.format.rule(name, kind)
        # Thousands of modules are alike: what their headers and the config make of one holds for all.
        key = (rule, kind, expected, *stored, *map(_dtype_and_shape, stored.values()))
        known = self._known.get(key)
        if known is None:
            known = self._resolve(StoredModule(name, kind, stored, expected), rule, key)
        resolved, dtype, execution = known
        for code, text in resolved.notices:
            self.warnings.add(code, name, text)
        if execution is None or need is not None:
            execution = self._execution(name, kind, resolved, stored.get("bias"))
            alike = need is None and "bias" not in stored and resolved.error is None
            if alike and execution.executed_as != "refused" and key in self._known:
                self._known[key] = _Known(resolved, dtype, execution)
        claimed, decided_by = resolved.claimed, resolved.decided_by
        self.plan.rows.append(
            Row(name, kind, resolved.shape, resolved.spec, dtype, claimed, decided_by, execution, name, resolved)
        )
        if len(claimed) != len(stored):
            self._unclaimed(name, stored, claimed)

    def _resolve(self, module: StoredModule, rule: Any, key: tuple[object, ...]) -> _Known:
        """What a module and all with the same key are; not kept where the module's data decided."""
        peeked = False

        def peek(suffix: str) -> Any:
            nonlocal peeked
            peeked = True
            return None if self.checkpoint.header_only else self._reader.read(f"{module.name}.{suffix}")

        resolved = self.format.resolve(module._replace(peek=peek), rule)
        if self.activations == "int8":
            resolved = with_int8(resolved, module.kind)
        known = _Known(resolved, self._dtype(resolved))
        if not peeked:
            self._known[key] = known
        return known

    def _execution(self, name: str, kind: ModuleKind, resolved: Resolved, bias: TensorInfo | None) -> Execution:
        need = self.needs.get(name)
        problem = resolved.error or _bad_bias(bias, kind, resolved.shape)
        if self.needs and need is None:  # stored, and no part of the model: its faults are no errors
            if problem is not None:
                self.warnings.add(problem[0], name, problem[1])
            return self._not_part
        if problem is None and need is not None:
            problem = self._unfit(need, resolved)
        if problem is not None:
            self.errors.add(problem[0], name, problem[1])
            return Execution("refused", problem[1])
        return self._choose(name, kind, resolved.shape, resolved.spec)

    def _unfit(self, need: Need, resolved: Resolved) -> tuple[str, str] | None:
        """What keeps a stored module from filling its place in the model."""
        if tuple(resolved.shape) != tuple(need.shape):
            return "shape-mismatch", f"has shape {list(resolved.shape)}, the config makes it {list(need.shape)}"
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
            return _NORM
        if kind in ("conv", "other") or len(shape) != 2 or 0 in shape:
            return _NOT_COMPUTED
        op: Op = "embedding" if kind == "embedding" else "linear"
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

    def _stacked(self, name: str, stored: dict[str, TensorInfo], count: int, loose: bool = False) -> None:
        """Experts stacked in tensors [E, N, …]: a row for each, with what one of them is. None is run yet.

        `loose`: there is one tensor, called like the module, which no format explains.
        """
        one = {
            suffix: info._replace(shape=info.shape[1:])
            if info.shape[:1] == (count,) and suffix != "weight_shape"
            else info
            for suffix, info in stored.items()
        }
        resolved = self.format.resolve(StoredModule(name, "expert", one), self.format.rule(name, "expert"))
        claimed, problem = resolved.claimed, resolved.error
        others: tuple[str, ...] = ()
        if loose:
            claimed, others, problem = (), (name,), None
        else:
            self._unclaimed(name, stored, claimed)
        for code, text in resolved.notices:
            self.warnings.add(code, name, text)
        self._experts_seen += count
        shape, execution = resolved.shape, _EXPERT
        parent, _, projection = name.rpartition(".")
        names: Iterator[str] = (f"{parent}[{expert}].{projection}" for expert in range(count))
        if self._experts_seen > _MOST_EXPERTS:
            text = f"is a stack of {count} experts, which makes more than {_MOST_EXPERTS} in all"
            shape, problem, names = (count, *shape), ("tensors-disagree", text), iter((name,))
        if problem is not None:
            self.errors.add(problem[0], name, problem[1])
            execution = Execution("refused", problem[1])
        dtype, decided_by = self._dtype(resolved), resolved.decided_by
        for row in names:
            self.plan.rows.append(
                Row(row, "expert", shape, resolved.spec, dtype, claimed, decided_by, execution, name, others=others)
            )

    def _loose(self, name: str) -> None:
        """A tensor with a name of its own: a leftover in a known family, else a row of kind `other`."""
        if self.needs or name.endswith(_NO_USE):
            self.plan.leftover_tensors.append(name)
            return
        info = self.checkpoint.tensors[name]
        if len(info.shape) == 3 and ".experts." in name:
            self._stacked(name, {"weight": info}, info.shape[0], loose=True)
            return
        module = StoredModule(name, "other", {"weight": info})
        spec = self.format.resolve(module, self.format.rule(name, "other")).spec
        dtype = DTYPES[info.dtype][1].name
        own = (name,)
        self.plan.rows.append(
            Row(name, "other", info.shape, spec, dtype, (), "its name", _NOT_COMPUTED, name, others=own)
        )

    def _unclaimed(self, name: str, stored: dict[str, TensorInfo], claimed: tuple[str, ...]) -> None:
        self.plan.leftover_tensors += [f"{name}.{suffix}" for suffix in stored if suffix not in claimed]

    def _missing(self, need: Need, rows: Mapping[str, Row]) -> None:
        owner = rows.get(need.tied_to) if need.tied_to is not None else None
        if owner is None:
            if not need.optional:
                text = f"the {self.plan.family} family needs it, and it isn't stored"
                self.errors.add("module-missing", need.name, text)
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
        total = 0
        for row in self.plan.rows:
            if row.stored == row.name or row.kind == "expert":  # no tied head
                total += math.prod(row.shape)
                if row.resolved is not None and "bias" in row.resolved.claimed:
                    total += math.prod(tensors[f"{row.stored}.bias"].shape)
        return total


def _bad_bias(bias: TensorInfo | None, kind: ModuleKind, shape: tuple[int, ...]) -> tuple[str, str] | None:
    if bias is None or kind in ("conv", "other"):
        return None
    if bias.shape != shape[:1]:
        return "shape-mismatch", f"has a bias of shape {list(bias.shape)} and {shape[0]} rows"
    if bias.dtype not in ("F32", "F16", "BF16", "F64"):
        return "tensors-disagree", f"has a bias of dtype {bias.dtype}"
    return None
