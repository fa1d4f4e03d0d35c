"""The `quantization_config` of compressed-tensors, every schema version of it, as schemes.

Source: compressed_tensors/quantization/{quant_args,quant_scheme,quant_config}.py, versions 0.5 to 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import CheckpointError, PlanError
from fewbits.spec import WHOLE, ActSpec, QuantSpec, WeightSpec

_FLOATS = {4: (2, 1), 6: (2, 3), 8: (4, 3)}  # bits → (exponent, mantissa); 8 is E4M3FN
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_ONLINE = ("input", "output", "q_attn", "k_cache")
E8M0 = "float8_e8m0fnu"


def _int8_token(bits: int = 8) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "token", "dynamic": True}


def _fp(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", **more}


def _group(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": 128, "symmetric": symmetric}


def _mx(bits: int, dynamic: bool = False) -> dict[str, Any]:
    return _fp(bits, strategy="group", group_size=32, dynamic=dynamic, scale_dtype="torch.uint8")


_NVFP4 = _fp(4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_FP8_TOKEN = _fp(8, strategy="token", dynamic=True)

# Preset name → (weights, input_activations): a config group given as a list of targets under such a name.
PRESETS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "UNQUANTIZED": (None, None),
    "W8A8": ({"num_bits": 8, "strategy": "channel"}, _int8_token()),
    "INT8": ({"num_bits": 8, "strategy": "channel"}, _int8_token()),
    **{f"W{bits}A16": (_group(bits), None) for bits in range(2, 9)},
    "W4A16_ASYM": (_group(4, symmetric=False), None),
    **{f"W{bits}A8": (_group(bits), _int8_token()) for bits in range(2, 8)},
    **{f"W{bits}A4": (_group(bits), _int8_token(4)) for bits in range(2, 5)},
    "W4AFP8": (_group(4), _FP8_TOKEN),
    "FP8": (_fp(8, strategy="tensor"), _fp(8, strategy="tensor")),
    "FP8_DYNAMIC": (_fp(8, strategy="channel"), _FP8_TOKEN),
    "FP8_BLOCK": (
        _fp(8, strategy="block", block_structure=[128, 128]),
        _fp(8, strategy="group", group_size=128, dynamic=True),
    ),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, {**_NVFP4, "dynamic": "local"}),
    "MXFP4A16": (_mx(4), None),
    "MXFP4": (_mx(4), _mx(4, dynamic=True)),
    "MXFP4XFP8": (_mx(4), _fp(8, strategy="group", group_size=128, dynamic=True)),
    "MXFP6A16": (_mx(6), None),
    "MXFP6A8": (_mx(6), _mx(8, dynamic=True)),
    "MXFP8A16": (_mx(8), None),
    "MXFP8": (_mx(8), _mx(8, dynamic=True)),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One config group. `spec` None: modules of this group aren't quantized (preset UNQUANTIZED or no weights).

    The weight's scale_dtype is "" until the stored scale tells it, except where the config fixes E8M0.
    `storage` is the group's own format or None. `static_output`: a calibrated scale of the output stands in the
    file. `contradiction`: why the group can't be run, "" where it can.
    """

    name: str
    targets: tuple[str, ...]
    spec: QuantSpec | None
    storage: str | None
    inputs: ActSpec | None = None
    static_output: bool = False
    contradiction: str = ""


@dataclass(slots=True)
class QuantConfig:
    """The whole block. `schemes` are in the file's order; `online_transforms` names transforms that act at run time."""

    source: str
    config: Config
    version: tuple[int, ...]
    storage: str | None
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
    bits = config.get("num_bits", int, 8)
    if kind not in ("int", "float"):
        raise PlanError("scheme-unknown", f"type {shorten(kind)} is neither int nor float", source=config.where("type"))
    known = bits in _FLOATS if kind == "float" else 1 <= bits <= 8
    if not known:
        raise PlanError(
            "scheme-unknown",
            f"{kind} of {bits} bits isn't a number format here",
            source=config.where("num_bits"),
        )
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
    if strategy in ("group", "tensor_group") and (size is None or size < 0):
        raise CheckpointError(
            "scheme-contradiction",
            f"strategy {strategy} without a group_size",
            source=config.where("strategy"),
        )
    return strategy, size if strategy in ("group", "tensor_group") else None


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
    if value in (None, False):
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


def _group_config(config: Config, name: str) -> Config:
    """A group as an object; a list under a preset's name is that preset with the list as its targets."""
    groups = config.sub("config_groups")
    assert groups is not None
    value = groups.data[name]
    if isinstance(value, list):
        if name.upper() not in PRESETS:
            raise PlanError("scheme-unknown", f"{shorten(name)} is not a preset's name", source=groups.where(name))
        groups.ignore(name)
        weights, inputs = PRESETS[name.upper()]
        value = {"targets": value, "weights": weights, "input_activations": inputs}
        return Config(value, config.source, f"{groups.path}.{name}")
    sub = groups.sub(name)
    if sub is None:
        raise CheckpointError("config-type", "an empty config group", source=groups.where(name))
    return sub


def _strings(config: Config, key: str) -> list[str]:
    values: list[str] = config.get(key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError("config-type", f"{key} must list strings", source=config.where(key))
    return values


def _scheme(config: Config, name: str) -> Scheme:
    group = _group_config(config, name)
    targets = tuple(_strings(group, "targets"))
    storage = group.get("format", str, None)
    weights, inputs, outputs = (group.sub(key) for key in ("weights", "input_activations", "output_activations"))
    source = f"config_groups.{name}"
    try:
        act = act_spec(inputs) if inputs else None
        static_output = outputs is not None and not act_spec(outputs).dynamic
        if weights is None:
            return Scheme(source, targets, None, storage, act, static_output)
        weight = weight_spec(weights)
    except (CheckpointError, PlanError) as error:
        # One bad group must not hide what the others say: modules that it catches are refused with this text.
        for part in (weights, inputs, outputs):
            if part is not None:
                part.ignore(*part.data)
        contradiction = f"{error.what} ({error.source})"
        return Scheme(source, targets, None, storage, contradiction=contradiction)
    return Scheme(source, targets, QuantSpec(weight, act), storage, act, static_output, _incompatible(weight, act))


def _incompatible(weight: WeightSpec, act: ActSpec | None) -> str:
    """Pairs of weights and activations that mean nothing together."""
    nvfp4_weight = weight.global_scale
    nvfp4_act = act is not None and act.global_scale
    if act is not None and nvfp4_weight != nvfp4_act:
        return f"{weight} weights with {act} activations: NVFP4 goes with NVFP4 or with none"
    return ""


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
        applied = group.get("apply", []) if isinstance(group, dict) else []
        for entry in applied if isinstance(applied, list) else []:
            location = entry.get("location") if isinstance(entry, dict) else None
            if location in _ONLINE:
                yield f"{name} at {location}"


def parse(config: Config) -> QuantConfig:
    """Read the block that `config` points at. Raises CheckpointError where its own shape is wrong."""
    config.ignore("quant_method", "quantization_status", "global_compression_ratio", "sparsity_config")
    config.ignore("moe_sparsity_config", "total_num_heads", "total_num_kv_heads", "packed_modules_mapping")
    groups = config.sub("config_groups")
    schemes = [_scheme(config, name) for name in groups.data] if groups else []
    parsed = QuantConfig(
        source=f"{config.source}, {config.path}",
        config=config,
        version=_version(config.get("version", str, "")),
        storage=config.get("format", str, None),
        schemes=schemes,
        ignore=_strings(config, "ignore"),
        online_transforms=list(_transforms(config)),
    )
    kv = config.sub("kv_cache_scheme")
    attention = [scheme for scheme in schemes if scheme.inputs and _is_attention(scheme)]
    try:
        if kv is not None:
            per_head = str(kv.data.get("strategy")).lower() == "attn_head"
            parsed.kv_cache = act_spec(kv)
        elif attention:
            parsed.kv_cache, per_head = attention[0].inputs, False
        else:
            return parsed
        assert parsed.kv_cache is not None
        if per_head:
            parsed.kv_cache = replace(parsed.kv_cache, group_size=None)
    except (CheckpointError, PlanError) as error:
        parsed.kv_problem = error.what
    return parsed


def _is_attention(scheme: Scheme) -> bool:
    return len(scheme.targets) == 1 and scheme.targets[0].endswith("Attention")
