"""DeepSeek-V2 and V3: what their configs mean, whole releases from headers, generation, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fewbits
from fewbits.checkpoint.config import HARMLESS, Config
from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import CheckpointError, PlanError
from fewbits.kernels.ops import Routing
from fewbits.load import load
from fewbits.models import family_for
from fewbits.models.attention import LatentConfig
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import MlpConfig, MoeConfig
from tests.make import Raw, write

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FOLDERS = sorted(path.name for path in FIXTURES.glob("deepseek-*"))
QUANTIZED = [name for name in FOLDERS if "w4" in name or "w8" in name]

YARN: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE: dict[str, Any] = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": None,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
GROUPED = V2_LITE | {
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}


def configure(keys: dict[str, Any], **changes: Any) -> DecoderConfig:
    config = Config(keys | changes, "config.json")
    family = family_for(config)
    assert family is not None
    decoder = family.configure(config)
    assert list(config.leftovers(HARMLESS)) == []
    return decoder


def latent(decoder: DecoderConfig) -> LatentConfig:
    (attention,) = {layer.attention for layer in decoder.layers}
    assert isinstance(attention, LatentConfig)
    return attention


# ---- what configs mean


def test_attention_of_v3() -> None:
    attention = latent(configure(V3))
    assert (attention.heads, attention.plain_dim, attention.rope_dim, attention.value_dim) == (128, 128, 64, 128)
    assert (attention.kv_rank, attention.q_rank, attention.bias, attention.norm_eps) == (512, 1536, "no", 1e-6)
    assert (attention.rope.begin, attention.rope.rotary_dim, attention.rope.interleaved) == (512, 64, True)
    # 0.1 x ln 40 + 1 = 1.368888; of cosines by both factors alike, of scores twice: 1.873854 / sqrt(192).
    assert attention.rope.factor == 1 and attention.scale == pytest.approx(0.135234, rel=1e-5)
    assert configure(V3, rope_interleave=False).layers[0].attention.rope.interleaved is False
    assert latent(configure(V3, attention_bias=True)).bias == "yes"


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [
        (V2_LITE["rope_scaling"], (0.0707 * math.log(40) + 1) ** 2),  # as in the release
        (YARN, 1.0),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0}, 1.0),
        (YARN | {"factor": 0.5, "mscale_all_dim": 1.0}, 1.0),
        ({"type": "linear", "factor": 4.0}, 1.0),
        (None, 1.0),
    ],
)
def test_scores_are_scaled_where_the_rotation_says_so(scaling: dict[str, Any] | None, scale: float) -> None:
    assert latent(configure(V2_LITE, rope_scaling=scaling)).scale == pytest.approx(scale / math.sqrt(192))


def test_experts_of_all_kinds() -> None:
    def block(keys: dict[str, Any], **changes: Any) -> MoeConfig:
        found = configure(keys, **changes).layers[-1].feed_forward
        assert isinstance(found, MoeConfig)
        return found

    v3, lite, grouped = block(V3), block(V2_LITE), block(GROUPED)
    assert v3.routing == Routing(8, "sigmoid", True, 1e-20, 2.5, groups=8, kept_groups=4, group_best=2)
    assert lite.routing == Routing(6, "softmax", False, 1e-20, 1.0)
    assert grouped.routing == Routing(6, "softmax", False, 1e-20, 16.0, groups=8, kept_groups=3, group_best=1)
    assert [one.selection_bias for one in (v3, lite, grouped)] == [True, False, False]
    assert v3.shared is not None and v3.shared.mlp == MlpConfig(2048, name="mlp.shared_experts")
    assert lite.shared is not None and lite.shared.mlp.width == 2 * 1408
    assert block(V3, n_shared_experts=None).shared is None
    # Moonlight's and Kimi's one group is no group.
    assert block(V3, n_group=1, topk_group=1).routing == Routing(8, "sigmoid", True, 1e-20, 2.5)
    assert block(V2_LITE, norm_topk_prob=True).routing.normalize


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, [0, 1, 2]),
        ({"first_k_dense_replace": 0}, []),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_hidden_layers": 6}, [0, 1, 3, 5]),
    ],
)
def test_layers_without_experts(changes: dict[str, Any], dense: list[int]) -> None:
    layers = configure(V3, **changes).layers
    assert [index for index, layer in enumerate(layers) if isinstance(layer.feed_forward, MlpConfig)] == dense


@pytest.mark.parametrize(
    ("keys", "changes", "text"),
    [
        (V3, {"index_topk": 2048}, "V3.2's sparse attention"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"n_group": 7}, "no groups of 256 experts by 7"),
        (V3, {"n_group": 256}, "no groups of 256 experts by 256"),
        (V3, {"topk_group": 9}, "keeps 9 of 8 groups"),
        (V3, {"num_experts_per_tok": 129}, "fewer experts than"),
        (V3, {"num_experts_per_tok": 257, "n_group": 1}, "asks for 257 of 256"),
        (V3, {"num_key_value_heads": 1}, "num_key_value_heads"),
        (V3, {"qk_head_dim": 191}, "qk_head_dim"),
        (V3, {"kv_lora_rank": 1000}, "keys of 1064 numbers"),
        (V3, {"q_lora_rank": 0}, "between 1 and"),
        (V3, {"n_shared_experts": -1}, "n_shared_experts"),
        (V3, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        (V3, {"hidden_act": "gelu"}, "hidden_act"),
        (V3, {"layer_types": ["sliding_attention"] * 61}, "slide"),
        (V3, {"num_hidden_layers": 1000}, "experts in all"),
        (V3, {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1e300}}, "finite"),
        (V3, {"rope_scaling": {"type": "su", "factor": 4.0}}, "'su' is unknown"),
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2_LITE, {"scoring_func": "sigmoid"}, "scoring_func"),
        (GROUPED, {"norm_topk_prob": True}, "programs differ"),
    ],
)
def test_what_would_compute_something_else_is_refused(keys: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text) as caught:
        configure(keys, **changes)
    assert caught.value.source is not None and caught.value.source.startswith("config.json, ")


@pytest.mark.parametrize(
    "key",
    """norm_topk_prob routed_scaling_factor first_k_dense_replace n_group topk_group n_routed_experts qk_nope_head_dim
    qk_rope_head_dim v_head_dim kv_lora_rank moe_intermediate_size""".split(),
)
def test_what_programs_assume_differently_has_no_default(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        configure(V3, **{key: None})


# ---- the releases


def entries(decoder: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a release: those of the model, and its layer for multi-token prediction."""
    found = {}
    for need in decoder.modules():
        name = need.name if need.kind == "other" else f"{need.name}.weight"
        found[name] = ("F32" if need.kind == "other" else "BF16", need.shape)
    last, H = len(decoder.layers), decoder.hidden
    for index in range(last, last + decoder.mtp_layers):
        begin = f"model.layers.{last - 1}."
        found |= {name.replace(begin, f"model.layers.{index}."): one for name, one in found.items() if begin in name}
        more = {"eh_proj": (H, 2 * H), "enorm": (H,), "hnorm": (H,), "shared_head.norm": (H,)}
        more |= {"embed_tokens": (decoder.vocab, H), "shared_head.head": (decoder.vocab, H)}
        found |= {f"model.layers.{index}.{name}.weight": ("BF16", shape) for name, shape in more.items()}
    return found


@pytest.mark.parametrize(
    ("keys", "parameters", "token"), [(V3, 671.0e9, 61 * 576 * 2), (V2_LITE, 15.7e9, 27 * 576 * 2)]
)
def test_a_release_is_planned_from_its_headers(
    keys: dict[str, Any], parameters: float, token: int, tmp_path: Path
) -> None:
    stored = entries(configure(keys))
    sizes = {"BF16": 2, "F32": 4}
    raw = {name: Raw(dtype, shape, nbytes=sizes[dtype] * math.prod(shape)) for name, (dtype, shape) in stored.items()}
    planned = fewbits.inspect(write(tmp_path, raw, keys, header_only=True))
    assert planned.errors == [] and planned.warnings == [] and planned.leftover_tensors == []
    found = sum(math.prod(row.shape) for row in planned.rows if row.runs)
    assert abs(found / parameters - 1) < 0.005
    mtp = [row for row in planned.rows if row.executed_as == "not_run"]
    assert {row.name.split(".")[2] for row in mtp} == ({"61"} if keys is V3 else set())
    assert all("multi-token prediction" in row.reason for row in mtp)
    assert {row.executed_as for row in planned.rows if row not in mtp} == {"native"}
    assert planned.kv_bytes_per_token() == token


# ---- running


def forward(name: str | Path, chunks: Iterator[list[int]] | list[list[int]], dtype: Any = "bf16") -> np.ndarray:
    loaded = load(FIXTURES / name)
    cache = KVCache(loaded.plan.model.cache_layers(dtype), max_pages=16)
    rows = [loaded.decoder.forward(cache.batch([Part(0, chunk, len(chunk))]), cache).logits for chunk in chunks]
    return np.concatenate(rows)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "int8"])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_generated_with_the_cache_is_what_one_prefill_says(name: str, dtype: Any) -> None:
    prompts = [[5, 17, 3, 40, 22, 9, 11], [7, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
    params = fewbits.SamplingParams(max_tokens=12, ignore_eos=True)
    results = fewbits.LLM(FIXTURES / name, kv_dtype=dtype).generate(prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        tokens = prompt + list(result.token_ids)
        assert len(tokens) == len(prompt) + 12
        whole = forward(name, [tokens], dtype)
        assert whole.argmax(axis=1)[len(prompt) - 1 : -1].tolist() == list(result.token_ids)
        np.testing.assert_array_equal(forward(name, [[token] for token in tokens], dtype), whole)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_product_of_latents_is_dequantized_where_its_transpose_is_needed(name: str) -> None:
    loaded = load(FIXTURES / name)
    planned = loaded.plan
    rows = [row for row in planned.rows if row.name.endswith("kv_b_proj")]
    assert rows and planned.errors == [] and {row.kernel.name for row in rows if row.kernel} == {"cpu.dot_bf16"}
    for row in rows:
        assert row.executed_as == ("dequantized" if name in QUANTIZED else "native")
        assert ("its scales lie across the sum" in row.reason) == (name in QUANTIZED)
        assert ("latents are quantized" in row.reason) == ("w8" in name)
        assert row.execution.packed_bytes == loaded.params[row.name].nbytes


def copied(name: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_layer_for_multi_token_prediction_changes_nothing(tmp_path: Path) -> None:
    folder = copied("deepseek-v3-f32", tmp_path / "with-mtp")
    tensors = load_file(folder / "model.safetensors")
    last = {name: value for name, value in tensors.items() if name.startswith("model.layers.2.")}
    tensors |= {name.replace(".layers.2.", ".layers.3."): value for name, value in last.items()}
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    planned = fewbits.inspect(folder)
    assert planned.errors == [] and planned.leftover_tensors == []
    unused = [row.name for row in planned.rows if row.executed_as == "not_run"]
    assert unused and all(name.startswith("model.layers.3.") for name in unused)
    tokens = [list(range(1, 30))]
    np.testing.assert_array_equal(forward(folder, tokens), forward("deepseek-v3-f32", tokens))


def test_sparse_attention_is_refused_by_its_name(tmp_path: Path) -> None:
    changes = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_topk": 2048}
    folder = copied("deepseek-v3-f32", tmp_path / "v32", **changes, index_n_heads=64, index_head_dim=128)
    planned = fewbits.inspect(folder)
    assert planned.family == "deepseek_v3"
    (error,) = planned.errors
    assert error.code == "config-unsupported" and "V3.2" in error.text and "config.json, index_topk" in error.text
    with pytest.raises(PlanError, match=r"V3\.2"):
        load(folder)


def test_the_releases_own_fp8_is_a_format_that_is_named(tmp_path: Path) -> None:
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    planned = fewbits.inspect(copied("deepseek-v3-f32", tmp_path / "fp8", quantization_config=quantization))
    assert planned.errors and any("fp8" in str(error) for error in planned.errors)


def test_scales_of_a_latent_cache_may_mean_two_things(tmp_path: Path) -> None:
    """Of latents or of what heads make of them: no file says which. The cache stays float, with a warning."""
    folder = copied("deepseek-v3-w4a16-asym-g16", tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for scale in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{scale}"] = np.ones(1, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    planned = fewbits.inspect(folder)
    assert planned.errors == [] and planned.kv_cache is None and planned.kv_scales == {}
    (warning,) = planned.warnings
    assert warning.code == "kv-scheme-unsupported" and "latents" in warning.text
    tokens = [list(range(1, 20))]
    np.testing.assert_array_equal(forward(folder, tokens), forward("deepseek-v3-w4a16-asym-g16", tokens))
