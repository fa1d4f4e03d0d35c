"""Writes tests/fixtures/matching.json: which target and which ignore entry compressed-tensors finds for which module.

Each case is a set of targets and ignore entries, drawn from patterns as they are found in published configs, over one
tree of modules: `found` maps a module's name to its first target (null for none) and whether an entry ignores it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.utils.match import is_match, match_targets
from fixture_models import generator

CASES = 32
LAYERS = ("model.layers.0", "model.layers.11")
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate", "mlp.gate_proj",
    "mlp.up_proj", "mlp.down_proj", "mlp.experts.3.w1", "mlp.shared_expert.up_proj",
)  # fmt: skip
MODULES = {f"{layer}.{name}": "Linear" for layer in LAYERS for name in LINEAR}
MODULES |= {"lm_head": "Linear", "model.visual.q_proj": "Linear", "mtp.fc": "Linear", "model.embed_tokens": "Embedding"}
PATTERNS = r"""
    Linear Embedding Module LlamaAttention linear lm_head re:.*lm_head re:lm_head$ re:^lm re:.*q_proj
    re:.*q_proj$ re:.*[qkv]_proj$ re:.*v_proj re:.*up_proj re:.*(gate|up)_proj re:gate re:.*mlp.gate
    re:.*mlp.gate$ re:.*mlp\.gate\b re:.*gate.* mlp.gate gate q_proj *.q_proj re:model\.layers\.0\..*
    re:model.layers.1 re:model\.layers\.1\. re:.*\.1\d?\. re:.*experts.* re:.*mlp.experts.\d+.w[123]$
    re:.*shared_expert\. re:^mtp.* re:visual.* re:.*visual.* model.visual model.visual.q_proj
    model.layers.0.self_attn.q_proj model.layers.11.mlp.gate model.layers.11.mlp.down_proj model.layers.0
    re:.*self_attn.* re:(?!.*layers.0.).*proj$ re: re:.* model.embed_tokens re:.*embed
""".split()
CLASSES = {"Linear": torch.nn.Linear(1, 1), "Embedding": torch.nn.Embedding(1, 1)}


def cases() -> list[dict[str, object]]:
    drawn = []
    for number in range(CASES):
        draw = generator("matching", str(number))
        targets, ignore = (draw.permutation(PATTERNS)[: draw.integers(0, most)].tolist() for most in (6, 4))
        found = {}
        for name, kind in MODULES.items():
            module = CLASSES[kind]
            first = next(iter(match_targets(name, module, targets)), None)
            ignored = is_match(name, module, ignore)
            if first is not None or ignored:
                found[name] = [first, ignored]
        drawn.append({"targets": targets, "ignore": ignore, "found": found})
    return drawn


def write(path: Path) -> None:
    lines = ",\n".join(json.dumps(case) for case in cases())
    path.write_text(f'{{"modules": {json.dumps(MODULES)},\n"cases": [\n{lines}\n]}}\n')
