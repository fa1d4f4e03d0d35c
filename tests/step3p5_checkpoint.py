"""Step-3.5-Flash in all sizes and layouts: config.json and tensors from the facts that are known of the release."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

RELEASE: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "num_hidden_layers": 45,
    "vocab_size": 128896,
    "head_dim": 128,
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
        "true_head_dim": 128,
    },
    "layer_types": ["sliding_attention" if i % 4 else "full_attention" for i in range(45)] + ["sliding_attention"] * 3,
    "sliding_window": 512,
    "rope_theta": [1e4 if i % 4 else 5e6 for i in range(45)] + [1e4] * 3,
    "partial_rotary_factors": [1.0 if i % 4 else 0.5 for i in range(45)] + [1.0] * 3,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 131072,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": ["full_attention"],
    "max_position_embeddings": 262144,
    "max_seq_len": 262144,
    "use_qk_norm": True,
    "zero_centered": True,
    "use_head_wise_attn_gate": True,
    "use_rope_layers": [],
    "sink": False,
    "att_impl_type": "GQA",
    "moe_layers_enum": ",".join(str(i) for i in range(3, 45)),
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_intermediate_size": 1280,
    "share_expert_dim": 1280,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "norm_expert_weight": True,
    "moe_router_scaling_factor": 3.0,
    "need_fp32_gate": True,
    "swiglu_limits": [7.0 if i in (43, 44) else 0.0 for i in range(48)],
    "swiglu_limits_shared": [16.0 if i == 44 else 0.0 for i in range(48)],
    "num_nextn_predict_layers": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": [1, 2, 128007],
    "bos_token_id": 0,
}

# What hides mistakes otherwise: other head counts in sliding layers, a window and a scaling that bite within the
# sequence, limits that bite, biases of selection that change it.
SMALL = copy.deepcopy(RELEASE) | {
    "torch_dtype": "float32",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "vocab_size": 40,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 16,
        "true_head_dim": 16,
    },
    "layer_types": ["sliding_attention" if i % 4 else "full_attention" for i in range(6)] + ["sliding_attention"] * 2,
    "sliding_window": 5,
    "rope_theta": [1e2 if i % 4 else 5e3 for i in range(6)] + [1e2] * 2,
    "partial_rotary_factors": [1.0 if i % 4 else 0.5 for i in range(6)] + [1.0] * 2,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 8.0,
    },
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "moe_layers_enum": "2,3,4,5",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 16,
    "share_expert_dim": 24,
    "swiglu_limits": [0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0],
    "swiglu_limits_shared": [0.0, 0.5, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0],
    "num_nextn_predict_layers": 2,
    "eos_token_id": [39],
}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of the bfloat16 release, by name, in the file's own layout: experts of a layer in one tensor."""
    H, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, H)
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        yield from _layer(config, layer)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (vocab, H)


def _layer(config: Mapping[str, Any], layer: int) -> Shapes:
    H, D = config["hidden_size"], config["head_dim"]
    other = config["attention_other_setting"]
    owner = other if config["layer_types"][layer] == other["attention_type"] else config
    heads, groups = owner["num_attention_heads"], owner["num_attention_groups"]
    name = f"model.layers.{layer}"
    mtp = layer >= config["num_hidden_layers"]
    yield f"{name}.input_layernorm.weight", (H,)
    yield f"{name}.post_attention_layernorm.weight", (H,)
    for part, rows in (("q", heads * D), ("k", groups * D), ("v", groups * D), ("g", heads)):
        yield f"{name}.self_attn.{part}_proj.weight", (rows, H)
    yield f"{name}.self_attn.o_proj.weight", (H, heads * D)
    yield f"{name}.self_attn.q_norm.weight", (D,)
    yield f"{name}.self_attn.k_norm.weight", (D,)
    if mtp:
        yield f"{name}.enorm.weight", (H,)
        yield f"{name}.hnorm.weight", (H,)
        yield f"{name}.eh_proj.weight", (H, 2 * H)
        yield f"{name}.transformer.shared_head.norm.weight", (H,)
        yield f"{name}.transformer.shared_head.output.weight", (config["vocab_size"], H)
    if mtp or str(layer) not in config["moe_layers_enum"].split(","):
        yield from _gated(f"{name}.mlp", config["intermediate_size"], H)
        return
    E, width = config["moe_num_experts"], config["moe_intermediate_size"]
    yield f"{name}.moe.gate.weight", (E, H)
    yield f"{name}.moe.router_bias", (E,)
    for tensor, shape in _gated(f"{name}.moe", width, H):
        yield tensor, (E, *shape)
    yield from _gated(f"{name}.share_expert", config["share_expert_dim"], H)


def _gated(name: str, width: int, hidden: int) -> Shapes:
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)


def is_experts(tensor: str) -> bool:
    return ".moe." in tensor and tensor.endswith("_proj.weight")


def is_quantized(tensor: str) -> bool:
    """Of a quantized release: the projections of attention and feed-forward, and no router, gate or head."""
    return tensor.endswith("_proj.weight") and ".g_proj." not in tensor and ".eh_proj." not in tensor


def random_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(config):
        values = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            values *= 0.2
        elif name.endswith("router_bias"):
            values *= 0.5
        elif "embed_tokens" not in name:
            values *= 2 / np.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors
