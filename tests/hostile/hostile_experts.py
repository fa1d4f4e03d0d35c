"""Experts that don't fit: their numbers, shapes and values, in a small Qwen3-MoE."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import Build, Case, in_data, seen, tensors_of
from make import BF16, dense, llama, llama_tensors

BLOCK = "model.layers.0.mlp"
STACKS = {f"{BLOCK}.experts.gate_up_proj": (4, 32, 64), f"{BLOCK}.experts.down_proj": (4, 64, 16)}
CONFIG = llama(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)


def experts(changes: dict[str, Any] | None = None, **config: Any) -> Build:
    """The model with other tensors (None: left out) and other values in its config."""
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".mlp." not in name}
    tensors |= dense(4, 64).under(f"{BLOCK}.gate")
    for name in ("q_norm", "k_norm"):
        tensors[f"model.layers.0.self_attn.{name}.weight"] = np.ones(32, BF16)
    random = np.random.default_rng(0)
    tensors |= {name: (random.standard_normal(shape) / 8).astype(BF16) for name, shape in STACKS.items()}
    changed = tensors | (changes or {})
    return tensors_of({name: tensor for name, tensor in changed.items() if tensor is not None}, CONFIG | config)


def stack(name: str, *shape: int, value: float = 0.1) -> dict[str, Any]:
    return {f"{BLOCK}.experts.{name}": np.full(shape, value, BF16)}


def with_nan(name: str) -> dict[str, Any]:
    tensor = np.full(STACKS.get(name, (4, 64)), 0.1, BF16)
    tensor.reshape(-1)[-1] = np.nan
    return {name: tensor}


EXPERTS: dict[str, Case] = {
    "experts as they should be": Case(experts(), (), ""),
    "more experts chosen than there are": seen(experts(num_experts_per_tok=5), "config-unsupported"),
    "no expert chosen": seen(experts(num_experts_per_tok=0), "config-unsupported"),
    "more experts than are stored": seen(experts(num_experts=5), "shape-mismatch", "module-missing"),
    "fewer experts than are stored": seen(experts(num_experts=3), "shape-mismatch"),
    "a million experts": seen(experts(num_experts=10**6), "config-unsupported"),
    "a hundred and fifty thousand experts": seen(experts(num_experts=150_000), "shape-mismatch", "module-missing"),
    "a stack of other experts": seen(experts(stack("down_proj", 3, 64, 16)), "module-missing"),
    "experts of another width": seen(experts(stack("down_proj", 4, 64, 17)), "shape-mismatch"),
    "experts on their side": seen(experts(stack("gate_up_proj", 4, 64, 32)), "shape-mismatch"),
    "experts without a way back": seen(experts({f"{BLOCK}.experts.down_proj": None}), "module-missing"),
    "no router": seen(experts({f"{BLOCK}.gate.weight": None}), "module-missing"),
    "a router that is no number": in_data(experts(with_nan(f"{BLOCK}.gate.weight")), "weight-nan"),
    "an expert that is no number": in_data(experts(with_nan(f"{BLOCK}.experts.down_proj")), "weight-nan"),
    "a router beyond float32": in_data(
        experts({f"{BLOCK}.gate.weight": np.full((4, 64), 3e38, BF16)}), "logits-not-finite"
    ),
    "experts beyond float32": in_data(experts(stack("gate_up_proj", 4, 32, 64, value=3e38)), "logits-not-finite"),
    "layers without experts of a text": seen(experts(mlp_only_layers="0"), "config-type"),
    "a step of no layers": seen(experts(decoder_sparse_step=0), "config-unsupported"),
}
