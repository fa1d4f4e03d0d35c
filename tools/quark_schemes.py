"""The schemes that AMD Quark is asked for, and the table of fixtures that it writes (tools/make_quark_fixtures.py)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from fixture_models import GPT_OSS, LLAMA, BaseModel
from quark.torch.quantization.config import config as specs
from quark.torch.quantization.config import template
from quark.torch.quantization.config.config import QLayerConfig, QTensorConfig
from quark.torch.quantization.config.type import Dtype, ZeroPointType

Scheme = QLayerConfig

# One layer of 64 columns: two groups of 32, so that a transposed scale shows.
MODEL = LLAMA.but(
    num_hidden_layers=1, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
)
MOE = BaseModel(
    "qwen3_moe",
    MODEL.config
    | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    | {"norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
)
# The second layer has full attention, the first slides.
SMALL_GPT_OSS = GPT_OSS.but(num_hidden_layers=2, num_local_experts=3, vocab_size=40)
HEAD = ("lm_head",)
K, MLP = "*k_proj", "*mlp*"


@dataclass(frozen=True)
class Export:
    """One fixture: what Quark is told, by which of its two exporters.

    `layers` maps wildcards to schemes, `types` class names. `stepped` writes a folder with the names of Step 3.5 and
    has it quantized file to file; `stacked` does that to tests/fixtures/step3p5-bf16, whose experts are cut before and
    stacked again: Quark takes no tensors of three dimensions. `fixture` names the folder of tests/fixtures that is
    quantized in the place of one of `base`'s shape.
    """

    name: str
    note: str
    scheme: Scheme
    layers: Mapping[str, Scheme] = field(default_factory=dict)
    types: Mapping[str, Scheme] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    base: BaseModel = MODEL
    file_to_file: bool = False
    pack_method: str = "reorder"
    weight_format: str = "real_quantized"
    custom_mode: str = "quark"
    kv_cache: Scheme | None = None
    min_kv_scale: float = 0.0
    algorithm: Any = None
    stepped: bool = False
    stacked: bool = False
    fixture: str = ""


def _spec(name: str, **options: Any) -> QTensorConfig:
    return getattr(specs, f"{name}Spec")(**options).to_quantization_spec()


def integer(dtype: str, scheme: str, symmetric: bool = True, dynamic: bool = False, **options: Any) -> QTensorConfig:
    """`dtype` as Quark's classes spell it: Int8, Uint4…; `scheme`: PerTensor, PerChannel or PerGroup."""
    extra = {"PerTensor": {"observer_method": "min_max"}, "PerChannel": {"ch_axis": 0}}.get(scheme, {"ch_axis": -1})
    common = {"symmetric": symmetric, "scale_type": "float", "round_method": "half_even", "is_dynamic": dynamic}
    return _spec(f"{dtype}{scheme}", **(extra | common | options))


def group(dtype: str, size: int = 32, **options: Any) -> QTensorConfig:
    return integer(dtype, "PerGroup", group_size=size, **options)


def as_dtype(spec: QTensorConfig, dtype: Dtype) -> QTensorConfig:
    """The same scheme for a number format that has no class of its own."""
    other = deepcopy(spec)
    other.dtype = dtype
    return other


def with_float_zero(spec: QTensorConfig) -> QTensorConfig:
    other = deepcopy(spec)
    other.zero_point_type = ZeroPointType.float32
    return other


def only(weight: Any, inputs: Any = None) -> Scheme:
    return QLayerConfig(weight=weight, input_tensors=inputs)


INT8_CHANNEL, INT8_TENSOR = integer("Int8", "PerChannel"), integer("Int8", "PerTensor")
INT8_TOKEN = integer("Int8", "PerChannel", dynamic=True, ch_axis=1)
INT8_TOKEN_ASYMMETRIC = integer("Int8", "PerChannel", dynamic=True, ch_axis=1, symmetric=False)
PER_TOKEN = only(INT8_CHANNEL, INT8_TOKEN)
FP8_TENSOR = _spec("FP8E4M3PerTensor", is_dynamic=False, observer_method="min_max")
FP8_TENSOR_DYNAMIC = _spec("FP8E4M3PerTensor", is_dynamic=True, observer_method="min_max")
FP8_CHANNEL = _spec("FP8E4M3PerChannel", is_dynamic=False, ch_axis=0)
FP8_TOKEN = _spec("FP8E4M3PerChannel", is_dynamic=True, ch_axis=1)
E5M2_TENSOR = _spec("FP8E5M2PerTensor", is_dynamic=False, observer_method="min_max")
E5M2_CHANNEL = _spec("FP8E5M2PerChannel", is_dynamic=False, ch_axis=0)
MXFP4, MXFP6, MXFP6_E3M2, MXFP8 = (
    _spec(f"OCP_{name}", is_dynamic=False, ch_axis=-1) for name in ("MXFP4", "MXFP6E2M3", "MXFP6E3M2", "MXFP8E4M3")
)
DYNAMIC_MXFP4, DYNAMIC_MXFP6, DYNAMIC_MXFP6_E3M2, DYNAMIC_MXFP8 = (
    _spec(f"OCP_{name}", is_dynamic=True, ch_axis=-1) for name in ("MXFP4", "MXFP6E2M3", "MXFP6E3M2", "MXFP8E4M3")
)
DYNAMIC_MXFP4_FLOOR = _spec("OCP_MXFP4", is_dynamic=True, ch_axis=-1, scale_calculation_mode="floor")
DYNAMIC_MXFP6_CEIL = _spec("OCP_MXFP6E2M3", is_dynamic=True, ch_axis=-1, scale_calculation_mode="ceil")
MXFP4_CEIL = _spec("OCP_MXFP4", is_dynamic=False, ch_axis=-1, scale_calculation_mode="ceil")
NVFP4, INT4_FP8 = template.FP4Block16ScaleE4M3Scheme().config, template.INT4_FP8Scheme().config
AMDFP4 = _spec("AmdFP4", ch_axis=-1, group_size=16, is_dynamic=False)
FP4_GROUP = _spec("FP4PerGroup", ch_axis=-1, group_size=32, is_dynamic=False)
FP6_GROUP = _spec("FP6E2M3PerGroup", ch_axis=-1, group_size=32, is_dynamic=False)
UINT4, UINT4_CHANNEL = group("Uint4", symmetric=False), integer("Uint4", "PerChannel", symmetric=False)
INT8_GROUP, INT4_CHANNEL = group("Int8"), integer("Int4", "PerChannel")
UINT2 = as_dtype(group("Uint4", 16, symmetric=False), Dtype.uint2)
FP8_CACHE = QLayerConfig(weight=FP8_TENSOR, input_tensors=FP8_TENSOR, output_tensors=FP8_TENSOR)
AWQ = template.LLMTemplate.get("llama").algo_config["awq"]

# What each projection of a layer gets in the fixtures that hold several schemes.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def mixed(*schemes: Scheme) -> dict[str, Scheme]:
    """A scheme a projection, in their order."""
    return {f"*.{name}": scheme for name, scheme in zip(PROJECTIONS, schemes, strict=False)}


FLOATS = mixed(
    only(MXFP4_CEIL, DYNAMIC_MXFP4_FLOOR),
    only(MXFP6, DYNAMIC_MXFP6_CEIL),
    only(MXFP6_E3M2, DYNAMIC_MXFP6_E3M2),
    only(MXFP4, DYNAMIC_MXFP6),
    only(MXFP4, FP8_TENSOR),
    only(FP4_GROUP),
    only(FP6_GROUP),
)
_INTEGERS = {
    "integers": mixed(
        only(INT8_TENSOR, INT8_TENSOR),
        PER_TOKEN,
        only(integer("Int8", "PerChannel", symmetric=False), INT8_TOKEN_ASYMMETRIC),
        only(integer("Int8", "PerTensor", symmetric=False), integer("Int8", "PerTensor", symmetric=False)),
        only(INT8_GROUP),
        only(integer("Uint8", "PerChannel", symmetric=False)),
        only(group("Uint8", symmetric=False)),
    ),
    "integers-packed": mixed(
        only(group("Int4", 16)),
        only(INT4_CHANNEL),
        only(integer("Uint4", "PerTensor", symmetric=False)),
        only(UINT4_CHANNEL),
        only(group("Uint4", 16, symmetric=False)),
        only(group("Int4", 16, symmetric=False)),
        only(integer("Int4", "PerTensor")),
    ),
    "integers-narrow": mixed(
        only(integer("Int3", "PerChannel")),
        only(group("Int3", 8)),
        only(group("Int2", 16)),
        only(UINT2),
        only(with_float_zero(UINT2)),
        only(with_float_zero(group("Uint4", 16, symmetric=False))),
        only(as_dtype(UINT4_CHANNEL, Dtype.uint2)),
    ),
}

EXPORTS = (
    Export("int8-static", "template int8", template.Int8Scheme().config, exclude=HEAD),
    Export("int8-per-token-head", "INT8 per channel, per token; head too", PER_TOKEN),
    Export("integers", "8 bits: a scheme a projection", PER_TOKEN, _INTEGERS["integers"], exclude=HEAD),
    Export("integers-packed", "4 bits: a scheme a projection; head too", only(UINT4), _INTEGERS["integers-packed"]),
    Export(
        "integers-packed-order",
        "the same in plain order",
        only(UINT4),
        _INTEGERS["integers-packed"],
        pack_method="order",
    ),
    Export("integers-narrow", "2 and 3 bits", only(UINT4), _INTEGERS["integers-narrow"], exclude=HEAD),
    Export(
        "fp8-static-kv",
        "template fp8 with its KV cache",
        template.FP8Scheme().config,
        exclude=HEAD,
        kv_cache=FP8_CACHE,
        min_kv_scale=1e-3,
    ),
    Export("fp8-per-token-head", "template ptpc_fp8; head too", only(FP8_CHANNEL, FP8_TOKEN)),
    Export("fp8-e5m2", "E5M2 per channel, k_proj per tensor", only(E5M2_CHANNEL), {K: only(E5M2_TENSOR)}, exclude=HEAD),
    Export("mxfp4-head", "template mxfp4; head too", template.MXFP4Scheme().config),
    Export("floats", "MX and groups of floats: a scheme a projection", only(MXFP6), FLOATS),
    Export("nvfp4-head", "template nvfp4; head too", NVFP4),
    Export("int4-fp8-head", "template int4_fp8; head too", INT4_FP8),
    Export("amdfp4", "fp4 under E5M3 scales, weight-only", only(AMDFP4), exclude=HEAD),
    Export("moe-int8", "experts one by one, router excluded", PER_TOKEN, exclude=("lm_head", "*.mlp.gate"), base=MOE),
    Export(
        "gpt-oss-mxfp4-fp8",
        "gpt-oss: experts one by one, gate and up in turn, static inputs; router and attention excluded",
        only(MXFP4, FP8_TENSOR),
        exclude=("lm_head", "*router*", "*self_attn*"),
        base=SMALL_GPT_OSS,
    ),
    Export(
        "gpt-oss-mxfp4-fp8-kv",
        "the same with an FP8 KV cache; attention excluded, entries of k_proj and v_proj all the same",
        only(MXFP4, FP8_TENSOR),
        exclude=("lm_head", "*router*", "*self_attn*"),
        base=SMALL_GPT_OSS,
        kv_cache=QLayerConfig(weight=MXFP4, input_tensors=FP8_TENSOR, output_tensors=FP8_TENSOR),
    ),
    Export(
        "gpt-oss-mxfp4-fp8-dynamic-kv",
        "the same with dynamic inputs; k_proj and v_proj excluded by name, entries in kv_cache_quant_config alone",
        only(MXFP4, FP8_TENSOR_DYNAMIC),
        exclude=("lm_head", "*router*", "*q_proj", "*k_proj", "*v_proj", "*o_proj"),
        base=SMALL_GPT_OSS,
        kv_cache=QLayerConfig(output_tensors=FP8_TENSOR),
    ),
    Export(
        "gpt-oss-fp8-kv",
        "gpt-oss, template fp8 with its KV cache",
        template.FP8Scheme().config,
        exclude=("lm_head", "*router*"),
        base=SMALL_GPT_OSS,
        kv_cache=FP8_CACHE,
    ),
    Export(
        "gpt-oss-mxfp4",
        "gpt-oss, template mxfp4",
        template.MXFP4Scheme().config,
        exclude=("lm_head", "*router*"),
        base=SMALL_GPT_OSS,
    ),
    Export(
        "gpt-oss-mxfp4-kept",
        "gpt-oss as it is published, attention to FP8; experts excluded, so Quark keeps them MXFP4, one by one",
        only(FP8_CHANNEL, FP8_TOKEN),
        exclude=("lm_head", "*router*", "*mlp*"),
        base=GPT_OSS,
        fixture="gpt-oss-mxfp4",
    ),
    Export("layer-types", "a scheme for Linear, another for all else", only(FP8_CHANNEL), types={"Linear": PER_TOKEN}),
    Export("fake-quantized", "floats beside their scales", PER_TOKEN, exclude=HEAD, weight_format="fake_quantized"),
    Export("custom-fp8", "FP8 mode, static", template.FP8Scheme().config, exclude=HEAD, custom_mode="fp8"),
    Export(
        "custom-fp8-kv",
        "FP8 mode, dynamic, KV cache",
        only(FP8_TENSOR, FP8_TENSOR_DYNAMIC),
        exclude=HEAD,
        custom_mode="fp8",
        kv_cache=FP8_CACHE,
    ),
    Export("custom-awq", "AWQ mode, asymmetric", only(UINT4), exclude=HEAD, custom_mode="awq", algorithm=AWQ),
    Export(
        "custom-awq-symmetric",
        "AWQ mode, two's complement, plain order",
        only(group("Int4")),
        exclude=HEAD,
        custom_mode="awq",
        pack_method="order",
        algorithm=AWQ,
    ),
    Export("files-int8", "file to file", PER_TOKEN, exclude=HEAD, file_to_file=True),
    Export(
        "files-int4",
        "file to file: plain order though the config says reorder, scales not transposed",
        only(group("Int4")),
        {K: only(INT4_CHANNEL), "*.v_proj": only(INT8_GROUP)},
        file_to_file=True,
    ),
    Export(
        "files-floats",
        "file to file",
        only(MXFP4),
        {K: NVFP4, "*.v_proj": INT4_FP8, "*.o_proj": only(MXFP6)},
        file_to_file=True,
    ),
    Export(
        "files-gpt-oss",
        "file to file, gpt-oss as it is published: attention to FP8, experts left in their blocks",
        only(FP8_CHANNEL, FP8_TOKEN),
        exclude=("lm_head", "*router*"),
        base=GPT_OSS,
        file_to_file=True,
        fixture="gpt-oss-mxfp4",
    ),
    Export(
        "files-step",
        "file to file, names of Step 3.5: attention and shared expert in part excluded",
        PER_TOKEN,
        exclude=("lm_head", "*.share_expert.gate_proj", "*.self_attn.q_proj", "*.moe.gate"),
        stepped=True,
    ),
    Export(
        "files-step-model",
        "file to file: a small Step 3.5, int8 in stacks [E, N, K] with scales [E, N]",
        PER_TOKEN,
        exclude=("lm_head", "model.embed_tokens", "*.share_expert.gate_proj", "*.moe.gate", "model.layers.5.*"),
        file_to_file=True,
        stacked=True,
    ),
)
