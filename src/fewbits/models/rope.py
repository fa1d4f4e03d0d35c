"""Rotary frequencies from a config: plain, linear, llama3 and yarn. An unknown type is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.checkpoint.config import Config
from fewbits.errors import PlanError
from fewbits.kernels.rope import Rope

_FASTEST = 1e20  # radians a position; real ones are at most 1, and their products with positions must be finite


@dataclass(frozen=True, slots=True)
class OwnRope:
    """What one layer says beside the settings that all share: they hold for it only where it is `scaled`."""

    theta: float
    share: float
    scaled: bool


def rope(config: Config, head_dim: int, layer_type: str = "full_attention", own: OwnRope | None = None) -> Rope:
    """The rotation of layers of a type, or of a layer with its own settings.

    Raises PlanError rope-unsupported for one whose numbers aren't finite.
    """
    try:
        made = _rope(config, head_dim, layer_type, own)
    except (ZeroDivisionError, OverflowError):
        made = None
    if made is None or not math.isfinite(made.factor) or not all(one < _FASTEST for one in made.inv_freq):
        text = "its numbers make no rotation: frequencies or factor aren't finite"
        raise PlanError("rope-unsupported", text, source=config.where("rope_scaling"))
    return made


def _rope(config: Config, head_dim: int, layer_type: str, own: OwnRope | None) -> Rope:
    """The rotation of layers of a type.

    Settings stand in `rope_parameters` (possibly one object per layer type), or, in files written before
    transformers 5, in `rope_scaling` beside a top-level `rope_theta`.
    """
    settings = config.sub("rope_parameters") or config.sub("rope_scaling")
    if settings is not None and layer_type in settings:
        settings = settings.sub(layer_type)
    if own is not None:
        settings = settings if own.scaled else None
        theta, share = own.theta, own.share
    else:
        theta = _number(settings, config, "rope_theta", 10000.0)
        share = _number(settings, config, "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * share)
    if not 1 < theta < 1e15 or not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        text = f"rope_theta {theta} over {rotary_dim} of {head_dim} channels isn't a rotation"
        raise PlanError("rope-unsupported", text, source=config.where("rope_theta"))
    plain = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    kind = "default"
    if settings is not None:
        kind = settings.get("rope_type", str, settings.get("type", str, "default"))
    if kind == "default" or settings is None:
        return Rope(tuple(plain))
    if kind == "linear":
        factor = _positive(settings, "factor")
        return Rope(tuple(frequency / factor for frequency in plain))
    if kind == "llama3":
        return _llama3(settings, plain)
    if kind == "yarn":
        return _yarn(settings, config, plain, theta)
    raise PlanError(
        "rope-unsupported",
        f"rotary embedding of type {kind!r} is unknown",
        source=settings.where("rope_type" if "rope_type" in settings else "type"),
        hint="fewbits knows the types default, linear, llama3 and yarn",
    )


def score_factor(config: Config) -> float:
    """What DeepSeek multiplies the scores of scaled rotations by, beside the width's part.

    Raises PlanError rope-unsupported where it isn't finite.
    """
    settings = config.sub("rope_parameters") or config.sub("rope_scaling")
    if settings is None or settings.get("rope_type", str, settings.get("type", str, "default")) == "default":
        return 1.0
    weight = settings.get("mscale_all_dim", float, 0.0)
    root = _mscale(_positive(settings, "factor"), weight) if weight else 1.0
    if not math.isfinite(root * root):
        text = f"mscale_all_dim {weight} makes scores that aren't finite"
        raise PlanError("rope-unsupported", text, source=settings.where("mscale_all_dim"))
    return root * root


def _number(settings: Config | None, config: Config, key: str, default: float) -> float:
    """A value of the settings, else of the config."""
    owner = settings if settings is not None and key in settings else config
    value: float = owner.get(key, float, default)
    return value


def _positive(settings: Config, key: str, default: float | None = None) -> float:
    value: float = settings.get(key, float) if default is None else settings.get(key, float, default)
    if not value > 0:
        raise PlanError("config-unsupported", f"{key} must be positive, not {value}", source=settings.where(key))
    return value


def _llama3(settings: Config, plain: list[float]) -> Rope:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    factor = _positive(settings, "factor")
    low, high = _positive(settings, "low_freq_factor"), _positive(settings, "high_freq_factor")
    original = _positive(settings, "original_max_position_embeddings")
    if not high > low:
        raise PlanError(
            "config-unsupported",
            f"high_freq_factor {high} must be above low_freq_factor {low}",
            source=settings.where("high_freq_factor"),
        )

    def scaled(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        keep = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        return (1 - keep) * frequency / factor + keep * frequency

    return Rope(tuple(scaled(frequency) for frequency in plain))


def _yarn(settings: Config, config: Config, plain: list[float], theta: float) -> Rope:
    """Frequencies that turn often within the original context are kept, slow ones divided; a ramp between."""
    rotary_dim = 2 * len(plain)
    longest = config.get("max_position_embeddings", float, 0.0)
    original = _positive(settings, "original_max_position_embeddings", longest)
    factor = _positive(settings, "factor", longest / original)

    def channel(turns: float) -> float:
        """The (fractional) channel pair that turns so often within the original context."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(_positive(settings, "beta_fast", 32.0))
    high = channel(_positive(settings, "beta_slow", 1.0))
    if settings.get("truncate", bool, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001

    def scaled(i: int, frequency: float) -> float:
        divide = min(max((i - low) / (high - low), 0.0), 1.0)
        return frequency / factor * divide + frequency * (1 - divide)

    frequencies = tuple(scaled(i, frequency) for i, frequency in enumerate(plain))
    return Rope(frequencies, _attention_factor(settings, factor))


def _attention_factor(settings: Config, factor: float) -> float:
    """What yarn multiplies cosines and sines by."""
    given = settings.get("attention_factor", float, None)
    weight = settings.get("mscale", float, None)
    weight_all = settings.get("mscale_all_dim", float, None)
    if given is not None:
        return float(given)
    if weight and weight_all:
        return _mscale(factor, weight) / _mscale(factor, weight_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
