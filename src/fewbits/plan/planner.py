"""Making the plan: every module resolved, its kernel chosen, and nothing of the file left unaccounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import HARMLESS
from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import FewbitsError, Notice
from fewbits.formats import kv_scales, open_format
from fewbits.formats.resolved import ModuleKind, Resolved, StoredModule
from fewbits.kernels import Op, choose
from fewbits.plan.modules import expert_parents, group, kind_of
from fewbits.plan.rows import ExecutedAs, Execution, Family, LoadPlan, Need, Row
from fewbits.spec import QuantSpec

_NO_USE = ("rotary_emb.inv_freq", ".masked_bias")  # stored by old writers, read by nobody
_NORM = Execution("native")
_NOT_COMPUTED = Execution("not_run", "not a module that fewbits computes")
_MOST_EXPERTS = 100_000  # rows for stacked experts; a header of 100 bytes may claim any number
_EXPERT = Execution("not_run", "experts aren't computed yet")


def plan(checkpoint: Checkpoint, family: Family | None = None) -> LoadPlan:
    """Resolve every module of a checkpoint. Reads no weights; faults are collected in `errors`, not raised.

    Raises CheckpointError only where the quantization block itself can't be read.
    """
    return _Planner(checkpoint, family).run()


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


class _Planner:
    def __init__(self, checkpoint: Checkpoint, family: Family | None) -> None:
        self.checkpoint = checkpoint
        self.plan = LoadPlan(checkpoint=checkpoint)
        self.warnings = _Notices()
        self.errors = _Notices()
        self.plan.format = self.format = open_format(checkpoint)
        self.needs = self._configure(family)
        self.kv = kv_scales.find(checkpoint.tensors)
        self._executions: dict[tuple[Op, QuantSpec, tuple[int, ...]], Execution] = {}
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
        modules, loose = group(tensors, (name for scales in self.kv.values() for name in scales.owners))
        parents = expert_parents(tensors)
        with self._reader:
            for name, stored in modules.items():
                need = self.needs.get(name)
                if need is None and stored.keys() == {"bias"}:
                    loose.append(f"{name}.bias")
                    continue
                kind = need.kind if need is not None else kind_of(name, stored, parents)
                self._module(name, kind, stored)
        for name in loose:
            self._loose(name)
        rows = {row.name: row for row in plan.rows}
        for need in self.needs.values():
            if need.name not in rows:
                self._missing(need, rows)
        if self.needs:
            order = {name: place for place, name in enumerate(self.needs)}
            plan.rows.sort(key=lambda row: order.get(row.name, len(order)))
        self._claim_kv_scales()
        claimed = {name for row in plan.rows for name in row.tensors}
        plan.leftover_tensors = sorted(tensors.keys() - claimed)
        if plan.leftover_tensors:
            first = plan.leftover_tensors[0]
            unused = f"{len(plan.leftover_tensors)} tensors belong to no module, the first is {first}"
            self.warnings.add("tensors-unclaimed", "", unused)
        self._report()
        plan.nbytes = sum(info.nbytes for info in tensors.values())
        plan.parameters = self._parameters()
        return plan

    # ---- modules ---------------------------------------------------------------------------------------------------

    def _module(self, name: str, kind: ModuleKind, stored: dict[str, TensorInfo]) -> None:
        need = self.needs.get(name)
        expected = (need.shape[0], need.shape[1]) if need is not None and len(need.shape) == 2 else None
        weight = stored.get("weight")
        if weight is not None and len(weight.shape) == 3 and (".experts" in name or ".moe." in name):
            self._stacked(name, stored)
            return

        def peek(suffix: str) -> Any:
            return None if self.checkpoint.header_only else self._reader.read(f"{name}.{suffix}")

        resolved = self.format.resolve(StoredModule(name, kind, stored, expected, peek))
        for code, text in resolved.notices:
            self.warnings.add(code, name, text)
        shape: tuple[int, ...] = resolved.shape
        if resolved.layout == "dense" and weight is not None and len(weight.shape) != 2:
            shape = weight.shape
        self.plan.rows.append(
            Row(
                name,
                kind,
                shape,
                resolved.spec,
                self._dtype(resolved),
                tuple([f"{name}.{suffix}" for suffix in resolved.claimed]),
                resolved.decided_by,
                self._execution(name, kind, shape, resolved),
                name,
                resolved,
            )
        )

    def _execution(self, name: str, kind: ModuleKind, shape: tuple[int, ...], resolved: Resolved) -> Execution:
        need = self.needs.get(name)
        problem = resolved.error or self._bad_bias(name, kind, shape)
        if self.needs and need is None:  # stored, and no part of the model: its faults are no errors
            if problem is not None:
                self.warnings.add(problem[0], name, problem[1])
            return self._not_part
        if problem is None and need is not None:
            problem = self._unfit(need, shape, resolved.spec)
        if problem is not None:
            self.errors.add(problem[0], name, problem[1])
            return Execution("refused", problem[1])
        return self._choose(name, kind, shape, resolved.spec)

    def _unfit(self, need: Need, shape: tuple[int, ...], spec: QuantSpec) -> tuple[str, str] | None:
        """What keeps a stored module from filling its place in the model."""
        if tuple(shape) != tuple(need.shape):
            return "shape-mismatch", f"has shape {list(shape)}, the config makes it {list(need.shape)}"
        bias = self.checkpoint.tensors.get(f"{need.name}.bias")
        if need.bias == "yes" and bias is None:
            return "bias-missing", f"the {self.plan.family} family has a bias here, none is stored"
        if bias is not None and need.kind in ("norm", "embedding"):
            return "tensors-disagree", f"has a bias, which no {need.kind} of the {self.plan.family} family has"
        if bias is not None and need.bias == "no":
            self.warnings.add("bias-unexpected", need.name, "a bias is stored though the config says none; it is added")
        if need.kind == "norm" and spec.weight.quantized:
            return "tensors-disagree", f"a norm stored as {spec.weight}"
        return None

    def _bad_bias(self, name: str, kind: ModuleKind, shape: tuple[int, ...]) -> tuple[str, str] | None:
        bias = self.checkpoint.tensors.get(f"{name}.bias")
        if bias is None or kind in ("conv", "other"):
            return None
        if bias.shape != shape[:1]:
            return "shape-mismatch", f"has a bias of shape {list(bias.shape)} and {shape[0]} rows"
        if bias.dtype not in ("F32", "F16", "BF16", "F64"):
            return "tensors-disagree", f"has a bias of dtype {bias.dtype}"
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
            if choice.kernel is not None:
                how = "reference" if choice.kernel.reference else "native"
            found = self._executions[key] = Execution(how, why, choice.kernel, choice.declined)
        if found.kernel is None:
            self.errors.add("kernel-none", name, f"no kernel runs {spec}: {found.reason}")
        return found

    def _stacked(self, name: str, stored: dict[str, TensorInfo]) -> None:
        """Experts stacked in one tensor [E, N, K]: a row each, none of them run yet."""
        spec = self.format.resolve(StoredModule(name, "expert", stored)).spec
        self._experts(name, stored["weight"], QuantSpec(spec.weight), tuple(f"{name}.{suffix}" for suffix in stored))

    def _experts(self, name: str, info: TensorInfo, spec: QuantSpec, tensors: tuple[str, ...]) -> None:
        parent, _, projection = name.rpartition(".")
        self._experts_seen += info.shape[0]
        if self._experts_seen > _MOST_EXPERTS:
            text = f"is a stack of {info.shape[0]} experts, which makes more than {_MOST_EXPERTS} in all"
            self.errors.add("tensors-disagree", name, text)
            dtype, refused = DTYPES[info.dtype][1].name, Execution("refused", text)
            self.plan.rows.append(Row(name, "expert", info.shape, spec, dtype, tensors, "its tensors", refused, name))
            return
        for expert in range(info.shape[0]):
            self.plan.rows.append(
                Row(
                    f"{parent}[{expert}].{projection}",
                    "expert",
                    info.shape[1:],
                    spec,
                    DTYPES[info.dtype][1].name,
                    tensors,
                    "its tensors",
                    _EXPERT,
                    name,
                )
            )

    def _loose(self, name: str) -> None:
        """A tensor with a name of its own: a leftover in a known family, else a row of kind `other`."""
        if self.needs or name.endswith(_NO_USE):
            return
        info = self.checkpoint.tensors[name]
        spec = self.format.resolve(StoredModule(name, "other", {"weight": info})).spec
        if len(info.shape) == 3 and ".experts." in name:
            self._experts(name, info, spec, (name,))
        else:
            dtype = DTYPES[info.dtype][1].name
            self.plan.rows.append(Row(name, "other", info.shape, spec, dtype, (name,), "its name", _NOT_COMPUTED, name))

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
        self.plan.rows.append(replace(owner, name=need.name, kind=need.kind, decided_by=tied, execution=execution))

    def _dtype(self, resolved: Resolved) -> str:
        """Of a quantized module: the config's dtype, else that of its scales."""
        if not resolved.spec.weight.quantized:
            return resolved.dtype
        return self._config_dtype() or resolved.dtype or "bfloat16"

    def _config_dtype(self) -> str:
        config = self.checkpoint.config
        text: str = config.get("torch_dtype", str, "") or config.get("dtype", str, "")
        return text.removeprefix("torch.")

    # ---- the rest ----------------------------------------------------------------------------------------------

    def _claim_kv_scales(self) -> None:
        """Give the cache's scales to their projections' rows, and decide how the cache is kept."""
        plan = self.plan
        dtypes: dict[str, Literal["f32", "bf16", "f16"]] = {"float32": "f32", "float16": "f16"}
        embedding = next((row.dtype for row in plan.rows if row.kind == "embedding"), "")
        plan.cache_dtype = dtypes.get(self._config_dtype() or embedding, "bf16")
        names = {row.name for row in plan.rows}
        siblings = {row.name.rpartition(".")[0]: row.name for row in reversed(plan.rows)}
        owners: dict[str, list[str]] = {}
        for attention, scales in self.kv.items():
            for tensor, owner in scales.owners.items():
                # Where projections are stored fused: the first module of the attention.
                owner = owner if owner in names else siblings.get(attention, owner)
                owners.setdefault(owner, []).append(tensor)
        plan.rows = [
            replace(row, tensors=(*row.tensors, *owners[row.name])) if row.name in owners else row for row in plan.rows
        ]
        scheme = self.format.report().kv_cache
        complete = {name: scales for name, scales in self.kv.items() if scales.k and scales.v}
        if scheme is None:
            if complete:
                text = "scales of a KV cache are stored, but the config has no scheme for it; the cache stays float"
                self.warnings.add("kv-scales-unused", next(iter(complete)), text)
            return
        if scheme.kind != "float" or scheme.bits != 8 or scheme.dynamic or not scheme.symmetric:
            text = f"a KV cache of {scheme} isn't supported; it stays {plan.cache_dtype}"
            self.warnings.add("kv-scheme-unsupported", "", text)
            return
        if plan.model is None:
            return
        for layer in range(len(plan.model.layers)):
            name = f"model.layers.{layer}.self_attn"
            if name in complete:
                plan.kv_scales[layer] = (complete[name].k, complete[name].v)
            else:
                text = f"no scales for its KV cache are stored; it stays {plan.cache_dtype}"
                self.warnings.add("kv-scales-missing", name, text)
        plan.kv_cache = scheme if plan.kv_scales else None

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
        seen: set[str] = set()
        total = 0
        for row in self.plan.rows:
            if row.tied:
                continue
            total += math.prod(row.shape)
            bias = f"{row.name}.bias"
            if bias in row.tensors and bias not in seen:
                seen.add(bias)
                total += math.prod(self.checkpoint.tensors[bias].shape)
        return total
