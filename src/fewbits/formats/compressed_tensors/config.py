"""The `quantization_config` of compressed-tensors, every schema version of it, as schemes.

Source: compressed_tensors/quantization/{quant_args,quant_scheme,quant_config}.py, versions 0.5 to 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import CheckpointError, PlanError
from fewbits.formats.compressed_tensors.presets import PRESETS
from fewbits.spec import WHOLE, ActSpec, QuantSpec, WeightSpec

_FLOATS = {4: (2, 1), 6: (2, 3), 8: (4, 3)}  # bits → (exponent, mantissa); 8 is E4M3FN
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_PARTS = ("weights", "input_activations", "output_activations")
_OFFLINE = ("weight_input", "weight_output")  # transforms that are in the stored weights already
_STORAGE_FORMATS = frozenset(
    """dense int-quantized float-quantized naive-quantized pack-quantized nvfp4-pack-quantized mxfp4-pack-quantized
    mxfp6-pack-quantized mxfp8-quantized mixed-precision fakequant sparse-bitmask sparse-24-bitmask marlin-24""".split()
)
E8M0 = "float8_e8m0fnu"


@dataclass(frozen=True, slots=True)
class Scheme:
    """One config group. `spec` None: modules of this group aren't quantized (preset UNQUANTIZED or no weights).

    The weight's scale_dtype is "" until the stored scale tells it, except where the config fixes E8M0.
    `outputs`: what the group says of the layers' outputs, which stay float but for the KV cache. `problem` (code,
    text): why the group can't be run.
    """

    name: str
    targets: tuple[str, ...]
    spec: QuantSpec | None
    inputs: ActSpec | None = None
    outputs: ActSpec | None = None
    problem: tuple[str, str] | None = None


@dataclass(slots=True)
class QuantConfig:
    """The whole block. `schemes` are in the file's order; `online_transforms` names transforms that act at run time."""

    source: str
    config: Config
    version: tuple[int, ...]
    schemes: list[Scheme]
    ignore: list[str]
    kv_cache: ActSpec | None = None
    kv_problem: str = ""
    online_transforms: list[str] = field(default_factory=list)


def _scale_dtype(config: Config) -> str:
    name: str = config.get("scale_dtype", str, "")
    name = name.removeprefix("torch.")
    return E8M0 if name == "uint8" else name


def _number(config: Config) -> tuple[str, int]:
    kind = config.get("type", str, "int").lower()
    stored = config.data.get("num_bits")
    if isinstance(stored, (list, dict)) or (isinstance(stored, str) and not stored.isdecimal()):
        # ModelOpt writes [4, 3] for E4M3; others a number for each part, or the name of a format.
        text = f"num_bits is {shorten(stored)}, another tool's dialect; compressed-tensors has one integer there"
        raise PlanError("scheme-dialect", text, source=config.where("num_bits"))
    bits = config.get("num_bits", int, 8)
    if kind not in ("int", "float"):
        raise PlanError("scheme-unknown", f"type {shorten(kind)} is neither int nor float", source=config.where("type"))
    known = bits in _FLOATS if kind == "float" else 1 <= bits <= 8
    if not known:
        text = f"{kind} of {bits} bits isn't a number format here"
        raise PlanError("scheme-unknown", text, source=config.where("num_bits"))
    return kind, bits


def _strategy(config: Config) -> tuple[str, int | None]:
    """The strategy, inferred from group_size where it is absent, and the group size (None: no groups)."""
    size = config.get("group_size", int, None)
    if size is not None and (size == 0 or size < -1):
        raise CheckpointError("scheme-contradiction", f"group_size {size}", source=config.where("group_size"))
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = config.get("strategy", str, inferred).lower()
    if strategy not in _STRATEGIES:
        raise PlanError("scheme-unknown", f"strategy {shorten(strategy)} is not known", source=config.where("strategy"))
    grouped = strategy in ("group", "tensor_group")
    if grouped != (size is not None and size > 0):
        text = f"strategy {strategy} {f'with a group_size of {size}' if size else 'without a group_size'}"
        raise CheckpointError("scheme-contradiction", text, source=config.where("strategy"))
    return strategy, size if grouped else None


def _block_structure(config: Config) -> tuple[int, int]:
    value = config.data.get("block_structure")
    config.ignore("block_structure")
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() and len(part) < 10 else 0 for part in value.lower().split("x")]
    if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)):
        raise CheckpointError(
            "scheme-contradiction",
            f"strategy block needs block_structure [rows, columns], not {shorten(value)}",
            source=config.where("block_structure"),
        )
    return value[0], value[1]


def _dynamic(config: Config) -> bool | str:
    value = config.data.get("dynamic")
    config.ignore("dynamic")
    if value is None or value is False:
        return False
    if value is True:
        return True
    if value == "local":
        return "local"
    raise CheckpointError(
        "config-type",
        f"dynamic must be true, false or 'local', not {shorten(value)}",
        source=config.where("dynamic"),
    )


# Keys that say how the producer calibrated; the stored numbers are what they are.
_CALIBRATION = ("observer", "observer_kwargs", "zp_dtype")


def weight_spec(config: Config) -> WeightSpec:
    """The spec that a group's `weights` describe."""
    kind, bits = _number(config)
    strategy, size = _strategy(config)
    symmetric = config.get("symmetric", bool, True)
    actorder = config.data.get("actorder")
    config.ignore("actorder", *_CALIBRATION)
    blocks = {"tensor": (WHOLE, WHOLE), "channel": (1, WHOLE)}
    if strategy == "block":
        block = _block_structure(config)
    elif size is not None:
        block = (1, size)
    elif strategy in blocks:
        block = blocks[strategy]
    else:
        raise PlanError("scheme-unknown", f"weights with strategy {strategy}", source=config.where("strategy"))
    if strategy != "block" and "block_structure" in config:
        text = f"strategy {strategy} with a block_structure"
        raise CheckpointError("scheme-contradiction", text, source=config.where("block_structure"))
    config.ignore("block_structure")
    if _dynamic(config):
        raise CheckpointError("scheme-contradiction", "weights that are dynamic", source=config.where("dynamic"))
    exponent, mantissa = _FLOATS[bits] if kind == "float" else (0, 0)
    asymmetric = not symmetric
    if kind == "float" and asymmetric:
        raise PlanError("scheme-unknown", "asymmetric float weights", source=config.where("symmetric"))
    return WeightSpec(
        kind="float" if kind == "float" else "uint" if asymmetric else "int",
        bits=bits,
        block=block,
        scale_dtype=_scale_dtype(config),
        exponent=exponent,
        mantissa=mantissa,
        zero_point="integer" if asymmetric else "none",
        global_scale=strategy == "tensor_group",
        act_order=actorder is True or str(actorder).lower() in ("group", "dynamic"),
    )


def act_spec(config: Config) -> ActSpec:
    """The spec that `input_activations`, `output_activations` or `kv_cache_scheme` describe."""
    kind, bits = _number(config)
    strategy, size = _strategy(config)
    dynamic = _dynamic(config)
    config.ignore("actorder", "block_structure", *_CALIBRATION)
    if strategy == "token" and not dynamic:
        raise CheckpointError(
            "scheme-contradiction", "a scale per token that isn't dynamic", source=config.where("strategy")
        )
    per = {
        "group": "group",
        "tensor_group": "group",
        "token": "token",
        "tensor": "tensor",
        "attn_head": "group",
    }
    if strategy not in per:
        raise PlanError("scheme-unknown", f"activations with strategy {strategy}", source=config.where("strategy"))
    if (dynamic == "local") != (strategy == "tensor_group"):
        text = f"strategy {strategy} with dynamic {shorten(dynamic)}: local scales go with tensor_group"
        raise CheckpointError("scheme-contradiction", text, source=config.where("dynamic"))
    if strategy == "group" and not dynamic:
        raise PlanError("scheme-unknown", "static activation scales per group", source=config.where("strategy"))
    exponent, mantissa = _FLOATS[bits] if kind == "float" else (0, 0)
    scale_dtype = _scale_dtype(config)
    return ActSpec(
        kind="float" if kind == "float" else "int",
        bits=bits,
        per=per[strategy],  # type: ignore[arg-type]
        dynamic=bool(dynamic),
        group_size=size,
        symmetric=config.get("symmetric", bool, True),
        global_scale=strategy == "tensor_group",
        scale_dtype=scale_dtype or None,
        exponent=exponent,
        mantissa=mantissa,
    )


def _strings(config: Config, key: str) -> list[str]:
    values: list[str] = config.get(key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError("config-type", f"{key} must list strings", source=config.where(key))
    return values


def _scheme(config: Config, name: str) -> Scheme:
    """One group. A list under a preset's name is that preset with the list as its targets."""
    groups = config.sub("config_groups")
    assert groups is not None
    source = f"config_groups.{name}"
    preset = groups.data[name]
    if isinstance(preset, list):
        targets = tuple(_strings(groups, name))
        if name.upper() not in PRESETS:
            return Scheme(source, targets, None, problem=("scheme-unknown", f"{shorten(name)} is not a preset's name"))
        weights, inputs = PRESETS[name.upper()]
        data = {"weights": weights, "input_activations": inputs}
        group: Config | None = Config(data, config.source, f"{groups.path}.{name}")
    else:
        group = groups.sub(name)
        targets = tuple(_strings(group, "targets")) if group is not None else ()
    if group is None:
        raise CheckpointError("config-type", "an empty config group", source=groups.where(name))
    try:
        return _read_scheme(source, targets, group, config.get("format", str, None))
    except (CheckpointError, PlanError) as error:
        # One bad group must not hide what the others say: modules that it catches are refused with this text.
        group.ignore(*group.data)
        for key in _PARTS:
            part = group.sub(key) if isinstance(group.data.get(key), dict) else None
            if part is not None:
                part.ignore(*part.data)
        return Scheme(source, targets, None, problem=(error.code, f"{error.what} ({error.source})"))


def _arguments(config: Config, key: str) -> Config | None:
    """The QuantizationArgs under `key`. An empty object is one whose keys all have their defaults, as the owner's
    library reads it: int8, a scale for the tensor, static.
    """
    if config.data.get(key) == {}:
        config.ignore(key)
        return Config({}, config.source, f"{config.path}.{key}")
    return config.sub(key)


def _read_scheme(source: str, targets: tuple[str, ...], group: Config, format_of_all: str | None) -> Scheme:
    weights, inputs, outputs = (_arguments(group, key) for key in _PARTS)
    storage = group.get("format", str, format_of_all)
    if storage is not None and storage not in _STORAGE_FORMATS:
        where = group.where("format")
        raise PlanError("format-unknown", f"the storage format {shorten(storage)} isn't read yet", source=where)
    act = act_spec(inputs) if inputs is not None else None
    output = act_spec(outputs) if outputs is not None else None
    if weights is None:
        return Scheme(source, targets, None, act, output)
    weight = weight_spec(weights)
    # Plain groups may turn out to be NVFP4 when the tensors are seen.
    perhaps = act is not None and act.global_scale and (weight.kind, weight.bits, weight.block) == ("float", 4, (1, 16))
    if act is not None and weight.global_scale != act.global_scale and not perhaps:
        return Scheme(source, targets, None, problem=("scheme-contradiction", unpaired(weight, act)))
    return Scheme(source, targets, QuantSpec(weight, act), act, output)


def unpaired(weight: WeightSpec, act: ActSpec) -> str:
    return f"{weight} weights with {act} activations: NVFP4 goes with NVFP4 or with none"


def _version(text: str) -> tuple[int, ...]:
    """Numbers of "0.13.1.a20260112" for comparisons; (0,) where there are none."""
    parts = []
    for part in text.split(".")[:3]:
        digits = "".join(char for char in part if char.isdecimal())
        parts.append(int(digits[:6]) if digits else 0)
    return tuple(parts) if any(parts) else (0,)


def _transforms(config: Config) -> Iterator[str]:
    """Names of the transforms that act at run time; offline ones are already in the weights."""
    transforms = config.sub("transform_config")
    groups = transforms.sub("config_groups") if transforms else None
    if transforms is None or groups is None:
        return
    transforms.ignore(*transforms.data)
    for name, group in groups.data.items():
        groups.ignore(name)
        applied = group.get("apply", []) if isinstance(group, dict) else None
        for entry in applied if isinstance(applied, list) else [None]:
            location = entry.get("location") if isinstance(entry, dict) else None
            if location not in _OFFLINE:
                yield f"{name} at {location if isinstance(location, str) else shorten(location)}"


def parse(config: Config) -> QuantConfig:
    """Read the block that `config` points at. Raises CheckpointError where its own shape is wrong."""
    config.ignore("quant_method", "quantization_status", "global_compression_ratio", "sparsity_config")
    config.ignore("moe_sparsity_config", "total_num_heads", "total_num_kv_heads", "packed_modules_mapping")
    config.get("format", str, None)
    groups = config.sub("config_groups")
    schemes = [_scheme(config, name) for name in groups.data] if groups else []
    parsed = QuantConfig(
        source=f"{config.source}, {config.path}",
        config=config,
        version=_version(config.get("version", str, "")),
        schemes=schemes,
        ignore=_strings(config, "ignore"),
        online_transforms=list(_transforms(config)),
    )
    kv = _arguments(config, "kv_cache_scheme")
    try:
        parsed.kv_cache = _without_groups(act_spec(kv)) if kv is not None else _kv_of_groups(schemes)
    except (CheckpointError, PlanError) as error:
        parsed.kv_problem = error.what
    return parsed


def _without_groups(act: ActSpec) -> ActSpec:
    """A cache's scale per head is a group whose size the model knows."""
    return replace(act, group_size=None)


def _kv_of_groups(schemes: list[Scheme]) -> ActSpec | None:
    """Where there is no kv_cache_scheme: of a group on the attention module (since 0.13), or of a group that gives the
    outputs of k_proj and v_proj an FP8 scale (up to 0.5).
    """
    for scheme in schemes:
        if scheme.inputs is not None and _is_attention(scheme):
            return _without_groups(scheme.inputs)
    for scheme in schemes:
        if scheme.outputs is not None and scheme.outputs.kind == "float":
            return scheme.outputs
    return None


def _is_attention(scheme: Scheme) -> bool:
    return len(scheme.targets) == 1 and scheme.targets[0].endswith("Attention")
