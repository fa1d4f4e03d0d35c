"""Small random decoders, the raw material of tests/fixtures.

Owns: the shapes of the base models, their weights, their config.json in the present and in the older
spelling, and the token ids that are run through them.

The weights are drawn by NumPy (the same on every machine, which torch's vectorised normal is not) and made
to show mistakes: rows of different magnitude, a mean that changes every 16 columns (so that zero points
differ from group to group), norm weights away from one, biases away from zero, and a few exact zeros.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOKENS = 24
MEAN_BLOCK = 16  # columns that share a mean; divides every group size in use


@dataclass(frozen=True)
class BaseModel:
    """One base model: a transformers model type, its config keys and how its folder is spelled.

    ``older_config`` writes config.json as models published before transformers 5 have it (torch_dtype,
    rope_theta, rope_scaling); otherwise it stays as transformers wrote it (dtype, rope_parameters).
    ``stacked`` saves experts as transformers 5 keeps them in memory, all of a layer in one tensor. ``pruned`` sets
    weights of the layers' projections to zero: two of every four columns, or five of eight anywhere.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    older_config: bool = False
    shard_bytes: int | None = None
    stacked: bool = False
    pruned: Literal["", "2:4", "anywhere"] = ""

    def but(
        self,
        dtype: str | None = None,
        older_config: bool | None = None,
        shard_bytes: int | None = None,
        **config: Any,
    ) -> BaseModel:
        """The same model with other config keys, dtype, spelling or shards."""
        return replace(
            self,
            config=self.config | config,
            dtype=dtype or self.dtype,
            older_config=self.older_config if older_config is None else older_config,
            shard_bytes=shard_bytes or self.shard_bytes,
        )


COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 64 positions put the 16-wide head's eight frequencies in all three regimes: kept, blended, divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LLAMA = BaseModel("llama", COMMON)
LLAMA_SMALL = LLAMA.but(
    num_hidden_layers=1, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, vocab_size=48
)
# 52 rows: packed zero points of the head end inside a word.
LLAMA_ROWS_52 = LLAMA_SMALL.but(vocab_size=52)
# 12 key rows: those of k_proj and v_proj do too.
LLAMA_ODD_HEADS = LLAMA_ROWS_52.but(head_dim=12, num_attention_heads=4)
LLAMA_WIDE = LLAMA_ROWS_52.but(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
LLAMA_BLOCK = LLAMA_WIDE.but(intermediate_size=128)
LLAMA_TIED = LLAMA.but(tie_word_embeddings=True, older_config=True)
LLAMA_SMALL_TIED = LLAMA_SMALL.but(tie_word_embeddings=True, older_config=True)
LLAMA_TINY = LLAMA_SMALL.but(hidden_size=32, intermediate_size=64, vocab_size=44, older_config=True)
LLAMA_MICRO = LLAMA_TINY.but(intermediate_size=32, vocab_size=20)
LLAMA_MICRO_24 = replace(LLAMA_MICRO, pruned="2:4")
LLAMA_MICRO_PRUNED = replace(LLAMA_MICRO, pruned="anywhere")
# marlin-24 takes rows and columns in steps of 64.
LLAMA_MARLIN = replace(
    LLAMA_MICRO.but(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4),
    pruned="2:4",
)
MISTRAL = BaseModel("mistral", COMMON | {"sliding_window": 8, "rope_theta": 100000.0}, older_config=True)
# use_sliding_window false: the window in the published file must not be used.
QWEN2 = BaseModel(
    "qwen2",
    COMMON | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "sliding_window": 8, "use_sliding_window": False},
    older_config=True,
)
QWEN3 = BaseModel("qwen3", COMMON | {"head_dim": 32, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6})

EXPERTS: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "vocab_size": 44,
    "moe_intermediate_size": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
# The first layer has no experts.
QWEN3_MOE = BaseModel("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0], "rope_theta": 1000000.0})
QWEN2_MOE = BaseModel(
    "qwen2_moe",
    EXPERTS
    | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
)
# Keys are wider than values; the yarn factors of cosines and of scores differ, and neither is one. The epsilon shows
# that latents have one of their own.
DEEPSEEK: dict[str, Any] = {
    key: EXPERTS[key] for key in EXPERTS if key not in ("head_dim", "num_experts", "num_key_value_heads")
} | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-3,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 4,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
    },
}
DEEPSEEK_V2 = BaseModel("deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy"}, older_config=True)
DEEPSEEK_V2_LITE = BaseModel(
    "deepseek_v2",
    {key: DEEPSEEK[key] for key in DEEPSEEK if key not in ("rope_parameters", "n_group", "topk_group")}
    | {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.0, "num_hidden_layers": 2},
)
DEEPSEEK_V3 = BaseModel("deepseek_v3", DEEPSEEK | {"norm_topk_prob": True, "attention_bias": True})
MIXTRAL = BaseModel(
    "mixtral",
    {key: EXPERTS[key] for key in EXPERTS if key not in ("moe_intermediate_size", "num_experts")}
    | {"num_local_experts": 4, "intermediate_size": 16, "sliding_window": 8, "num_hidden_layers": 1},
)
# Full layers follow sliding ones; 8 tokens are half of what positions were trained on, before yarn stretched them.
GPT_OSS = BaseModel(
    "gpt_oss",
    {key: EXPERTS[key] for key in EXPERTS if key not in ("moe_intermediate_size", "num_experts", "intermediate_size")}
    | {
        "num_local_experts": 5,
        "intermediate_size": 64,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
)


def generator(*names: str) -> np.random.Generator:
    """A generator that depends on the given names alone."""
    return np.random.default_rng([zlib.crc32(name.encode()) for name in names])


def token_ids(vocabulary: int, *names: str, sequences: int = 1) -> np.ndarray:
    """Token ids ``[sequences, TOKENS]`` int64."""
    return generator("tokens", *names).integers(0, vocabulary, (sequences, TOKENS), dtype=np.int64)


def random_weight(name: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    """The float32 value of one parameter, a function of its name and shape alone."""
    draw = generator(name, "x".join(map(str, shape)))
    if name.endswith("norm.weight"):
        return draw.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(("bias", ".sinks")):
        return (0.5 * draw.standard_normal(shape)).astype(np.float32)
    if len(shape) == 3:
        return np.stack([random_weight(f"{name}.{expert}", shape[1:], tied) for expert in range(shape[0])])
    rows, columns = shape
    if name.endswith("embed_tokens.weight") and not tied:
        return draw.standard_normal(shape).astype(np.float32)
    blocks = -(-columns // MEAN_BLOCK)
    mean = np.repeat(draw.standard_normal((rows, blocks)), MEAN_BLOCK, axis=1)[:, :columns]
    magnitude = np.exp(0.5 * draw.standard_normal((rows, 1))) / np.sqrt(columns)
    weight = magnitude * (draw.standard_normal(shape) + 0.5 * mean)
    if name.endswith("down_proj.weight"):
        weight[3, :32] = 0  # a whole group of zeros: its scale is the writer's epsilon
    if name.endswith("up_proj.weight"):
        weight[5] = 0  # a whole row of zeros
    return weight.astype(np.float32)


def stored_values(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and those buffers that a checkpoint holds."""
    stored = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, value) for name, value in model.named_buffers() if name in stored)


def prune(weight: np.ndarray, name: str, pruned: str) -> np.ndarray:
    """The weight with most of it set to zero, by its name alone."""
    keys = generator("pruned", name).random(weight.shape)
    if pruned == "2:4":
        fours = keys.reshape(len(weight), -1, 4)
        dropped = (fours.argsort(axis=2).argsort(axis=2) < 2).reshape(weight.shape)
    else:
        dropped = keys < 5 / 8
    return np.where(dropped, np.float32(0), weight)


def write_base(base: BaseModel, folder: Path) -> None:
    """Writes the unquantized checkpoint as transformers saves it."""
    config = AutoConfig.for_model(base.model_type, **base.config)
    config.architectures = None
    config.dtype = getattr(torch, base.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    with torch.no_grad():
        for name, parameter in stored_values(model):
            value = random_weight(name, tuple(parameter.shape), config.tie_word_embeddings)
            if base.pruned and ".layers." in name and value.ndim == 2:
                value = prune(value, name, base.pruned)
            parameter.copy_(torch.from_numpy(value))
    if base.stacked:
        model.config.save_pretrained(folder)
        save_model(model, folder / "model.safetensors")
        return
    shard_size = {} if base.shard_bytes is None else {"max_shard_size": base.shard_bytes}
    model.save_pretrained(folder, **shard_size)
    if base.older_config:
        spell_older(base, folder / "config.json")


def spell_older(base: BaseModel, path: Path) -> None:
    """Rewrites config.json with the key names of models published before transformers 5."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    config.pop("layer_types", None)
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    if "sliding_window" in base.config:
        config["sliding_window"] = base.config["sliding_window"]
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path, dtype: str | torch.dtype = "auto", **options: Any) -> PreTrainedModel:
    """A model from a folder, with attention written out, so that it is the same on every machine."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` float32 of one sequence ``[tokens]``."""
    return model(torch.from_numpy(ids)[None]).logits[0].float().contiguous()
