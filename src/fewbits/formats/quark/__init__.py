"""AMD Quark: what its two exporters write, in memory and from file to file.

Names are the checkpoint's own, and the tensors say whether a module is quantized: nothing is fused here, no scale has a
default, and a scale of one number a row is [N] or [N, 1] by its count.
"""

from __future__ import annotations

from dataclasses import replace

from fewbits.checkpoint import Checkpoint
from fewbits.errors import Notice
from fewbits.formats import activations, mxfp4, scales, values
from fewbits.formats.find import find_config
from fewbits.formats.quark import custom, stored
from fewbits.formats.quark.config import QuarkConfig, Scheme, parse
from fewbits.formats.quark.matching import CLASSES, Entries
from fewbits.formats.resolved import Arrays, FormatReport, ModuleKind, Resolved, StoredModule, Warn
from fewbits.formats.stored import Mismatch, dense_spec, failed, incomplete, matrix, present
from fewbits.qweight import QLinear
from fewbits.spec import ActSpec, QuantSpec, WeightSpec

_NEVER = ("norm", "conv", "other", "embedding")  # kinds that a config means only by their class
_BESIDE = (*activations.SUFFIXES, "input_scale_2", "input_zero_point_2", "output_scale", "output_zero_point", "bias")
_WEIGHT = ("weight", "weight_scale", "weight_zero_point", "weight_scale_2", "weight_zero_point_2")
_ONLINE = ("input_rotation", "input_prescale")
_DENSE = "dense"

Rule = tuple[str | None, str | None, str | None]  # entries of exclude, layer_quant_config and layer_type_quant_config


def claim(checkpoint: Checkpoint) -> Quark | None:
    """The format, opened, where the checkpoint's quantization block is Quark's own or that of a custom mode."""
    config = find_config(checkpoint)
    if config is None:
        return None
    method = str(config.data.get("quant_method", "")).lower()
    if method == "quark":
        return Quark(parse(config))
    if method in custom.METHODS and isinstance(config.data.get("export"), dict):
        return Custom(custom.parse_custom(config))
    return None


class Quark:
    name: str | None = "quark"

    def __init__(self, config: QuarkConfig) -> None:
        self.config = config
        source = f"{config.config.source}, {config.config.path}"
        self._exclude = Entries(config.exclude, source)
        self._layers = Entries(config.layers, source)

    # ---- resolving ---------------------------------------------------------------------------------------------

    def rule(self, name: str, kind: ModuleKind) -> Rule:
        of_class = next((one for one in self.config.types if kind in CLASSES.get(one, ())), None)
        return self._exclude.match(name), self._layers.match(name), of_class

    def _scheme(self, kind: ModuleKind, rule: Rule) -> tuple[Scheme, str]:
        """The scheme and what of the config it comes from, exclusion apart: the first of layer, class and global."""
        _, layer, of_class = rule
        if layer is not None:
            return self.config.layers[layer], f"layer_quant_config {layer}"
        if of_class is not None:
            return self.config.types[of_class], f"layer_type_quant_config {of_class}"
        if kind in _NEVER:
            return Scheme("", None), "its tensors"
        return self.config.everything, "global_quant_config"

    def resolve(self, module: StoredModule, rule: Rule) -> Resolved:
        """What this module is. Never raises for a module's own faults: they are `error`s of the result."""
        scheme, decided_by = self._scheme(module.kind, rule)
        excluded = rule[0]
        if excluded is not None:
            decided_by = f"exclude entry {excluded}"
        resolved = self._resolve(module, scheme, excluded is not None)
        return resolved if resolved.decided_by else replace(resolved, decided_by=decided_by)

    def _resolve(self, module: StoredModule, scheme: Scheme, excluded: bool) -> Resolved:
        tensors = module.tensors
        online = [suffix for suffix in _ONLINE if suffix in tensors]
        if online:
            return failed(module, "", ("transform-online", f"{', '.join(online)} acts on activations at run time"))
        blocks = mxfp4.resolve_blocks(module)
        if blocks is not None:
            return _left_alone(blocks, excluded)
        dense = dense_spec(tensors)
        if dense is not None:
            return self._dense(module, dense, None if excluded else scheme.spec)
        if "weight" not in tensors or not any(suffix.startswith("weight_scale") for suffix in tensors):
            return incomplete(module)
        if scheme.problem is not None:
            return failed(module, "", scheme.problem)
        if scheme.spec is None:
            return self._from_tensors(module)
        try:
            return self._quantized(module, scheme, excluded)
        except Mismatch as mismatch:
            return failed(module, "", ("tensors-disagree", f"{scheme.name}: {mismatch}"))

    def _from_tensors(self, module: StoredModule) -> Resolved:
        """Quantized, though nothing in the config says so: the one scheme that the tensors can hold, weight-only."""
        fitting: dict[WeightSpec, Resolved] = {}
        of_config = (*self.config.layers.values(), *self.config.types.values(), self.config.everything)
        for scheme in (*of_config, *stored.PLAIN):
            if scheme.spec is not None:
                try:
                    found = self._quantized(module, replace(scheme, spec=QuantSpec(scheme.spec.weight)), False)
                except Mismatch:
                    continue
                fitting.setdefault(found.spec.weight, found)
        if len(fitting) != 1:
            text = "stored quantized, but the config has no scheme for it, and the tensors leave open which it is"
            return failed(module, "", ("tensors-open", text))
        [(weight, found)] = fitting.items()
        notice = ("unmatched-but-quantized", f"no scheme covers it, but it is stored as {weight}; it runs as stored")
        return replace(found, notices=(notice, *found.notices), decided_by="its tensors")

    def _dense(self, module: StoredModule, weight: WeightSpec, expected: QuantSpec | None) -> Resolved:
        notices = []
        if "weight_scale" in module.tensors:
            text = f"stored as {weight} beside unused scales (fake-quantized); it runs as the {weight} it holds"
            notices.append(("fake-quantized", text))
        elif expected is not None:
            text = f"the config says {expected}, but it is stored as {weight}; it runs as stored"
            notices.append(("targeted-but-dense", text))
        return Resolved(
            QuantSpec(weight),
            module.tensors["weight"].shape,
            weight.number,
            _DENSE,
            "its tensors" if notices else "",
            present(module, _WEIGHT, _BESIDE),
            tuple(notices),
        )

    def _quantized(self, module: StoredModule, scheme: Scheme, excluded: bool) -> Resolved:
        assert scheme.spec is not None
        tensors, act = module.tensors, scheme.spec.act
        layout, weight, shape = stored.fit(module, scheme, self.config.reorder)
        notices = []
        if excluded:
            text = f"the config ignores it, but it is stored as {weight}; it runs as stored"
            notices.append(("ignored-but-quantized", text))
        needed = _needed(act)
        error = None
        if needed is not None and needed not in tensors:
            error = ("scale-missing", f"{act} activations need {needed}, which isn't stored")
        unused = [suffix for suffix in ("input_scale", "input_scale_2") if suffix in tensors and suffix != needed]
        if unused:
            notices.append(("act-scale-unused", f"{', '.join(unused)} stored, but {act or 'a16'} has no use for it"))
        dtype = weight.scale_dtype if weight.scale_dtype in ("bfloat16", "float16", "float32") else ""
        claimed = present(module, _WEIGHT, _BESIDE)
        decided_by = "its tensors" if excluded else ""
        return Resolved(QuantSpec(weight, act), shape, dtype, str(layout), decided_by, claimed, tuple(notices), error)

    # ---- decoding ----------------------------------------------------------------------------------------------

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear:
        """Arrays by suffix → canonical form. Raises CheckpointError for values that no kernel may meet."""
        if resolved.layout == mxfp4.LAYOUT:
            return mxfp4.decode_blocks(module, resolved, arrays)
        spec, shape = resolved.spec, matrix(resolved.shape)
        bias = values.bias(arrays.get("bias"), f"{module}.bias")
        if resolved.layout == _DENSE:
            return QLinear(values.dense_weight(arrays["weight"], spec.weight, shape, f"{module}.weight"), None, bias)
        weight = stored.decode(module, spec.weight, shape, stored.layout_named(resolved.layout), arrays, warn)
        scales.check(weight, module, stored.suffix_of_scale(spec.weight))
        if spec.act is not None and spec.act.global_scale:
            scale = scales.positive(arrays["input_scale_2"], f"{module}.input_scale_2")
            return QLinear(weight, spec.act, bias, input_global_scale=scale)
        return activations.with_input_scales(module, weight, spec.act, bias, arrays, warn)

    # ---- reporting ---------------------------------------------------------------------------------------------

    def report(self) -> FormatReport:
        report = FormatReport(kv_cache=self.config.kv_cache)
        report.patterns_without_match = [*self._exclude.without_match(), *self._layers.without_match()]
        for entry in report.patterns_without_match:
            report.warnings.append(Notice("pattern-no-match", "", f"{entry} matches no module"))
        report.config_keys = list(self.config.config.leftovers())
        if self.config.kv_problem:
            report.warnings.append(Notice("kv-scheme-unsupported", "", self.config.kv_problem))
        report.errors += [Notice(code, "", text) for code, text in self.config.refused]
        return report


def _needed(act: ActSpec | None) -> str | None:
    """The stored scale that a static activation scheme can't do without; a second stage's is NVFP4's global one."""
    return "input_scale_2" if act is not None and act.global_scale else activations.needed(act)


def _left_alone(blocks: Resolved, excluded: bool) -> Resolved:
    """Experts of gpt-oss as they are published. The file-to-file exporter quantizes what is called `weight` and copies
    all else, so that no scheme of the config is theirs, its inputs' least of all.
    """
    if blocks.error is not None:
        return blocks
    code = "ignored-but-quantized" if excluded else "unmatched-but-quantized"
    text = f"Quark left it as gpt-oss is published, {blocks.spec.weight}; it runs as stored, its inputs unquantized"
    return replace(blocks, notices=((code, text),))


class Custom(Quark):
    """The same under other formats' names."""

    def _scheme(self, kind: ModuleKind, rule: Rule) -> tuple[Scheme, str]:
        scheme, decided_by = super()._scheme(kind, rule)
        return scheme, self.config.config.path if scheme.name else decided_by

    def resolve(self, module: StoredModule, rule: Rule) -> Resolved:
        module, stored_as = custom.renamed(module)
        resolved = super().resolve(module, rule)
        return replace(resolved, claimed=tuple(stored_as[suffix] for suffix in resolved.claimed))

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear:
        return super().decode(module, resolved, custom.Renamed(arrays), warn)
