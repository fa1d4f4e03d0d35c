"""compressed-tensors: what llm-compressor writes, in all its schema versions.

The tensors say whether and how a module is stored, the config says what they mean; where they contradict each
other and the tensors are unambiguous, the tensors win and the plan carries a warning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import Config
from fewbits.checkpoint.files import DTYPES
from fewbits.errors import CheckpointError, Notice
from fewbits.formats import scales
from fewbits.formats.compressed_tensors import config as schemes
from fewbits.formats.compressed_tensors.layouts import (
    FLOAT_DTYPES,
    LAYOUTS,
    Layout,
    Mismatch,
    dense_spec,
    layout_of,
    with_scale_dtype,
)
from fewbits.formats.compressed_tensors.matching import NEVER_TARGETS, Patterns
from fewbits.formats.resolved import Arrays, FormatReport, Resolved, StoredModule, Warn
from fewbits.qweight import QLinear
from fewbits.spec import ActSpec, QuantSpec, WeightSpec

_ACT_SUFFIXES = ("input_scale", "input_zero_point", "input_global_scale")
_OUTPUT_SUFFIXES = ("output_scale", "output_zero_point")
_REFUSED = {
    "meta": ("format-refused", "marlin-24 is a GPU kernel's own layout, which never had a decoder"),
    "scale_packed": ("format-refused", "marlin-24 is a GPU kernel's own layout, which never had a decoder"),
    "bitmask": ("format-refused", "sparse bitmask weights aren't decoded yet"),
    "weight.bitmask": ("format-refused", "sparse bitmask weights aren't decoded yet"),
}
_OPEN = WeightSpec("float", 0)  # of modules whose tensors don't tell


def find_config(checkpoint: Checkpoint) -> Config | None:
    """The quantization block, from every place where it is found in the wild; None where there is none."""
    top = checkpoint.config.fallback or checkpoint.config
    for outer in (top, checkpoint.config, *_nested(top)):
        for key in ("quantization_config", "compression_config", "quantization"):
            # params.json's `quantization` may be anything; under the other keys only an object is one.
            fits = key != "quantization" or isinstance(outer.data.get(key), dict)
            block = outer.sub(key) if fits else None
            if block is None:
                continue
            inner = block.sub("quantization_config") if "quantization_config" in block else None
            if inner is not None:
                block.ignore("sparsity_config", "quant_method")
            return inner or block
    return None


def _nested(top: Config) -> list[Config]:
    subs = []
    for key, value in top.data.items():
        places = ("quantization_config", "compression_config")
        if isinstance(value, dict) and key not in places and any(place in value for place in places):
            sub = top.sub(key)
            if sub is not None:
                sub.ignore(*(name for name in sub.data if name not in places))
                subs.append(sub)
    return subs


def claim(checkpoint: Checkpoint) -> CompressedTensors | None:
    """The format, opened, where the checkpoint's quantization block is one of compressed-tensors."""
    config = find_config(checkpoint)
    if config is None:
        return None
    method = str(config.data.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors" or (not method and "config_groups" in config):
        return CompressedTensors(schemes.parse(config))
    return None


class CompressedTensors:
    """One checkpoint's block and how often its patterns hit."""

    name: str | None = "compressed-tensors"

    def __init__(self, config: schemes.QuantConfig) -> None:
        self.config = config
        self._ignore = Patterns(config.ignore, config.source)
        # The later group wins where one target stands in two.
        self._scheme_of = {target: scheme for scheme in config.schemes for target in scheme.targets}
        self._targets = Patterns(self._scheme_of, config.source)
        self._memory: dict[object, Resolved] = {}

    # ---- resolving ---------------------------------------------------------------------------------------------

    def resolve(self, module: StoredModule) -> Resolved:
        """What this module is. Never raises for a module's own faults: they are `error`s of the result."""
        ignored = self._ignore.match(module.name, module.kind)
        target = self._targets.match(module.name, module.kind)
        scheme = self._scheme_of[target] if target is not None else None
        if not self.config.schemes:
            decided_by = "no config group"
        elif module.kind in NEVER_TARGETS:
            decided_by = "its tensors"
        elif scheme is None:
            decided_by = "no target matches"
        else:
            decided_by = f"{scheme.name}, target {target}"
        if ignored is not None:
            decided_by = f"ignore entry {ignored}"
        # Thousands of modules share a rule, a scheme and shapes: their names play no part from here on.
        signature = tuple((suffix, info.dtype, info.shape) for suffix, info in module.tensors.items())
        key = (target, decided_by, module.kind, module.expected, signature)
        known = self._memory.get(key)
        if known is None:
            peeked: list[str] = []

            def peek(suffix: str) -> NDArray[Any] | None:
                peeked.append(suffix)
                return module.peek(suffix)

            known = self._resolve(replace(module, peek=peek), scheme, ignored is not None)
            known = known if known.decided_by else replace(known, decided_by=decided_by)
            if not peeked:  # what the data of this module decided is its own
                self._memory[key] = known
        return known

    def _resolve(self, module: StoredModule, scheme: schemes.Scheme | None, ignored: bool) -> Resolved:
        tensors = module.tensors
        for suffix, error in _REFUSED.items():
            if suffix in tensors:
                return _failed(module, "", error)
        dense = dense_spec(module)
        layout = layout_of(tensors)
        if layout is None:
            return _incomplete(module)
        expected = scheme.spec if scheme is not None and not ignored else None
        if dense is not None:
            return self._dense(module, dense, layout, expected)
        if "weight_scale" not in tensors:
            return _incomplete(module)
        if scheme is not None and scheme.problem is not None and not ignored:
            return _failed(module, layout.name, scheme.problem)
        if scheme is None or scheme.spec is None:
            why = "the config ignores it" if ignored else "no config group covers it"
            return self._from_tensors(module, layout, why)
        try:
            resolved = self._from_scheme(module, layout, scheme)
        except Mismatch as mismatch:
            if ignored:
                return self._from_tensors(module, layout, "the config ignores it")
            return _failed(module, layout.name, ("tensors-disagree", f"{scheme.name}: {mismatch}"))
        if not ignored:
            return resolved
        text = f"the config ignores it, but it is stored as {resolved.spec.weight}; it runs as stored"
        return replace(resolved, notices=(*resolved.notices, ("ignored-but-quantized", text)), decided_by="its tensors")

    def _dense(self, module: StoredModule, weight: WeightSpec, layout: Layout, expected: QuantSpec | None) -> Resolved:
        notices = []
        if "weight_scale" in module.tensors:
            text = f"stored as {weight} beside unused scales (fake-quantized); it runs as the {weight} it holds"
            notices.append(("fake-quantized", text))
        elif expected is not None and module.kind not in NEVER_TARGETS:
            text = f"the config says {expected}, but it is stored as {weight}; it runs as stored"
            notices.append(("targeted-but-dense", text))
        unused = ("weight_scale", "weight_zero_point", *_ACT_SUFFIXES, *_OUTPUT_SUFFIXES)
        shape = layout.shape(module, weight)
        return Resolved(
            QuantSpec(weight),
            shape,
            weight.number,
            layout.name,
            "its tensors" if notices else "",
            _present(module, layout.suffixes, unused, ("bias",)),
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
        weight = with_scale_dtype(tensors, weight)
        shape = layout.shape(module, weight)
        weight = replace(weight, act_order="weight_g_idx" in tensors)
        act, error = scheme.spec.act, None
        needed = _static_suffix(act)
        if needed is not None and needed not in tensors:
            error = ("scale-missing", f"{act} activations need {needed}, which isn't stored")
        if act is None:
            left = [suffix for suffix in _ACT_SUFFIXES if suffix in tensors]
            if left:
                notices.append(("act-scale-unused", f"{', '.join(left)} stored, but activations aren't quantized"))
        if "output_scale" in tensors:
            notices.append(("output-scale-unused", "a static output scale is stored; outputs stay unquantized"))
        claimed = _present(module, layout.suffixes, _ACT_SUFFIXES, _OUTPUT_SUFFIXES, ("bias",))
        dtype = _module_dtype(module, weight)
        return Resolved(QuantSpec(weight, act), shape, dtype, layout.name, "", claimed, tuple(notices), error)

    def _from_tensors(self, module: StoredModule, layout: Layout, why: str) -> Resolved:
        """Quantized, though nothing in the config says so: what the tensors say, weight-only."""
        try:
            spec = layout.spec(module, self.config.version) or self._likely(module, layout)
            if spec is not None:
                spec = with_scale_dtype(module.tensors, spec)
                shape = layout.shape(module, spec)
        except Mismatch as mismatch:
            return _failed(module, layout.name, ("tensors-disagree", f"{why}, and {mismatch}"))
        if spec is None:
            text = f"stored quantized, but {why} and the tensors leave bits or group size open"
            return _failed(module, layout.name, ("tensors-open", text))
        code = "ignored-but-quantized" if why == "the config ignores it" else "unmatched-but-quantized"
        notice = (code, f"{why}, but it is stored as {spec}; it runs as stored")
        claimed = _present(module, layout.suffixes, _ACT_SUFFIXES, _OUTPUT_SUFFIXES, ("bias",))
        dtype = _module_dtype(module, spec)
        return Resolved(QuantSpec(spec), shape, dtype, layout.name, "its tensors", claimed, (notice,))

    def _likely(self, module: StoredModule, layout: Layout) -> WeightSpec | None:
        """Where bits or group size are open: the one weight spec of the config's groups that the tensors can hold."""
        fitting = set()
        for scheme in self.config.schemes:
            if scheme.spec is not None:
                try:
                    layout.shape(module, with_scale_dtype(module.tensors, scheme.spec.weight))
                    fitting.add(scheme.spec.weight)
                except Mismatch:
                    pass
        return fitting.pop() if len(fitting) == 1 else None

    # ---- decoding ----------------------------------------------------------------------------------------------

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear:
        """Arrays by suffix → canonical form. Raises CheckpointError for values that no kernel may meet."""
        layout = next(layout for layout in LAYOUTS if layout.name == resolved.layout)
        weight = layout.decode(module, resolved.spec.weight, resolved.shape, arrays, warn, self.config.version)
        if weight.spec.quantized:
            scales.check(weight, module, "weight_scale")
        bias = arrays.get("bias")
        if bias is not None and not np.isfinite(bias.astype(np.float32)).all():
            raise CheckpointError("weight-nan", "holds values that are not finite", module=f"{module}.bias")
        act = resolved.spec.act
        static = _static_suffix(act)
        values: dict[str, float] = {}
        if static is not None:
            values[static] = _scalar(module, static, arrays)
        zero = None
        if act is not None and not act.symmetric and not act.dynamic:
            zero = _input_zero_point(module, arrays.get("input_zero_point"))
        global_scale = values.get("input_global_scale")
        return QLinear(
            weight,
            act,
            None if bias is None else bias.astype(np.float32),
            values.get("input_scale"),
            zero,
            None if global_scale is None else 1.0 / global_scale,
        )

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


def _present(module: StoredModule, *groups: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(suffix for group in groups for suffix in group if suffix in module.tensors))


def _static_suffix(act: ActSpec | None) -> str | None:
    """The stored scale that a static activation scheme can't do without."""
    if act is None:
        return None
    if act.global_scale:
        return "input_global_scale"
    return None if act.dynamic else "input_scale"


def _scalar(module: str, suffix: str, arrays: Arrays) -> float:
    values = arrays[suffix].astype(np.float64).reshape(-1)
    if values.size != 1 or not np.isfinite(values[0]) or values[0] <= 0:
        raise CheckpointError(
            "scale-invalid",
            f"one positive number is needed, not {values[:4].tolist()}",
            module=f"{module}.{suffix}",
        )
    return float(values[0])


def _input_zero_point(module: str, stored: NDArray[Any] | None) -> int:
    """A signed integer; old writers dropped one that was zero."""
    if stored is None:
        return 0
    if stored.size != 1 or stored.dtype not in (np.int8, np.int32, np.int64) or not -128 <= int(stored.item()) < 128:
        text = f"one integer of 8 bits is needed, not {stored.dtype} {list(stored.shape)}"
        raise CheckpointError("code-range", text, module=f"{module}.input_zero_point")
    return int(stored.item())


def _module_dtype(module: StoredModule, weight: WeightSpec) -> str:
    """The dtype a quantized module computes in: that of its scales where these are floats of 16 bits or more."""
    stored = DTYPES[module.tensors["weight_scale"].dtype][1].name
    return stored if stored in ("bfloat16", "float16", "float32") else ""


def _failed(module: StoredModule, layout: str, error: tuple[str, str]) -> Resolved:
    shape = _rough_shape(module)
    return Resolved(QuantSpec(_OPEN), shape, "", layout, "", tuple(module.tensors), (), error)


def _incomplete(module: StoredModule) -> Resolved:
    found = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in sorted(module.tensors.items()))
    weight = module.tensors.get("weight")
    if weight is not None and weight.dtype not in FLOAT_DTYPES and "weight_scale" not in module.tensors:
        text = f"{weight.dtype} weights without weight_scale: no scale has a default (stored: {found})"
    else:
        text = f"its tensors make no weight that fewbits knows (stored: {found})"
    return _failed(module, "", ("module-incomplete", text))


def _rough_shape(module: StoredModule) -> tuple[int, int]:
    for suffix in ("weight", "weight_packed", "compressed", "weight.compressed"):
        if suffix in module.tensors:
            shape = module.tensors[suffix].shape
            return (shape[0] if shape else 1, shape[-1] if len(shape) > 1 else 1)
    return (0, 0)
