"""The plan: for every module its shape, spec, tensors, kernel and the reason, from config and headers alone.

`fewbits inspect` prints this object and `load` executes it. Every tensor of the folder is claimed by a row or
stands in the leftovers; every module that the family needs is filled by a row, or there is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import HARMLESS, Config
from fewbits.checkpoint.files import DTYPES, TensorInfo
from fewbits.errors import FewbitsError, Notice, PlanError
from fewbits.formats import kv_scales, open_format
from fewbits.formats.resolved import Format, ModuleKind, Resolved, StoredModule
from fewbits.kernels import Choice, Kernel, choose
from fewbits.spec import ActSpec, QuantSpec

ExecutedAs = Literal["native", "reference", "dequantized", "refused", "not_run"]

# What the name of a tensor may end with, behind the name of its module.
_SUFFIXES = frozenset(
    """weight bias weight_packed weight_scale weight_zero_point weight_shape weight_g_idx weight_global_scale
    input_scale input_zero_point input_global_scale output_scale output_zero_point
    bitmask compressed row_offsets shape meta scale_packed""".split()
)
_NO_USE = ("rotary_emb.inv_freq", ".masked_bias")  # stored by old writers, read by nobody


class Need(Protocol):
    """A module that a model asks for; see `models.decoder.Need`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> ModuleKind: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def optional(self) -> bool: ...
    @property
    def bias(self) -> str: ...
    @property
    def tied_to(self) -> str | None: ...


class Family(Protocol):
    """What the plan must know of a model family; see `models.Family`."""

    @property
    def name(self) -> str: ...
    @property
    def configure(self) -> Callable[[Config], Any]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One module. `shape` is [N, K], that of the tensor for norms and convolutions.

    `stored` names the module whose tensors are decoded: another one for a tied head. `declined` holds each
    candidate kernel's name and why it doesn't run this one.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    spec: QuantSpec
    dtype: str
    tensors: tuple[str, ...]
    decided_by: str
    executed_as: ExecutedAs
    reason: str = ""
    kernel: Kernel | None = None
    declined: tuple[tuple[str, str], ...] = ()
    stored: str = ""
    resolved: Resolved | None = None

    @property
    def tied(self) -> bool:
        return self.stored != self.name


@dataclass(slots=True)
class LoadPlan:
    """`model` is the family's configuration, None where the family is unknown or its config can't be honoured.

    `kv_scales` maps a layer to the tensors of its (k, v) scale where the cache will be quantized by `kv_cache`.
    """

    checkpoint: Checkpoint | None = None
    format: Format | None = None
    family: str | None = None
    model: Any = None
    rows: list[Row] = field(default_factory=list)
    leftover_tensors: list[str] = field(default_factory=list)
    config_keys: list[str] = field(default_factory=list)
    patterns_without_match: list[str] = field(default_factory=list)
    kv_cache: ActSpec | None = None
    kv_scales: dict[int, tuple[str, str]] = field(default_factory=dict)
    cache_dtype: Literal["f32", "bf16", "f16"] = "bf16"
    parameters: int | None = None
    nbytes: int | None = None
    warnings: list[Notice] = field(default_factory=list)
    errors: list[Notice] = field(default_factory=list)
    failure: FewbitsError | None = None  # why there is nothing more than this to show

    def weight_bytes(self) -> int:
        """Resident bytes after packing, embeddings and norms included."""
        total = 0
        for row in self.rows:
            if row.executed_as in ("native", "reference"):
                if row.kernel is not None:
                    total += row.kernel.nbytes(row.spec, _matrix(row.shape))
                else:
                    total += 4 * math.prod(row.shape)
        return total

    def kv_bytes_per_token(self) -> int | None:
        if self.model is None:
            return None
        scales = dict.fromkeys(self.kv_scales, ((1.0,), (1.0,)))
        total: int = sum(layer.token_bytes for layer in self.model.cache_layers(self.cache_dtype, scales))
        return total


def failed(error: FewbitsError) -> LoadPlan:
    """A plan with nothing but the reason why the folder can't be read."""
    return LoadPlan(errors=[error.notice()], failure=error)


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
        self._choices: dict[tuple[str, QuantSpec, tuple[int, int]], Choice] = {}
        self._reader = checkpoint.reader()

    def _configure(self, family: Family | None) -> dict[str, Need]:
        """The modules that the family needs, by name; none where it is unknown or can't be configured."""
        config = self.checkpoint.config
        if family is None:
            architecture = (config.get("architectures", list, []) or [config.get("model_type", str, "without a name")])[
                0
            ]
            self.warnings.add("family-unknown", "", f"{architecture} is not a family that fewbits runs")
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
        modules, loose = self._modules()
        with self._reader:
            kinds = self._kinds(modules)
            for name, stored in modules.items():
                self._module(name, kinds[name], stored)
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

    # ---- modules -----------------------------------------------------------------------------------------------

    def _modules(self) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
        """Tensors by module and suffix, and those whose names end like no module's."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        loose = []
        kv_names = {name for scales in self.kv.values() for name in scales.owners}
        for name, info in self.checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            if name in kv_names:
                continue
            if suffix in _SUFFIXES and module:
                if module.endswith(".weight"):  # 2024's sparse files: <module>.weight.bitmask
                    module = module.removesuffix(".weight")
                modules.setdefault(module, {})[suffix] = info
            else:
                loose.append(name)
        return modules, loose

    def _kinds(self, modules: Mapping[str, dict[str, TensorInfo]]) -> dict[str, ModuleKind]:
        parents = {name.partition(".experts.")[0] for name in modules if ".experts." in name}
        parents |= {name.partition(".experts.")[0] for name in self.checkpoint.tensors if ".experts." in name}
        kinds = {}
        for name, stored in modules.items():
            need = self.needs.get(name)
            kinds[name] = need.kind if need is not None else kind_of(name, stored, parents)
        return kinds

    def _module(self, name: str, kind: ModuleKind, stored: dict[str, TensorInfo]) -> None:
        need = self.needs.get(name)
        expected = _matrix(need.shape) if need is not None and len(need.shape) == 2 else None
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
        tensors = tuple(f"{name}.{suffix}" for suffix in resolved.claimed)
        dtype = self._dtype(resolved)
        row = Row(
            name,
            kind,
            shape,
            resolved.spec,
            dtype,
            tensors,
            resolved.decided_by,
            "refused",
            stored=name,
            resolved=resolved,
        )
        problem = resolved.error or (self._unfit(need, row) if need is not None else None)
        if problem is not None:
            self._refuse(row, *problem)
        elif self.needs and need is None:
            reason = f"not part of the {self.plan.family} decoder"
            self.plan.rows.append(replace(row, executed_as="not_run", reason=reason))
        else:
            self.plan.rows.append(self._choose(row))

    def _refuse(self, row: Row, code: str, text: str) -> None:
        """An error, unless the module isn't run anyway."""
        if self.needs and row.name not in self.needs:
            self.warnings.add(code, row.name, text)
            self.plan.rows.append(replace(row, executed_as="not_run", reason=text))
        else:
            self.errors.add(code, row.name, text)
            self.plan.rows.append(replace(row, executed_as="refused", reason=text))

    def _unfit(self, need: Need, row: Row) -> tuple[str, str] | None:
        """What keeps a stored module from filling its place in the model."""
        if tuple(row.shape) != tuple(need.shape):
            text = f"has shape {list(row.shape)}, the config makes it {list(need.shape)}"
            return "shape-mismatch", text
        bias = self.checkpoint.tensors.get(f"{row.name}.bias")
        if need.bias == "yes" and bias is None:
            return "bias-missing", f"the {self.plan.family} family has a bias here, none is stored"
        if bias is not None and (need.kind in ("norm", "embedding") or bias.shape != need.shape[:1]):
            return "shape-mismatch", f"has a bias of shape {list(bias.shape)}"
        if bias is not None and bias.dtype not in ("F32", "F16", "BF16", "F64"):
            return "tensors-disagree", f"has a bias of dtype {bias.dtype}"
        if bias is not None and need.bias == "no":
            self.warnings.add("bias-unexpected", row.name, "a bias is stored though the config says none; it is added")
        if need.kind == "norm" and row.spec.weight.quantized:
            return "tensors-disagree", f"a norm stored as {row.spec.weight}"
        return None

    def _choose(self, row: Row) -> Row:
        if row.kind == "norm":
            return replace(row, executed_as="native")
        if row.kind in ("conv", "other"):
            return replace(row, executed_as="not_run", reason="not a module that fewbits computes")
        op: Literal["linear", "embedding"] = "embedding" if row.kind == "embedding" else "linear"
        shape = _matrix(row.shape)
        key = (op, row.spec, shape)
        if key not in self._choices:
            self._choices[key] = choose(op, row.spec, shape, allow_reference=True)
        choice = self._choices[key]
        why = "; ".join(f"{name}: {sentence}" for name, sentence in choice.declined)
        row = replace(row, kernel=choice.kernel, declined=choice.declined, reason=why)
        if choice.kernel is None:
            self.errors.add("kernel-none", row.name, f"no kernel runs {row.spec}: {why}")
            return replace(row, executed_as="refused")
        return replace(row, executed_as="reference" if choice.kernel.reference else "native")

    def _stacked(self, name: str, stored: dict[str, TensorInfo]) -> None:
        """Experts stacked in one tensor [E, N, K]: a row each, none of them run yet."""
        experts, rows, columns = stored["weight"].shape
        parent, _, projection = name.rpartition(".")
        spec = QuantSpec(self.format.resolve(StoredModule(name, "expert", stored)).spec.weight)
        tensors = tuple(f"{name}.{suffix}" for suffix in stored)
        reason = "experts aren't computed yet"
        for expert in range(experts):
            self.plan.rows.append(
                Row(
                    f"{parent}[{expert}].{projection}",
                    "expert",
                    (rows, columns),
                    spec,
                    spec.weight.number,
                    tensors,
                    "its tensors",
                    "not_run",
                    reason,
                    stored=name,
                )
            )

    def _loose(self, name: str) -> None:
        """A tensor with a name of its own: a leftover in a known family, else a row of kind `other`."""
        if self.needs or name.endswith(_NO_USE):
            return
        info = self.checkpoint.tensors[name]
        dtype = DTYPES[info.dtype][1].name
        spec = self.format.resolve(StoredModule(name, "other", {"weight": info})).spec
        kind: ModuleKind = "expert" if len(info.shape) == 3 and ".experts." in name else "other"
        reason = "not a module that fewbits computes"
        if kind == "expert":
            parent, _, projection = name.rpartition(".")
            for expert in range(info.shape[0]):
                row = f"{parent}[{expert}].{projection}"
                shape = info.shape[1:]
                self.plan.rows.append(
                    Row(row, kind, shape, spec, dtype, (name,), "its tensors", "not_run", reason, stored=name)
                )
        else:
            self.plan.rows.append(
                Row(name, kind, info.shape, spec, dtype, (name,), "its name", "not_run", reason, stored=name)
            )

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
        row = replace(
            owner,
            name=need.name,
            kind=need.kind,
            decided_by=f"tied to {owner.name}",
            kernel=None,
            reason="",
            declined=(),
        )
        if owner.executed_as == "refused":
            self.plan.rows.append(replace(row, reason=owner.reason))
        else:
            self.plan.rows.append(self._choose(row))

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
        owners: dict[str, list[str]] = {}
        for scales in self.kv.values():
            for tensor, owner in scales.owners.items():
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
            if row.tied and row.kind != "expert":
                continue
            total += math.prod(row.shape)
            bias = f"{row.name}.bias"
            if bias in row.tensors and bias not in seen:
                seen.add(bias)
                total += math.prod(self.checkpoint.tensors[bias].shape)
        return total


def kind_of(name: str, tensors: Mapping[str, TensorInfo], expert_parents: set[str]) -> ModuleKind:
    """The kind of a module that no family names, from its name and its tensors' dimensions."""
    last = name.rpartition(".")[2]
    weight = tensors.get("weight") or tensors.get("weight_packed")
    dimensions = len(weight.shape) if weight is not None else 0
    if ".experts." in f"{name}.":
        return "expert"
    if last in ("lm_head", "output"):
        return "head"
    if last in ("embed_tokens", "wte", "tok_embeddings"):
        return "embedding"
    if last in ("gate", "router") and dimensions == 2 and name.rpartition(".")[0] in expert_parents:
        return "router"
    if dimensions == 1 and "weight" in tensors:
        return "norm"
    if dimensions == 2:
        return "linear"
    if dimensions > 2:
        return "conv"
    return "linear" if "compressed" in tensors else "other"


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], shape[1])


def require_runnable(plan: LoadPlan, allow_reference: bool) -> None:
    """Raise PlanError unless every module of the plan can run, with the first reason and the number of others."""
    if plan.failure is not None:
        raise plan.failure
    assert plan.checkpoint is not None
    if plan.errors:
        first = plan.errors[0]
        others = tuple(f"also: {error}" for error in plan.errors[1:4])
        if len(plan.errors) > 4:
            others += (f"and {len(plan.errors) - 4} more",)
        hint = f"fewbits inspect {plan.checkpoint.folder} shows every module"
        raise PlanError(first.code, first.text, module=first.module, details=others, hint=hint)
    if plan.model is None:
        architectures = plan.checkpoint.config.get("architectures", list, [])
        raise PlanError(
            "family-unknown",
            f"{architectures[0] if architectures else 'a model without a name'} is not a family that fewbits runs",
            source="config.json, architectures",
        )
    if plan.checkpoint.header_only:
        raise PlanError("header-only", "the files have headers but no data", module=str(plan.checkpoint.folder))
    slow = [row for row in plan.rows if row.executed_as == "reference"]
    if slow and not allow_reference:
        more = f" (and {len(slow) - 1} more modules)" if len(slow) > 1 else ""
        raise no_kernel(slow[0], slow[0].spec, slow[0].declined, more)


def no_kernel(row: Row, spec: QuantSpec, declined: tuple[tuple[str, str], ...], more: str = "") -> PlanError:
    """The error for a module that only the reference can run; `declined` as in `Row`."""
    return PlanError(
        "kernel-none",
        f"{spec} has no native kernel{more}",
        module=row.name,
        source=row.decided_by,
        details=("declined: " + "; ".join(f"{name} ({why})" for name, why in declined),),
        hint="--allow-reference runs such modules in NumPy, slowly",
    )
