"""A small Step-3.5-Flash as its release is laid out, with the logits of transformers' text model of Step-3.7.

transformers has the model under the names of its own layout; config.json and tensors are those of the release.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixture_models import TOKENS, generator, random_weight, token_ids
from safetensors.torch import save_file
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

LAYERS, MTP = 5, 1
FULL = [index % 4 == 0 for index in range(LAYERS)] + [False] * MTP
# The window, the scaling of rotations and the limits bite within TOKENS tokens.
CONFIG: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "torch_dtype": "bfloat16",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "vocab_size": 44,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_attention_groups": 1,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 3,
        "num_attention_groups": 1,
        "head_dim": 16,
        "true_head_dim": 16,
    },
    "layer_types": ["full_attention" if full else "sliding_attention" for full in FULL],
    "sliding_window": 8,
    "rope_theta": [5000.0 if full else 100.0 for full in FULL],
    "partial_rotary_factors": [0.5 if full else 1.0 for full in FULL],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 8.0,
    },
    "yarn_only_types": ["full_attention"],
    "max_position_embeddings": 128,
    "use_qk_norm": True,
    "zero_centered": True,
    "use_head_wise_attn_gate": True,
    "use_rope_layers": [],
    "sink": False,
    "att_impl_type": "GQA",
    "moe_layers_enum": "2,3,4",
    "moe_num_experts": 6,
    "moe_top_k": 2,
    "moe_intermediate_size": 16,
    "share_expert_dim": 24,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "norm_expert_weight": True,
    "moe_router_scaling_factor": 3.0,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0, 0.0, 0.0, 0.5, 0.4, 0.0],
    "swiglu_limits_shared": [0.0, 1.0, 0.0, 0.0, 0.6, 0.0],
    "num_nextn_predict_layers": MTP,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": [2],
    "bos_token_id": 1,
}


@dataclass(frozen=True)
class Step:
    """A row of tests/fixtures."""

    name: str
    note: str
    config: dict[str, Any] = field(default_factory=lambda: CONFIG, repr=False)
    library: str = ""


STEP = (Step("step3p5-bf16", "per-layer heads and rotations, gated heads, stacked experts with limits, an MTP layer"),)


def write(row: Step, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the published folder; the token ids and the logits that belong to them."""
    config = Step3p7TextConfig(**copy.deepcopy(row.config))
    model = Step3p7TextModel._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state, stored = model.state_dict(), {}
    for name, tensor in state.items():
        for published, rows in _published(name, tensor.shape):
            value = _value(published, tuple(rows))
            stored[published] = value.to(torch.float32 if published.endswith("router_bias") else torch.bfloat16)
        parts = [stored[published].float() for published, _ in _published(name, tensor.shape)]
        tensor.copy_(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    hidden, vocabulary = row.config["hidden_size"], row.config["vocab_size"]
    stored["lm_head.weight"] = _value("lm_head.weight", (vocabulary, hidden)).bfloat16()
    last = LAYERS + MTP - 1
    for name, shape in _mtp(f"model.layers.{last}", row.config):
        stored[name] = _value(name, shape).bfloat16()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(row.config, indent=2, sort_keys=True) + "\n")
    ids = token_ids(vocabulary, row.name)[0]
    assert len(ids) == TOKENS
    with torch.no_grad():
        states = model(torch.from_numpy(ids)[None]).last_hidden_state[0]
        logits = states @ stored["lm_head.weight"].float().T
    return {"input_ids": torch.from_numpy(ids), "logits": logits.contiguous()}


def _published(name: str, shape: torch.Size) -> list[tuple[str, tuple[int, ...]]]:
    """The release's tensors (name, shape) that transformers keeps as one."""
    name = f"model.{name}".replace(".mlp.shared_experts.", ".share_expert.")
    if name.endswith("mlp.experts.gate_up_proj"):
        half = (shape[0], shape[1] // 2, shape[2])
        block = name.removesuffix("mlp.experts.gate_up_proj")
        return [(f"{block}moe.gate_proj.weight", half), (f"{block}moe.up_proj.weight", half)]
    for theirs, ours in (
        (".mlp.gate.e_score_correction_bias", ".moe.router_bias"),
        (".mlp.gate.weight", ".moe.gate.weight"),
        (".mlp.experts.down_proj", ".moe.down_proj.weight"),
    ):
        name = name.replace(theirs, ours)
    return [(name, tuple(shape))]


def _value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("router_bias"):
        return torch.from_numpy((0.3 * generator(name).standard_normal(shape)).astype(np.float32))
    value = random_weight(name, shape, False)
    return torch.from_numpy(value - 1 if name.endswith("norm.weight") else value)  # norms are stored less one


def _mtp(layer: str, config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    H, D, other = config["hidden_size"], config["head_dim"], config["attention_other_setting"]
    heads, groups, width = other["num_attention_heads"], other["num_attention_groups"], config["intermediate_size"]
    norms = ("enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "transformer.shared_head.norm")
    return [
        *((f"{layer}.{name}.weight", (H,)) for name in norms),
        (f"{layer}.eh_proj.weight", (H, 2 * H)),
        (f"{layer}.self_attn.q_proj.weight", (heads * D, H)),
        (f"{layer}.self_attn.k_proj.weight", (groups * D, H)),
        (f"{layer}.self_attn.v_proj.weight", (groups * D, H)),
        (f"{layer}.self_attn.g_proj.weight", (heads, H)),
        (f"{layer}.self_attn.o_proj.weight", (H, heads * D)),
        (f"{layer}.self_attn.q_norm.weight", (D,)),
        (f"{layer}.self_attn.k_norm.weight", (D,)),
        (f"{layer}.mlp.gate_proj.weight", (width, H)),
        (f"{layer}.mlp.up_proj.weight", (width, H)),
        (f"{layer}.mlp.down_proj.weight", (H, width)),
        (f"{layer}.transformer.shared_head.output.weight", (config["vocab_size"], H)),
    ]
