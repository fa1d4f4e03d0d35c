"""DeepSeek-V2 and V3: latent attention, and experts in groups of neighbours beside shared ones.

V2 scores experts by a softmax, V3 by sigmoids with a bias for the choice. What programs assume differently where it is
absent has no default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbits.checkpoint.config import Config
from fewbits.kernels.ops import Routing
from fewbits.models.attention import LatentConfig
from fewbits.models.configure import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    dense,
    flag,
    layer_types,
    mtp_layers,
    of_layers,
    routing,
    size,
    unsupported,
)
from fewbits.models.decoder import DecoderConfig
from fewbits.models.feed_forward import FeedForward, MlpConfig, MoeConfig, SharedConfig, names_of
from fewbits.models.layer import LayerConfig
from fewbits.models.mtp import MtpConfig
from fewbits.models.rope import rope, score_factor

_EPSILON = 1e-20  # beside the sum that chosen weights are divided by


def configure_v2(config: Config) -> DecoderConfig:
    config.expect("scoring_func", "softmax")
    method = config.expect("topk_method", "greedy", "group_limited_greedy")
    normalize, scale = config.get("norm_topk_prob", bool, False), config.get("routed_scaling_factor", float)
    if normalize and scale != 1:
        text = f"beside a routed_scaling_factor of {scale}: programs differ in which of them they apply"
        raise unsupported(config, "norm_topk_prob", text)
    how: dict[str, Any] = {"score": "softmax", "normalize": normalize, "epsilon": _EPSILON, "scale": scale}
    if method == "group_limited_greedy":
        how |= _groups(config, best=1)
    else:
        config.ignore("n_group", "topk_group")
    return _decoder(config, _routing(config, how), selection_bias=False)


def configure_v3(config: Config) -> DecoderConfig:
    if "index_topk" in config:
        text = "chooses the tokens that are looked at (DeepSeek-V3.2's sparse attention), which fewbits doesn't compute"
        raise unsupported(config, "index_topk", text)
    how: dict[str, Any] = {
        "score": config.expect("scoring_func", "sigmoid"),
        "normalize": config.get("norm_topk_prob", bool),
        "epsilon": _EPSILON,
        "scale": config.get("routed_scaling_factor", float),
    }
    config.expect("topk_method", "noaux_tc")
    return _decoder(config, _routing(config, how | _groups(config, best=2)), selection_bias=True)


def _groups(config: Config, best: int) -> dict[str, int]:
    """The groups of which some are kept; each is as good as its `best` experts."""
    experts, groups, kept = (size(config, key) for key in ("n_routed_experts", "n_group", "topk_group"))
    if groups == 1:
        return {}
    if experts % groups or experts // groups < best:
        raise unsupported(config, "n_group", f"makes no groups of {experts} experts by {groups}")
    if kept > groups:
        raise unsupported(config, "topk_group", f"keeps {kept} of {groups} groups")
    if size(config, "num_experts_per_tok") > experts // groups * kept:
        raise unsupported(config, "topk_group", f"keeps fewer experts than num_experts_per_tok takes: {kept} groups")
    return {"groups": groups, "kept_groups": kept, "group_best": best}


def _routing(config: Config, how: dict[str, Any]) -> Routing:
    return routing(config, size(config, "n_routed_experts", most=MAX_EXPERTS), "num_experts_per_tok", **how)


def _decoder(config: Config, how: Routing, selection_bias: bool) -> DecoderConfig:
    config.ignore("aux_loss_alpha", "seq_aux", "ep_size")  # of training, and where experts lie
    types = layer_types(config, slides=lambda index: False)
    if "sliding_attention" in types:
        raise unsupported(config, "layer_types", "has layers that slide, which latent attention doesn't")
    first, step = config.get("first_k_dense_replace", int), size(config, "moe_layer_freq", 1)
    width, shared = size(config, "moe_intermediate_size"), config.get("n_shared_experts", int, 0)
    if shared < 0:
        raise unsupported(config, "n_shared_experts", f"must not be negative, as {shared} is")
    moe = MoeConfig(
        size(config, "n_routed_experts"),
        width,
        how,
        names_of("mlp"),
        selection_bias=selection_bias,
        shared=SharedConfig(MlpConfig(shared * width, name="mlp.shared_experts")) if shared else None,
    )
    plain = dense(config, flag(config, "mlp_bias"))
    sparse = [index >= first and index % step == 0 for index in range(len(types))]
    blocks: list[FeedForward] = [moe if has_experts else plain for has_experts in sparse]
    attention = _attention(config)
    count = mtp_layers(config)
    model = of_layers(config, [LayerConfig(attention, block) for block in blocks], mtp_layers=count)
    if not count:
        return model
    # Blocks with experts of their own; states go on behind the norm of the head (vLLM, SGLang).
    names = ("shared_head.norm", "shared_head.head")
    modules = (LayerConfig(attention, moe),) * count
    norm = (model.norm_eps, model.norm_offset)
    return replace(model, mtp=MtpConfig(model.hidden, model.vocab, len(blocks), modules, *names, True, *norm))


def _attention(config: Config) -> LatentConfig:
    heads = size(config, "num_attention_heads")
    config.expect("num_key_value_heads", heads)
    plain, turned = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    rank = size(config, "kv_lora_rank")
    if rank + turned > MAX_HEAD_DIM:
        raise unsupported(config, "kv_lora_rank", f"makes keys of {rank + turned} numbers, more than {MAX_HEAD_DIM}")
    config.expect("qk_head_dim", plain + turned)
    config.ignore("head_dim")  # transformers writes the rotated part's
    q_rank = size(config, "q_lora_rank") if "q_lora_rank" in config else 0
    rotation = rope(config, turned)
    return LatentConfig(
        heads,
        plain,
        turned,
        size(config, "v_head_dim"),
        rank,
        q_rank,
        replace(rotation, begin=rank, interleaved=config.get("rope_interleave", bool, True)),
        score_factor(config) / (plain + turned) ** 0.5,
        bias=flag(config, "attention_bias"),
    )
