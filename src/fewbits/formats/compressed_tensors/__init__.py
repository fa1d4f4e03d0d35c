"""compressed-tensors: what llm-compressor writes, in all its schema versions.

The tensors say whether and how a module is stored, the config says what they mean; where they contradict each
other and the tensors are unambiguous, the tensors win and the plan carries a warning.
"""

from __future__ import annotations

from dataclasses import replace

from fewbits.checkpoint import Checkpoint
from fewbits.errors import Notice
from fewbits.formats import activations, scales, values
from fewbits.formats.compressed_tensors import config as schemes
from fewbits.formats.compressed_tensors import sparse
from fewbits.formats.compressed_tensors.headers import with_stored_scales
from fewbits.formats.compressed_tensors.layouts import LAYOUTS, Layout, layout_of
from fewbits.formats.compressed_tensors.matching import NEVER_TARGETS, Patterns
from fewbits.formats.find import find_config
from fewbits.formats.resolved import Arrays, FormatReport, ModuleKind, Resolved, StoredModule, Warn
from fewbits.formats.stored import (
    DENSE_DTYPES,
    Mismatch,
    dense_spec,
    failed,
    incomplete,
    matrix,
    module_dtype,
    present,
)
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec, WeightSpec

_OUTPUT_SUFFIXES = ("output_scale", "output_zero_point")
_BESIDE = (*activations.SUFFIXES, *_OUTPUT_SUFFIXES, "bias")  # what any layout may have
_MARLIN_24 = ("meta", "scale_packed")
Rule = tuple[str | None, str | None]  # the target and the ignore entry that a module's name falls under


def claim(checkpoint: Checkpoint) -> CompressedTensors | None:
    """The format, opened, where the checkpoint's quantization block is one of compressed-tensors."""
    config = find_config(checkpoint)
    if config is None:
        return None
    method = str(config.data.get("quant_method", "")).lower().replace("_", "-")
    # quant_algo is ModelOpt's, whose config_groups mean something else. Files of 2024 that are only sparse say no more.
    unnamed = not method and "quant_algo" not in config and ("config_groups" in config or "sparsity_config" in config)
    return CompressedTensors(schemes.parse(config)) if method == "compressed-tensors" or unnamed else None


class CompressedTensors:
    """One checkpoint's block and how often its patterns hit."""

    name: str | None = "compressed-tensors"

    def __init__(self, config: schemes.QuantConfig) -> None:
        self.config = config
        self._ignore = Patterns(config.ignore, config.source)
        # The later group wins where one target stands in two.
        self._scheme_of = {target: scheme for scheme in config.schemes for target in scheme.targets}
        self._targets = Patterns(self._scheme_of, config.source)

    # ---- resolving ---------------------------------------------------------------------------------------------

    def rule(self, name: str, kind: ModuleKind) -> Rule:
        return self._targets.match(name, kind), self._ignore.match(name, kind)

    def resolve(self, module: StoredModule, rule: Rule) -> Resolved:
        """What this module is. Never raises for a module's own faults: they are `error`s of the result."""
        target, ignored = rule
        scheme = self._scheme_of[target] if target is not None else None
        resolved = self._resolve(module, scheme, ignored is not None)
        if not resolved.decided_by:
            resolved = replace(resolved, decided_by=self._decided_by(module.kind, scheme, target, ignored))
        return resolved

    def _decided_by(
        self, kind: ModuleKind, scheme: schemes.Scheme | None, target: str | None, ignored: str | None
    ) -> str:
        """Which rule of the config decided."""
        if ignored is not None:
            return f"ignore entry {ignored}"
        if not self.config.schemes:
            return "no config group"
        if kind in NEVER_TARGETS:
            return "its tensors"
        return "no target matches" if scheme is None else f"{scheme.name}, target {target}"

    def _resolve(self, module: StoredModule, scheme: schemes.Scheme | None, ignored: bool) -> Resolved:
        tensors = module.tensors
        if any(suffix in tensors for suffix in _MARLIN_24):
            text = "marlin-24 is a GPU kernel's own layout, which never had a decoder"
            return failed(module, "", ("format-refused", text))
        if sparse.prefixes(tensors):
            return self._resolve_sparse(module, scheme, ignored)
        dense = dense_spec(module.tensors)
        layout = layout_of(tensors)
        if layout is None:
            return incomplete(module)
        expected = scheme.spec if scheme is not None and not ignored else None
        if dense is not None:
            if layout.name != "dense":
                both = f"a {dense} weight and {layout.name} tensors are stored side by side; nothing says which counts"
                return failed(module, layout.name, ("tensors-disagree", both))
            return self._dense(module, dense, layout, expected)
        if "weight_scale" not in tensors:
            return incomplete(module)
        if scheme is not None and scheme.problem is not None and not ignored:
            return failed(module, layout.name, scheme.problem)
        if scheme is None or scheme.spec is None:
            why = "the config ignores it" if ignored else "no config group covers it"
            return self._from_tensors(module, layout, why)
        try:
            resolved = self._from_scheme(module, layout, scheme)
        except Mismatch as mismatch:
            if ignored:
                return self._from_tensors(module, layout, "the config ignores it")
            return failed(module, layout.name, ("tensors-disagree", f"{scheme.name}: {mismatch}"))
        if not ignored:
            return resolved
        text = f"the config ignores it, but it is stored as {resolved.spec.weight}; it runs as stored"
        return replace(resolved, notices=(*resolved.notices, ("ignored-but-quantized", text)), decided_by="its tensors")

    def _resolve_sparse(self, module: StoredModule, scheme: schemes.Scheme | None, ignored: bool) -> Resolved:
        try:
            whole = sparse.expanded(module)
        except Mismatch as mismatch:
            return failed(module, "", ("sparse-invalid", str(mismatch)))
        resolved = self._resolve(whole, scheme, ignored)
        bias = whole.tensors.get("bias")
        if bias is not None and (bias.dtype not in DENSE_DTYPES or bias.shape != resolved.shape[:1]):
            text = f"has a bias of {bias.dtype} {list(bias.shape)} and {resolved.shape[0]} rows"
            return failed(module, "", ("tensors-disagree", text))
        notices = resolved.notices
        if resolved.error is None:
            text = "stored sparse, as a bitmask and values; it is expanded when it is loaded, and runs as"
            notices = (*notices, ("sparse-expanded", f"{text} {resolved.spec}"))
        return replace(resolved, claimed=sparse.stored(resolved.claimed, module), notices=notices)

    def _dense(self, module: StoredModule, weight: WeightSpec, layout: Layout, expected: QuantSpec | None) -> Resolved:
        notices = []
        if "weight_scale" in module.tensors:
            text = f"stored as {weight} beside unused scales (fake-quantized); it runs as the {weight} it holds"
            notices.append(("fake-quantized", text))
        elif expected is not None and module.kind not in NEVER_TARGETS:
            text = f"the config says {expected}, but it is stored as {weight}; it runs as stored"
            notices.append(("targeted-but-dense", text))
        unused = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale")
        shape = layout.shape(module, weight)
        return Resolved(
            QuantSpec(weight),
            shape,
            weight.number,
            layout.name,
            "its tensors" if notices else "",
            present(module, layout.suffixes, unused, _BESIDE),
            tuple(notices),
        )

    def _from_scheme(self, module: StoredModule, layout: Layout, scheme: schemes.Scheme) -> Resolved:
        assert scheme.spec is not None
        tensors = module.tensors
        weight = scheme.spec.weight
        notices = []
        if weight.act_order and "weight_g_idx" not in tensors:
            # The owner's library leaves such an index at -1, which it reads as plain groups.
            notices.append(("act-order-absent", "an activation order without weight_g_idx; groups are taken in order"))
        weight = with_stored_scales(tensors, weight)
        shape = layout.shape(module, weight)
        weight = replace(weight, act_order="weight_g_idx" in tensors)
        act, error = scheme.spec.act, None
        needed = activations.needed(act)
        if needed is not None and needed not in tensors:
            error = ("scale-missing", f"{act} activations need {needed}, which isn't stored")
        elif act is not None and act.global_scale != weight.global_scale:
            error = ("scheme-contradiction", schemes.unpaired(weight, act))
        unused = activations.unused(tensors, act)
        if unused is not None:
            notices.append(("act-scale-unused", unused))
        if "output_scale" in tensors:
            notices.append(("output-scale-unused", "a static output scale is stored; outputs stay unquantized"))
        claimed = present(module, layout.suffixes, _BESIDE)
        dtype = module_dtype(tensors)
        return Resolved(QuantSpec(weight, act), shape, dtype, layout.name, "", claimed, tuple(notices), error)

    def _from_tensors(self, module: StoredModule, layout: Layout, why: str) -> Resolved:
        """Quantized, though nothing in the config says so: what the tensors say, weight-only."""
        try:
            spec = layout.spec(module, self.config.version) or self._likely(module, layout)
            if spec is not None:
                spec = with_stored_scales(module.tensors, spec)
                shape = layout.shape(module, spec)
        except Mismatch as mismatch:
            return failed(module, layout.name, ("tensors-disagree", f"{why}, and {mismatch}"))
        if spec is None:
            text = f"stored quantized, but {why} and the tensors leave bits or group size open"
            return failed(module, layout.name, ("tensors-open", text))
        code = "ignored-but-quantized" if why == "the config ignores it" else "unmatched-but-quantized"
        notices = [(code, f"{why}, but it is stored as {spec}; it runs as stored")]
        unused = activations.unused(module.tensors, None)
        if unused is not None:
            notices.append(("act-scale-unused", unused))
        claimed = present(module, layout.suffixes, _BESIDE)
        dtype = module_dtype(module.tensors)
        return Resolved(QuantSpec(spec), shape, dtype, layout.name, "its tensors", claimed, tuple(notices))

    def _likely(self, module: StoredModule, layout: Layout) -> WeightSpec | None:
        """Where bits or group size are open: the one weight spec of the config's groups that the tensors can hold."""
        fitting = set()
        for scheme in self.config.schemes:
            if scheme.spec is not None:
                try:
                    layout.shape(module, with_stored_scales(module.tensors, scheme.spec.weight))
                    fitting.add(scheme.spec.weight)
                except Mismatch:
                    pass
        return fitting.pop() if len(fitting) == 1 else None

    # ---- decoding ----------------------------------------------------------------------------------------------

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear:
        """Arrays by suffix → canonical form. Raises CheckpointError for values that no kernel may meet."""
        layout = next(layout for layout in LAYOUTS if layout.name == resolved.layout)
        if sparse.prefixes(resolved.claimed):
            arrays = sparse.Expanded(module, arrays, {"weight": resolved.shape})
        spec, shape = resolved.spec, matrix(resolved.shape)
        weight = layout.decode(module, spec.weight, shape, arrays, warn, self.config.version)
        if weight.spec.quantized:
            scales.check(weight, module, "weight_scale")
        bias = values.bias(arrays.get("bias"), f"{module}.bias")
        return activations.with_input_scales(module, weight, spec.act, bias, arrays, warn)

    # ---- reporting ---------------------------------------------------------------------------------------------

    def report(self) -> FormatReport:
        report = FormatReport(kv_cache=self.config.kv_cache)
        attention = {target for target in self._scheme_of if target.endswith("Attention")}
        for patterns in (self._targets, self._ignore):
            report.patterns_without_match += [
                pattern for pattern in patterns.without_match() if pattern not in attention
            ]
        report.config_keys = list(self.config.config.leftovers())
        for pattern in report.patterns_without_match:
            hint = _other_dialect(pattern)
            report.warnings.append(Notice("pattern-no-match", "", f"{pattern} matches no module{hint}"))
        for transform in self.config.online_transforms:
            text = f"{transform} acts on activations at run time, which fewbits doesn't do"
            report.errors.append(Notice("transform-online", "", text))
        if self.config.kv_problem:
            report.warnings.append(Notice("kv-scheme-unsupported", "", self.config.kv_problem))
        return report


def _other_dialect(pattern: str) -> str:
    if "*" in pattern and not pattern.startswith("re:"):
        return "; it looks like a wildcard, which compressed-tensors doesn't have"
    return ""
