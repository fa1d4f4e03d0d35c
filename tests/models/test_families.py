"""What each family makes of a config, and the configs it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from fewbits.checkpoint.config import HARMLESS, Config
from fewbits.errors import CheckpointError, PlanError
from fewbits.kernels.ops import Routing
from fewbits.models import FAMILIES, family_for
from fewbits.models.feed_forward import MoeConfig

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}

MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 48}


def configure(name, **keys):
    config = Config({**BASE, **keys}, "config.json")
    return next(family for family in FAMILIES if family.name == name).configure(config)


def windows(decoder):
    return [layer.attention.window for layer in decoder.layers]


@pytest.mark.parametrize(
    "folder",
    [
        "llama-tied-f32",
        "mistral-window8-f32",
        "mixtral-f32",
        "qwen2-f32",
        "qwen2-moe-f32",
        "qwen3-f32",
        "qwen3-moe-f32",
        "deepseek-v2-f32",
        "deepseek-v2-lite-f32",
        "deepseek-v3-f32",
    ],
)
def test_the_modules_are_the_tensors_of_the_file(folder):
    config = Config(json.loads((FIXTURES / folder / "config.json").read_text()), "config.json")
    decoder = family_for(config).configure(config)
    with safe_open(FIXTURES / folder / "model.safetensors", "numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    expected = {}
    for need in decoder.modules({name.removesuffix(".weight") for name in stored}):
        if need.kind == "other":
            expected[need.name] = need.shape
            continue
        if need.tied_to is None or f"{need.name}.weight" in stored:
            expected[f"{need.name}.weight"] = need.shape
        if need.bias == "yes":
            expected[f"{need.name}.bias"] = need.shape[:1]
    assert stored == expected
    assert list(config.leftovers(HARMLESS)) == []


def test_names_are_unique_and_in_the_order_of_the_forward_pass():
    names = [need.name for need in configure("qwen3").modules()]
    assert len(set(names)) == len(names) == 1 + 4 * 11 + 2
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head"
    assert names[1:4] == [
        f"model.layers.0.{part}" for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")
    ]


def test_sizes():
    decoder = configure("llama", head_dim=24, num_key_value_heads=None)
    attention = decoder.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 24)
    assert attention.scale == pytest.approx(24**-0.5)
    shapes = {need.name.removeprefix("model.layers.0."): need.shape for need in decoder.modules()}
    assert shapes["self_attn.q_proj"] == (96, 64) and shapes["self_attn.o_proj"] == (64, 96)
    assert shapes["mlp.down_proj"] == (64, 96) and shapes["lm_head"] == (50, 64)
    assert configure("llama").layers[0].attention.head_dim == 16
    assert decoder.norm_eps == 1e-5 and decoder.max_positions == 128 and not decoder.tied


def biases(decoder):
    return {need.name.rpartition(".")[2].split("_")[0] for need in decoder.modules() if need.bias == "yes"}


@pytest.mark.parametrize(
    "family, keys, expected",
    [
        ("llama", {}, set()),
        ("llama", {"attention_bias": True}, {"q", "k", "v", "o"}),
        ("llama", {"qkv_bias": True}, {"q", "k", "v"}),
        ("llama", {"mlp_bias": True}, {"gate", "up", "down"}),
        ("mistral", {}, set()),
        ("qwen2", {}, {"q", "k", "v"}),
        ("qwen3", {}, set()),
        ("qwen3", {"attention_bias": True}, {"q", "k", "v", "o"}),
    ],
)
def test_biases(family, keys, expected):
    assert biases(configure(family, **keys)) == expected


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "family, keys, expected",
    [
        ("llama", {"sliding_window": 8}, [0, 0, 0, 0]),
        ("llama", {"sliding_window": 8, "layer_types": [FULL, SLIDING] * 2}, [0, 8, 0, 8]),
        ("mistral", {"sliding_window": None}, [0, 0, 0, 0]),
        ("mistral", {"sliding_window": 8}, [8, 8, 8, 8]),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL] * 4}, [0, 0, 0, 0]),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 2}, [0, 0, 0, 0]),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, [0, 0, 8, 8]),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 8]),
        ("qwen3_moe", {**MOE, "sliding_window": 8, "use_sliding_window": True}, [8, 8, 8, 8]),
        ("qwen3_moe", {**MOE, "sliding_window": 8, "use_sliding_window": False}, [0, 0, 0, 0]),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}, [8, 8, 8, 8]),
        ("qwen3", {"sliding_window": 8, "layer_types": [SLIDING, FULL, FULL, SLIDING, SLIDING]}, [8, 0, 0, 8]),
    ],
)
def test_windows(family, keys, expected):
    assert windows(configure(family, **keys)) == expected


def test_layers_of_a_type_have_their_own_rotation():
    parameters = {
        FULL: {"rope_type": "default", "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    decoder = configure("llama", sliding_window=8, layer_types=[FULL, SLIDING] * 2, rope_parameters=parameters)
    first, second, third, _ = (layer.attention.rope for layer in decoder.layers)
    assert first == third != second
    assert first.inv_freq[1] == 1e6 ** (-1 / 8)


def sparse(decoder):
    return [isinstance(layer.feed_forward, MoeConfig) for layer in decoder.layers]


@pytest.mark.parametrize(
    "family, keys, expected",
    [
        ("qwen3_moe", MOE, [True] * 4),
        ("qwen3_moe", {**MOE, "mlp_only_layers": [0, 3]}, [False, True, True, False]),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 2}, [False, True, False, True]),
        ("qwen2_moe", {**MOE, **SHARED, "decoder_sparse_step": 3, "mlp_only_layers": []}, [False, False, True, False]),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, [True] * 4),
    ],
)
def test_layers_of_experts(family, keys, expected):
    assert sparse(configure(family, **keys)) == expected


def test_how_experts_are_chosen():
    def routing(family, **keys):
        return configure(family, **keys).layers[0].feed_forward.routing

    assert routing("qwen3_moe", **MOE) == Routing(2, "softmax", normalize=False)
    assert routing("qwen3_moe", **MOE, norm_topk_prob=True) == Routing(2, "softmax", normalize=True)
    assert routing("mixtral", num_local_experts=8, num_experts_per_tok=3) == Routing(3, "softmax", normalize=True)


EXPERT_NAMES = [
    ("{}.experts.2.gate_proj", "{}.experts.2.up_proj", "{}.experts.2.down_proj"),
    ("{}.experts.2.w1", "{}.experts.2.w3", "{}.experts.2.w2"),
    ("{}.experts[2].gate_proj", "{}.experts[2].up_proj", "{}.experts[2].down_proj"),
    ("{}[2].gate_proj", "{}[2].up_proj", "{}[2].down_proj"),
    ("{}.experts[2].gate_up_proj", "{}.experts[2].down_proj"),
    ("{}.experts.2.gate_up_proj", "{}.experts.2.down_proj"),
]


@pytest.mark.parametrize("names", EXPERT_NAMES)
@pytest.mark.parametrize(
    ("family", "keys", "block", "width"),
    [
        ("qwen3_moe", MOE, "mlp", 32),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, "block_sparse_moe", 96),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, "mlp", 96),
    ],
)
def test_experts_by_the_names_that_are_stored(family, keys, block, width, names):
    """Layer by layer: the second has others."""
    decoder = configure(family, **keys)
    stored = {f"model.layers.1.{name.format(block).replace('2', '0', 1)}" for name in names}
    shapes = {need.name: need.shape for need in decoder.modules(stored) if need.kind in ("expert", "router")}
    *inputs, down = (f"model.layers.1.{name.format(block)}" for name in names)
    assert [shapes[name] for name in inputs] == [(width * 2 // len(inputs), 64)] * len(inputs)
    assert shapes[down] == (64, width) and shapes[f"model.layers.1.{block}.gate"] == (8, 64)
    assert len(shapes) == 3 * (8 * 3 + 1) + 8 * len(names) + 1


@pytest.mark.parametrize(
    "family, keys, code, text",
    [
        ("qwen3_moe", {**MOE, "num_experts_per_tok": 9}, "config-unsupported", "asks for 9 of 8 experts"),
        ("qwen3_moe", {**MOE, "num_experts": 0}, "config-unsupported", "between 1 and"),
        ("qwen3_moe", {**MOE, "num_experts": 10**6}, "config-unsupported", "between 1 and"),
        ("qwen3_moe", {**MOE, "hidden_act": "gelu"}, "config-unsupported", "hidden_act"),
        ("qwen2_moe", {**MOE, **SHARED, "use_sliding_window": True}, "config-unsupported", "use_sliding_window"),
        ("llama", {"hidden_act": "gelu"}, "config-unsupported", "hidden_act"),
        ("llama", {"num_key_value_heads": 3}, "config-unsupported", "isn't a multiple of 3"),
        ("llama", {"num_attention_heads": 6}, "config-unsupported", "isn't a multiple of 6 heads"),
        ("llama", {"num_attention_heads": 0}, "config-unsupported", "between 1 and"),
        ("llama", {"num_hidden_layers": 10**9}, "config-unsupported", "between 1 and 1000"),
        ("llama", {"head_dim": 10**9}, "config-unsupported", "between 1 and 1024"),
        ("llama", {"vocab_size": -1}, "config-unsupported", "between 1 and"),
        ("llama", {"layer_types": ["linear_attention"] * 4}, "config-unsupported", "linear_attention"),
        ("llama", {"layer_types": [FULL] * 3}, "config-unsupported", "3 entries for 4 layers"),
        ("mistral", {"sliding_window": 0}, "config-unsupported", "sliding_window"),
        ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "config-unsupported", "llama_4_scaling"),
        ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "config-unsupported", "llama_4_scaling_beta"),
        ("qwen2", {"rope_scaling": {"type": "longrope"}}, "rope-unsupported", "longrope"),
    ],
)
def test_what_would_compute_something_else_is_refused(family, keys, code, text):
    with pytest.raises(PlanError, match=text) as caught:
        configure(family, **keys)
    assert caught.value.code == code and caught.value.source.startswith("config.json, ")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_sizes_have_no_default(key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        configure("llama", **{key: None})


def test_sliding_layers_need_a_window():
    with pytest.raises(CheckpointError, match="sliding_window is missing"):
        configure("qwen3", layer_types=[SLIDING] * 4)


@pytest.mark.parametrize(
    "keys, name",
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "llama"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "something"}, "qwen2"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "eagle3"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "draft_vocab_size": 9}, "eagle3"),
        ({"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3"}, "eagle3"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}, "deepseek_v3"),
        ({"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}, None),
        ({}, None),
    ],
)
def test_the_family_of_a_config(keys, name):
    family = family_for(Config(keys, "config.json"))
    assert (family and family.name) == name


def test_cache_layers():
    decoder = configure("mistral", sliding_window=8)
    layers = decoder.cache_layers("bf16", {1: ([0.5], [0.25]), 2: ([1.0, 2.0], [3.0, 4.0])})
    assert [layer.dtype for layer in layers] == ["bf16", "fp8", "fp8", "bf16"]
    assert (layers[1].k_scale, layers[1].v_scale) == ((0.5, 0.5), (0.25, 0.25))
    assert (layers[2].k_scale, layers[2].v_scale) == ((1.0, 2.0), (3.0, 4.0))
    assert {(layer.heads, layer.width, layer.window) for layer in layers} == {(2, 16, 8)}
    with pytest.raises(ValueError, match="3 scales for 2 heads"):
        decoder.cache_layers("bf16", {0: ([1.0] * 3, [1.0])})
