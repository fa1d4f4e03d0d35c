"""Scales of a quantized KV cache: under which names producers store them, and whose they are.

<attention>.k_scale, .v_scale                        now
<attention>.attn.k_scale, .mla_attn.k_scale          some exporters
<attention>.qkv_proj.k_scale                         from fused projections
<attention>.k_cache.scale, .q.scale                  one vendor
<attention>.k_proj.k_scale, .k_proj.output_scale     compressed-tensors up to 0.5
<attention>.kv_scale                                 one for both, deprecated
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import regex

_NAME = regex.compile(
    r"(?P<attention>.+?\.(?:self_attn|attention|attn|mixer))(?:\.(?:mla_)?attn)?"
    r"(?:\.(?P<projection>[qkv])_proj\.(?:(?P<own>[qkv])_scale|output_scale|output_zero_point)"
    r"|\.qkv_proj\.(?P<fused>[kv])_scale|\.(?P<cache>[kv])_cache\.scale|\.(?P<query>q)\.scale"
    r"|\.(?P<which>[qkv]|kv)_(?:scale|zero_point))"
)


@dataclass(slots=True)
class KVScales:
    """Of one attention module: the tensors that hold the scale of k and of v, and all that belong with them.

    `owners` maps every such tensor to the projection in whose row the plan shows it.
    """

    k: str = ""
    v: str = ""
    owners: dict[str, str] = field(default_factory=dict)


def find(names: Iterable[str]) -> dict[str, KVScales]:
    """Attention module → its scales, from the names of all tensors."""
    found: dict[str, KVScales] = {}
    for name in names:
        if not name.endswith(("_scale", "_zero_point", ".scale")) or ".weight_" in name or ".input_" in name:
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        which = next(found for found in match.group("own", "projection", "fused", "cache", "query", "which") if found)
        scales = found.setdefault(match["attention"], KVScales())
        scales.owners[name] = f"{match['attention']}.{'k' if which == 'kv' else which}_proj"
        if not name.endswith("_zero_point"):
            scales.k = name if which in ("k", "kv") else scales.k
            scales.v = name if which in ("v", "kv") else scales.v
    return found
