"""The `quantization_config` of AMD Quark: which scheme a module has by its name, and what a scheme means.

Source: quark/torch/quantization/config/config.py and quark/torch/export/main_export/quant_config_parser.py, 0.13; older
files call `is_dynamic` and `ch_axis` `dynamic` and `axis`, and may hold null where newer ones have {} or [].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import CheckpointError, PlanError
from fewbits.formats.quark.numbers import NUMBERS, Number
from fewbits.spec import WHOLE, ActSpec, QuantSpec, WeightSpec

E8M0 = "float8_e8m0fnu"

_KV_CACHE = ActSpec("float", 8, "tensor", False, exponent=4, mantissa=3)
_CALIBRATION = """enable_buffer_reuse max_input_numel mx_element_dtype observer_cls round_method scale_type
    is_scale_quant zero_point_type""".split()
_BLOCKS = {"per_tensor": (WHOLE, WHOLE), "per_channel": (1, WHOLE)}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a part of the config says of the modules that fall under it.

    `number` is how codes are stored. The weight's scale_dtype is "" until the stored scale tells it. `spec` None: they
    aren't quantized. `outputs` stay float but for the KV cache. `problem` (code, text): why they can't be run.
    """

    name: str
    spec: QuantSpec | None
    number: Number | None = None
    outputs: ActSpec | None = None
    problem: tuple[str, str] | None = None


@dataclass(slots=True)
class QuarkConfig:
    """The whole block. `layers` and `types` are in the file's order."""

    config: Config
    everything: Scheme
    layers: dict[str, Scheme] = field(default_factory=dict)
    types: dict[str, Scheme] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    reorder: bool = True
    kv_cache: ActSpec | None = None
    kv_problem: str = ""
    refused: list[tuple[str, str]] = field(default_factory=list)  # of the whole file: (code, text)


def parse(config: Config) -> QuarkConfig:
    """Read the block that `config` points at. Raises CheckpointError where its own shape is wrong."""
    config.ignore("quant_method", "quant_mode", "version", "kv_cache_post_rope")
    whole = config.sub("global_quant_config")
    everything = scheme(whole, "global_quant_config") if whole else Scheme("global_quant_config", None)
    parsed = QuarkConfig(
        config,
        everything,
        _schemes(config, "layer_quant_config"),
        _schemes(config, "layer_type_quant_config"),
        strings(config, "exclude"),
    )
    softmax = config.sub("softmax_quant_spec")
    if softmax is not None:
        softmax.ignore(*softmax.data)
        parsed.refused.append(("scheme-unknown", "softmax_quant_spec: attention weights stay unquantized here"))
    parsed.refused += _online_rotations(config)
    export = config.sub("export")
    if export is not None:
        export.ignore("min_kv_scale", "weight_format", "weight_merge_groups")
        parsed.reorder = export.expect("pack_method", "reorder", "order") == "reorder"
        _read_cache(parsed, strings(export, "kv_cache_group"))
    return parsed


def _read_cache(parsed: QuarkConfig, group: list[str]) -> None:
    """The cache holds the outputs of k_proj and v_proj. Their entries of layer_quant_config say how; those that are
    excluded have none there, but in kv_cache_quant_config, which older files don't have.
    """
    entries = _schemes(parsed.config, "kv_cache_quant_config") | parsed.layers
    outputs = {entries[name].outputs if name in entries else None for name in group}
    if outputs == {_KV_CACHE}:
        parsed.kv_cache = _KV_CACHE
    elif group:
        found = ", ".join(sorted(str(one) for one in outputs))
        parsed.kv_problem = f"kv_cache_group: {found}; one FP8 scale for k and one for v are known"


def _online_rotations(config: Config) -> Iterator[tuple[str, str]]:
    """Rotations of activations at run time. What rotates weights alone is in the stored ones already."""
    algorithms = config.data.get("algo_config")
    config.ignore("algo_config")
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        if not isinstance(algorithm, dict):
            continue
        online = [key for key, value in algorithm.items() if "online" in key and value is True]
        online += [key for key in ("r3", "r4") if algorithm.get(key) is True]
        if online:
            name = shorten(algorithm.get("name", "a rotation"))
            yield "transform-online", f"{name} ({', '.join(online)}) acts on activations at run time"


def strings(config: Config, key: str) -> list[str]:
    """A list of strings, empty where it is absent. Raises CheckpointError."""
    values: list[str] = config.get(key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError("config-type", f"{key} must list strings", source=config.where(key))
    return values


def _schemes(config: Config, key: str) -> dict[str, Scheme]:
    block = config.sub(key)
    found = {}
    for name in block.data if block is not None else ():
        assert block is not None
        part = block.sub(name)
        found[name] = scheme(part, f"{key}.{name}") if part is not None else Scheme(f"{key}.{name}", None)
    return found


def scheme(config: Config, name: str) -> Scheme:
    """One part of the config; one that can't be read must not hide what the others say."""
    try:
        return _scheme(config, name)
    except (CheckpointError, PlanError) as error:
        for key in config.data:
            part = config.sub(key) if isinstance(config.data[key], dict) else None
            if part is not None:
                part.ignore(*part.data)
        config.ignore(*config.data)
        return Scheme(name, None, problem=(error.code, f"{error.what} ({error.source})"))


def _scheme(config: Config, name: str) -> Scheme:
    config.ignore("target_device")
    weights, inputs = _stages(config, "weight"), _stages(config, "input_tensors")
    if _stages(config, "bias"):
        raise PlanError("scheme-unknown", "a quantized bias", source=config.where("bias"))
    act, outputs = _inputs(inputs), _inputs(_stages(config, "output_tensors"))
    if not weights:
        if act is not None:
            raise PlanError("scheme-unknown", f"{act} activations without a quantized weight", source=config.source)
        return Scheme(name, None, outputs=outputs)
    number, weight = _weight(weights)
    if act is not None and act.global_scale != (weight.global_scale and weight.kind == "float"):
        text = f"{weight} weights with {act} activations: NVFP4 goes with NVFP4 or with none"
        raise CheckpointError("scheme-contradiction", text, source=config.where("input_tensors"))
    return Scheme(name, QuantSpec(weight, act), number, outputs)


def _stages(config: Config, key: str) -> list[Config]:
    """The specs under a key: none, one, or a list of stages."""
    value = config.data.get(key)
    if not isinstance(value, list):
        part = config.sub(key)
        return [] if part is None else [part]
    config.ignore(key)
    if not all(isinstance(stage, dict) for stage in value):
        raise CheckpointError("config-type", f"{key} must list objects", source=config.where(key))
    return [Config(stage, config.source, f"{config.path}.{key}[{index}]") for index, stage in enumerate(value)]


def _weight(stages: list[Config]) -> tuple[Number, WeightSpec]:
    """One stage, or two that fewbits knows: NVFP4, and integers of 4 bits that stand for FP8 ones."""
    read = [_weight_stage(stage) for stage in stages]
    if len(read) == 1:
        return read[0]
    if len(read) == 2:
        (number, first), (other, second) = read
        if (number.bits, first.block, other.bits, second.block) == (4, (1, 16), 8, (WHOLE, WHOLE)):
            if number.kind == "float" and _is_e4m3(other):
                return number, replace(first, scale_dtype="float8_e4m3fn", global_scale=True)
        if _is_e4m3(number) and first.block == (WHOLE, WHOLE) and other.kind == "int" and other.bits == 4:
            return other, replace(second, global_scale=True)
    text = " then ".join(str(spec) for _, spec in read)
    raise PlanError("scheme-unknown", f"weights in {len(read)} stages, {text}", source=stages[0].source)


def _is_e4m3(number: Number) -> bool:
    return (number.exponent, number.mantissa) == (4, 3)


def _number(config: Config) -> Number:
    name: str = config.get("dtype", str)
    if name not in NUMBERS:
        text = f"dtype {shorten(name)} has no definition here; {', '.join(NUMBERS)} have one"
        raise PlanError("scheme-unknown", text, source=config.where("dtype"))
    return NUMBERS[name]


def _older(config: Config, key: str, older: str, kind: type, default: Any) -> Any:
    config.ignore(key, older)
    return config.get(key if key in config else older, kind, default)


def _asymmetric(config: Config) -> bool:
    """null, as floats have it, is not asymmetric."""
    return not config.get("symmetric", bool, True)


def _grid(config: Config, scheme: str) -> tuple[int, int]:
    """The block of values that share a scale."""
    config.ignore("block_size", "group_size")
    if scheme in _BLOCKS:
        return _BLOCKS[scheme]
    if scheme == "per_group":
        size: int = config.get("group_size", int)
        if size < 1:
            text = f"per_group with a group_size of {size}"
            raise CheckpointError("scheme-contradiction", text, source=config.where("group_size"))
        return (1, size)
    if scheme == "per_block":
        sizes: list[Any] = config.get("block_size", list)
        if len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
            return (sizes[0], sizes[1])
        text = f"per_block needs block_size [rows, columns], not {shorten(sizes)}"
        raise CheckpointError("scheme-contradiction", text, source=config.where("block_size"))
    raise PlanError("scheme-unknown", f"qscheme {shorten(scheme)}", source=config.where("qscheme"))


def _weight_stage(config: Config) -> tuple[Number, WeightSpec]:
    number = _number(config)
    zero_type = config.data.get("zero_point_type")
    config.ignore(*_CALIBRATION, "scale_calculation_mode")
    scheme: str = config.get("qscheme", str)
    block = _grid(config, scheme)
    axis = _older(config, "ch_axis", "axis", int, None)
    if scheme == "per_channel" and axis not in (None, 0, -2):
        text = f"weights with a scale for each column (ch_axis {axis})"
        raise PlanError("scheme-unknown", text, source=config.where("ch_axis"))
    if _older(config, "is_dynamic", "dynamic", bool, False):
        raise CheckpointError("scheme-contradiction", "weights that are dynamic", source=config.where("is_dynamic"))
    e8m0 = config.get("scale_format", str, "") == "e8m0"
    asymmetric = _asymmetric(config) or not number.signed
    if number.kind == "float":
        return number, WeightSpec(
            "float", number.bits, block, E8M0 if e8m0 else "", exponent=number.exponent, mantissa=number.mantissa
        )
    zero = ("float" if zero_type == "float32" else "integer") if asymmetric else "none"
    return number, WeightSpec("uint" if asymmetric else "int", number.bits, block, "", zero_point=zero)  # type: ignore[arg-type]


def _inputs(stages: list[Config]) -> ActSpec | None:
    if not stages:
        return None
    first = _act_stage(stages[0])
    if len(stages) == 1:
        return first
    if len(stages) == 2 and (first.kind, first.bits, first.group_size) == ("float", 4, 16):
        stages[1].ignore(*stages[1].data)
        return ActSpec("float", 4, "group", True, 16, global_scale=True, exponent=2, mantissa=1)
    raise PlanError("scheme-unknown", f"activations in {len(stages)} stages", source=stages[0].source)


def _act_stage(config: Config) -> ActSpec:
    number = _number(config)
    config.ignore(*_CALIBRATION)
    scheme: str = config.get("qscheme", str)
    size = _grid(config, scheme)[1] if scheme == "per_group" else None
    axis = _older(config, "ch_axis", "axis", int, None)
    dynamic = bool(_older(config, "is_dynamic", "dynamic", bool, False))
    per = {"per_tensor": "tensor", "per_channel": "token", "per_group": "group"}.get(scheme)
    where = config.where("qscheme")
    if per is None or (per == "token" and axis not in (None, 1, -1)) or (per != "tensor" and not dynamic):
        kind = "dynamic" if dynamic else "static"
        raise PlanError("scheme-unknown", f"{kind} activations, {scheme} along axis {axis}", source=where)
    e8m0 = config.get("scale_format", str, "") == "e8m0"
    mode = config.expect("scale_calculation_mode", "even", "floor", "ceil")
    return ActSpec(
        number.kind,
        number.bits,
        per,  # type: ignore[arg-type]
        dynamic,
        group_size=size,
        symmetric=not _asymmetric(config),
        scale_dtype=E8M0 if e8m0 else None,
        exponent=number.exponent,
        mantissa=number.mantissa,
        scale_rounding=mode if e8m0 and number.bits < 8 else "even",  # of 8 bits engines round in one way alone
    )
