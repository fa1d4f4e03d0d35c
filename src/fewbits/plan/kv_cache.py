"""The KV cache in the plan: whose rows show its stored scales, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from fewbits.formats import kv_scales
from fewbits.formats.kv_scales import KVScales
from fewbits.plan.modules import Modules
from fewbits.plan.rows import LoadPlan
from fewbits.spec import ActSpec

_OF_PROJECTIONS = ("output_scale", "output_zero_point")  # suffixes that other modules have too
_DTYPES: dict[str, Literal["f32", "bf16", "f16"]] = {"float32": "f32", "float16": "f16"}


def take_scales(modules: Modules, loose: list[str]) -> dict[str, KVScales]:
    """Attention module → its scales, which are taken out of what is still to be resolved."""
    known = [f"{name}.{suffix}" for name, stored in modules.items() for suffix in _OF_PROJECTIONS if suffix in stored]
    found = kv_scales.find([*known, *loose])
    taken = {tensor for scales in found.values() for tensor in scales.owners}
    loose[:] = [name for name in loose if name not in taken]
    for tensor in taken.intersection(known):
        name, _, suffix = tensor.rpartition(".")
        del modules[name][suffix]
        if not modules[name]:
            del modules[name]
    return found


def show_scales(plan: LoadPlan, found: Mapping[str, KVScales]) -> None:
    """Put the scales into the rows of their projections; those without one become leftovers."""
    if not found:
        return
    names = {row.name for row in plan.rows}
    siblings = {row.name.rpartition(".")[0]: row.name for row in reversed(plan.rows)}
    owners: dict[str, list[str]] = {}
    for attention, scales in found.items():
        for tensor, owner in scales.owners.items():
            # Where projections are stored fused: the first module of the attention.
            owner = owner if owner in names else siblings.get(attention, owner)
            owners.setdefault(owner, []).append(tensor)
    plan.rows = [
        row._replace(others=(*row.others, *owners.pop(row.name))) if row.name in owners else row for row in plan.rows
    ]
    plan.leftover_tensors += [tensor for tensors in owners.values() for tensor in tensors]


def choose_cache(
    plan: LoadPlan,
    found: Mapping[str, KVScales],
    scheme: ActSpec | None,
    dtype: str,
    warn: Callable[[str, str, str], None],
) -> None:
    """How the cache is kept: by the config's scheme where that is FP8 and its scales are stored, else as a float.

    `dtype` is the config's, "" where it has none: then the embedding's. `warn` gets code, module and text.
    """
    embedding = next((row.dtype for row in plan.rows if row.kind == "embedding"), "")
    plan.cache_dtype = _DTYPES.get(dtype or embedding, "bf16")
    complete = {name: scales for name, scales in found.items() if scales.k and scales.v}
    if scheme is None:
        if complete:
            text = "scales of a KV cache are stored, but the config has no scheme for it; the cache stays float"
            warn("kv-scales-unused", next(iter(complete)), text)
        return
    if scheme.kind != "float" or scheme.bits != 8 or scheme.dynamic or not scheme.symmetric:
        warn("kv-scheme-unsupported", "", f"a KV cache of {scheme} isn't supported; it stays {plan.cache_dtype}")
        return
    if plan.model is None:
        return
    stored = {row.name for row in plan.rows}
    for layer, config in enumerate(plan.model.layers):
        name = plan.model.attention_name(layer, stored)
        if not config.attention.stored_scales:
            text = f"its scales may be of latents or of heads' keys and values; it stays {plan.cache_dtype}"
            warn("kv-scheme-unsupported", name, text)
        elif name in complete:
            plan.kv_scales[layer] = (complete[name].k, complete[name].v)
        else:
            warn("kv-scales-missing", name, f"no scales for its KV cache are stored; it stays {plan.cache_dtype}")
    plan.kv_cache = scheme if plan.kv_scales else None
