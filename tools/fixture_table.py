"""The table of tests/fixtures: which base model gets which recipe, and why it is there.

Owns the rows only. Unquantized rows are saved by transformers, recipes are applied by llm-compressor, and
rewrites (tools/fixture_rewrites.py) turn a row of this table into what older libraries wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fixture_models import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    LLAMA,
    LLAMA3_ROPE,
    LLAMA_BLOCK,
    LLAMA_ODD_HEADS,
    LLAMA_ROWS_52,
    LLAMA_SMALL,
    LLAMA_SMALL_TIED,
    LLAMA_TIED,
    LLAMA_TINY,
    LLAMA_WIDE,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    BaseModel,
)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What llm-compressor is asked to do: config groups or the name of a preset, and how to save.

    ``calibrate`` runs random token ids through the model, for static activation scales. ``storage`` forces
    a storage format where the library's own choice is not wanted. ``compress`` false saves the weights
    uncompressed beside their scales. ``rotations`` are SpinQuant's, R1 and R2 into the weights, R3 and R4 at run time.
    """

    groups: tuple[Arguments, ...] = ()
    preset: str | None = None
    ignore: tuple[str, ...] = ()
    kv_cache: Arguments | None = None
    calibrate: bool = False
    storage: str | None = None
    compress: bool = True
    rotations: tuple[str, ...] = ()

    @property
    def quantizes_activations(self) -> bool:
        """Whether a forward pass differs from one with the decoded weights alone."""
        if self.preset is not None:
            return "A16" not in self.preset
        return self.kv_cache is not None or any("input_activations" in group for group in self.groups)


@dataclass(frozen=True)
class Fixture:
    """One folder of tests/fixtures; without a recipe it stays unquantized.

    ``library`` is the version of compressed-tensors that writes it, where it isn't the installed one. ``refused`` is
    the code of the error with which fewbits refuses the folder; nothing is expected of its numbers then. ``numbers``
    false keeps decoded weights as their digests alone.
    """

    name: str
    note: str
    base: BaseModel
    recipe: Recipe | None = None
    library: str = ""
    refused: str = ""
    numbers: bool = True


def integer(bits: int, strategy: str = "group", symmetric: bool = True, **more: Any) -> Arguments:
    """Weight arguments of an integer scheme."""
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}


def fp8(strategy: str, **more: Any) -> Arguments:
    """Arguments of an FP8 weight, activation or cache."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


def group(weights: Arguments, *targets: str, **more: Any) -> Arguments:
    """One config group; without targets it takes every linear layer."""
    return {"targets": list(targets) or ["Linear"], "weights": weights, **more}


def one(
    weights: Arguments,
    inputs: Arguments | None = None,
    *,
    ignore: tuple[str, ...] = (),
    kv_cache: Arguments | None = None,
    calibrate: bool = False,
    storage: str | None = None,
    compress: bool = True,
) -> Recipe:
    """A recipe of one config group over every linear layer, with or without activations."""
    activations = {} if inputs is None else {"input_activations": inputs}
    return Recipe((group(weights, **activations),), None, ignore, kv_cache, calibrate, storage, compress)


HEAD = ("lm_head",)
ASYM = integer(4, symmetric=False, group_size=32)
SYM = integer(4, group_size=32)
INT8_CHANNEL = integer(8, "channel")
INT8_TOKEN = integer(8, "token", dynamic=True)
FP8_TOKEN = fp8("token", dynamic=True)
# Every bit width in one model, the odd ones where rows or columns are few and packing shows.
BITS = {"q_proj": 2, "k_proj": 3, "v_proj": 5, "o_proj": 6, "gate_proj": 7, "up_proj": 8, "down_proj": 4}


def every_width(symmetric: bool, group_size: int | None, head_bits: int) -> Recipe:
    """Seven widths in seven config groups, and the head in an eighth; without a group size a scale a row."""

    def weights(bits: int) -> Arguments:
        if group_size is None:
            return integer(bits, "channel", symmetric)
        return integer(bits, symmetric=symmetric, group_size=group_size)

    widths = [group(weights(bits), f"re:.*{name}$") for name, bits in BITS.items()]
    return Recipe(groups=(*widths, group(weights(head_bits), "lm_head")))


def narrow(base: BaseModel, dtype: str, **config: Any) -> BaseModel:
    """The base with a smaller MLP and vocabulary: float32 weights are what fills this folder."""
    return base.but(dtype, **{"intermediate_size": 96, "vocab_size": 64} | config)


UNQUANTIZED = (
    Fixture("llama-tied-f32", "tied head, config in the older spelling", narrow(LLAMA_TIED, "float32")),
    Fixture(
        "llama-rope3-f32",
        "untied head, llama3 rope scaling that bites within 24 tokens",
        narrow(LLAMA, "float32", rope_parameters=LLAMA3_ROPE),
    ),
    Fixture("mistral-window8-f32", "sliding window of 8, sequence of 24", narrow(MISTRAL, "float32")),
    Fixture(
        "qwen2-f32",
        "q/k/v biases; a sliding_window that use_sliding_window disables",
        narrow(QWEN2, "float32"),
    ),
    Fixture(
        "qwen3-f32",
        "q/k norms; heads x head_dim differs from hidden",
        narrow(QWEN3, "float32", num_key_value_heads=1),
    ),
    Fixture("mixtral-f32", "4 experts of which 2, called w1, w2, w3; sliding window of 8", MIXTRAL.but("float32")),
    Fixture(
        "qwen2-moe-f32",
        "5 experts of which 2, weights as they come, and a gated shared one; every other layer",
        QWEN2_MOE.but("float32"),
    ),
    Fixture(
        "qwen3-moe-f32",
        "5 experts of which 2, whose weights add up to 1; the first layer has none",
        QWEN3_MOE.but("float32"),
    ),
    Fixture(
        "qwen3-moe-stacked-bf16",
        "experts of a layer in one tensor, gate and up as one, as transformers 5 keeps them in memory",
        replace(QWEN3_MOE, stacked=True),
    ),
    Fixture(
        "deepseek-v2-f32",
        "latent attention; 8 experts in groups, the best of which decide, and two shared ones; yarn; older spelling",
        DEEPSEEK_V2.but("float32"),
    ),
    Fixture(
        "deepseek-v2-lite-f32",
        "queries without a latent; experts without groups, weights as they come",
        DEEPSEEK_V2_LITE.but("float32"),
    ),
    Fixture(
        "deepseek-v3-f32",
        "sigmoid scores, a bias for the choice, groups by their two best; biases of the latents' products",
        DEEPSEEK_V3.but("float32"),
    ),
    Fixture("llama-bf16", "bfloat16", LLAMA_SMALL.but(num_hidden_layers=2)),
    Fixture(
        "llama-sharded-bf16",
        "several safetensors files and an index; llama3 rope in the older spelling (rope_scaling)",
        LLAMA_SMALL.but(rope_parameters=LLAMA3_ROPE, older_config=True, shard_bytes=20_000),
    ),
)

PACKED = (
    Fixture("w4a16-sym-g32-f32", "float32 scales; head ignored", LLAMA_SMALL.but("float32"), one(SYM, ignore=HEAD)),
    Fixture("w4a16-asym-g32-head-f32", "float32 scales; head quantized", LLAMA.but("float32"), one(ASYM)),
    Fixture("w4a16-asym-g32", "head ignored", LLAMA, one(ASYM, ignore=HEAD)),
    Fixture("w4a16-sym-g32-head", "head quantized", LLAMA_SMALL, one(SYM)),
    Fixture("w4a16-sym-g32-head-f16", "float16 scales; head quantized", LLAMA_SMALL.but("float16"), one(SYM)),
    Fixture(
        "w4a16-asym-channel-head",
        "head of 52 rows: its packed zero points end inside a word",
        LLAMA_ROWS_52,
        one(integer(4, "channel", symmetric=False)),
    ),
    Fixture("w4a16-sym-channel", "head ignored", LLAMA_SMALL, one(integer(4, "channel"), ignore=HEAD)),
    Fixture(
        "w4a16-asym-g16-padded-head",
        "12 key rows and 52 head rows: both pad their packed zero points",
        LLAMA_ODD_HEADS,
        one(integer(4, symmetric=False, group_size=16)),
    ),
    Fixture(
        "w4a16-asym-g128-head",
        "group 128, hidden 128, intermediate 256",
        LLAMA_WIDE,
        Recipe(preset="W4A16_ASYM"),
    ),
    Fixture(
        "wna16-every-width-sym-g32-head",
        "2 to 8 bits, a config group each; head 3 bits",
        LLAMA_ROWS_52,
        every_width(True, 32, 3),
    ),
    Fixture(
        "wna16-every-width-asym-g32-head",
        "2 to 8 bits, a config group each; head 3 bits, 52 rows",
        LLAMA_ROWS_52,
        every_width(False, 32, 3),
    ),
    Fixture(
        "w8a16-sym-tensor",
        "one scale a tensor; head ignored",
        LLAMA_SMALL,
        one(integer(8, "tensor"), ignore=HEAD),
    ),
    Fixture(
        "w8a16-asym-tensor-head",
        "one scale and one zero point, unpacked int8, a tensor",
        LLAMA_SMALL,
        one(integer(8, "tensor", symmetric=False)),
    ),
    Fixture(
        "w4a16-asym-g32-embedding-head",
        "embedding and head quantized, each its own",
        LLAMA_ROWS_52,
        Recipe(groups=(group(ASYM, "Linear", "Embedding"),)),
    ),
    Fixture(
        "w4a16-sym-g32-tied-embedding",
        "tied: one packed table under embed_tokens serves as the head too",
        LLAMA_SMALL_TIED,
        Recipe(groups=(group(SYM, "Linear", "Embedding"),)),
    ),
    Fixture(
        "w4a16-asym-g32-untied-head",
        "a tied model whose head alone is quantized: packed head beside a dense embedding",
        LLAMA_SMALL_TIED,
        one(ASYM),
    ),
    Fixture(
        "w4a16-asym-g32-head-no-target",
        "no target matches the head: dense, and listed in ignore by the library",
        LLAMA_SMALL,
        Recipe(groups=(group(ASYM, "re:.*_proj$"),)),
    ),
    Fixture(
        "fakequant-w4a16-asym-g32-head",
        "saved uncompressed: dense weights beside their scales, status frozen",
        LLAMA_SMALL,
        one(ASYM, compress=False),
    ),
)

INTEGER = (
    Fixture(
        "w8a8-dynamic-f32",
        "float32 scales; head ignored",
        LLAMA.but("float32"),
        one(INT8_CHANNEL, INT8_TOKEN, ignore=HEAD),
    ),
    Fixture(
        "w8a8-static-head-f32",
        "one calibrated input scale a tensor; head quantized",
        LLAMA_SMALL.but("float32"),
        one(INT8_CHANNEL, inputs=integer(8, "tensor", dynamic=False), calibrate=True),
    ),
    Fixture("w8a8-dynamic-head", "head quantized", LLAMA_SMALL, one(INT8_CHANNEL, INT8_TOKEN)),
    Fixture(
        "w8a8-static-asym",
        "calibrated asymmetric inputs: input_zero_point; head ignored",
        LLAMA_SMALL,
        one(
            INT8_CHANNEL,
            ignore=HEAD,
            inputs=integer(8, "tensor", symmetric=False, dynamic=False),
            calibrate=True,
        ),
    ),
    Fixture(
        "w8a8-dynamic-asym-head",
        "asymmetric inputs quantized per token",
        LLAMA_SMALL,
        one(INT8_CHANNEL, inputs=integer(8, "token", symmetric=False, dynamic=True)),
    ),
    Fixture(
        "w8a8-tensor-static-head",
        "one scale a tensor for weights and for inputs",
        LLAMA_SMALL,
        one(integer(8, "tensor"), inputs=integer(8, "tensor", dynamic=False), calibrate=True),
    ),
    Fixture(
        "w4a8-g32-head",
        "4-bit codes one a byte (int-quantized)",
        LLAMA_SMALL,
        one(SYM, INT8_TOKEN),
    ),
    Fixture(
        "w4a8-g32-packed",
        "the same schemes forced to pack-quantized; head ignored",
        LLAMA_SMALL,
        one(SYM, INT8_TOKEN, ignore=HEAD, storage="pack-quantized"),
    ),
    Fixture(
        "w8a16-asym-g32-naive-head",
        "weight-only integers forced to naive-quantized: unpacked int8 zero points",
        LLAMA_SMALL,
        one(integer(8, symmetric=False, group_size=32), storage="naive-quantized"),
    ),
    Fixture(
        "w4afp8-g32-head",
        "int4 weights with FP8 inputs per token",
        LLAMA_SMALL,
        one(SYM, FP8_TOKEN),
    ),
)

FLOAT8 = (
    Fixture(
        "fp8-static-head",
        "preset FP8: one scale a tensor, calibrated inputs",
        LLAMA_SMALL,
        Recipe(preset="FP8", calibrate=True),
    ),
    Fixture(
        "fp8-dynamic",
        "preset FP8_DYNAMIC; head ignored",
        LLAMA_SMALL,
        Recipe(preset="FP8_DYNAMIC", ignore=HEAD),
    ),
    Fixture(
        "fp8-dynamic-head-f32",
        "float32 scales; head quantized",
        LLAMA_SMALL.but("float32"),
        Recipe(preset="FP8_DYNAMIC"),
    ),
    Fixture(
        "fp8-block-head",
        "preset FP8_BLOCK, 128x128: 64 key rows and 52 head rows leave ragged blocks",
        LLAMA_BLOCK,
        Recipe(preset="FP8_BLOCK"),
    ),
    Fixture(
        "fp8-block-24x32-head",
        "blocks that are not square; ragged rows in every projection but the narrow ones' columns",
        LLAMA_ROWS_52,
        one(
            fp8("block", block_structure=[24, 32]),
            inputs=fp8("group", group_size=32, dynamic=True),
        ),
    ),
    Fixture(
        "fp8-block-48x40-weight-only-head",
        "weight-only blocks, ragged in rows and columns",
        LLAMA_ROWS_52,
        one(fp8("block", block_structure=[48, 40])),
    ),
    Fixture(
        "fp8-channel-weight-only",
        "weight-only FP8 (naive-quantized); head ignored",
        LLAMA_SMALL,
        one(fp8("channel"), ignore=HEAD),
    ),
)

FLOAT4 = (
    Fixture("nvfp4a16-head", "preset NVFP4A16; head quantized", LLAMA_ROWS_52, Recipe(preset="NVFP4A16")),
    Fixture(
        "nvfp4",
        "preset NVFP4, calibrated input global scales; head ignored",
        LLAMA_SMALL,
        Recipe(preset="NVFP4", ignore=HEAD, calibrate=True),
    ),
    Fixture("mxfp4a16-head", "preset MXFP4A16; head quantized", LLAMA_ROWS_52, Recipe(preset="MXFP4A16")),
    Fixture("mxfp4", "preset MXFP4; head ignored", LLAMA_SMALL, Recipe(preset="MXFP4", ignore=HEAD)),
    Fixture("mxfp8a16-head", "preset MXFP8A16; head quantized", LLAMA_ROWS_52, Recipe(preset="MXFP8A16")),
    Fixture("mxfp8", "preset MXFP8; head ignored", LLAMA_SMALL, Recipe(preset="MXFP8", ignore=HEAD)),
)

FP8_CACHE = fp8("tensor", dynamic=False)
COMBINED = (
    Fixture(
        "w4a16-asym-g32-kv-fp8",
        "calibrated FP8 KV cache, a scale a tensor; head ignored",
        LLAMA,
        one(ASYM, ignore=HEAD, kv_cache=FP8_CACHE, calibrate=True),
    ),
    Fixture(
        "w8a8-dynamic-kv-fp8-per-head",
        "calibrated FP8 KV cache, a scale a head; head ignored",
        LLAMA_SMALL.but(num_attention_heads=4, num_key_value_heads=2),
        one(
            INT8_CHANNEL,
            INT8_TOKEN,
            ignore=HEAD,
            kv_cache=fp8("attn_head", dynamic=False),
            calibrate=True,
        ),
    ),
    Fixture(
        "mixed-attention-w8a8-mlp-w4a16",
        "mixed-precision: two config groups of two formats, neither for the head",
        LLAMA_SMALL,
        Recipe(
            groups=(
                group(INT8_CHANNEL, "re:.*self_attn\\..*_proj$", input_activations=INT8_TOKEN),
                group(ASYM, "re:.*mlp\\..*_proj$"),
            )
        ),
    ),
    Fixture("qwen2-w4a16-asym-g32-head", "biases beside packed weights", QWEN2, one(ASYM)),
    Fixture(
        "qwen2-w8a8-dynamic",
        "biases beside int8 weights; head ignored",
        QWEN2.but(num_hidden_layers=1, intermediate_size=96, vocab_size=48),
        one(INT8_CHANNEL, INT8_TOKEN, ignore=HEAD),
    ),
    Fixture("qwen3-w4a16-asym-g32-head", "q/k norms beside packed weights", QWEN3, one(ASYM)),
    Fixture(
        "qwen3-w8a8-dynamic",
        "q/k norms beside int8 weights; head ignored",
        QWEN3.but(num_hidden_layers=1, intermediate_size=96, vocab_size=48),
        one(INT8_CHANNEL, INT8_TOKEN, ignore=HEAD),
    ),
    Fixture("mistral-w4a16-asym-g32-head", "sliding window of 8", MISTRAL, one(ASYM)),
    Fixture(
        "mistral-w8a8-dynamic",
        "sliding window of 8; head ignored",
        MISTRAL.but(num_hidden_layers=1, intermediate_size=96, vocab_size=48),
        one(INT8_CHANNEL, INT8_TOKEN, ignore=HEAD),
    ),
)

# Experts one by one, each with its own scales; the shared expert's modules by their own names.
NO_ROUTERS = ("lm_head", "re:.*mlp\\.gate$", "re:.*shared_expert_gate$")
EXPERTS = (
    Fixture(
        "qwen3-moe-w4a16-asym-g16",
        "experts one by one; routers and head ignored",
        QWEN3_MOE,
        one(integer(4, symmetric=False, group_size=16), ignore=NO_ROUTERS),
    ),
    Fixture(
        "qwen3-moe-w8a8-static-f32",
        "a calibrated input scale for each expert's projections; routers and head ignored",
        QWEN3_MOE.but("float32"),
        one(INT8_CHANNEL, integer(8, "tensor", dynamic=False), ignore=NO_ROUTERS, calibrate=True),
    ),
    Fixture(
        "qwen2-moe-fp8-dynamic-no-shared",
        "preset FP8_DYNAMIC; the shared expert ignored by the names of its unfused projections",
        QWEN2_MOE,
        Recipe(preset="FP8_DYNAMIC", ignore=(*NO_ROUTERS, "re:.*shared_expert\\.(gate|up)_proj$")),
    ),
    Fixture(
        "deepseek-v2-w8a8-dynamic",
        "latent attention in int8, kv_b_proj too; routers and head ignored",
        DEEPSEEK_V2.but(num_hidden_layers=2),
        one(INT8_CHANNEL, INT8_TOKEN, ignore=NO_ROUTERS),
    ),
    Fixture(
        "deepseek-v3-w4a16-asym-g16",
        "latent attention in 4 bits, kv_b_proj too; routers and head ignored",
        DEEPSEEK_V3.but(num_hidden_layers=2),
        one(integer(4, symmetric=False, group_size=16), ignore=NO_ROUTERS),
    ),
)

# The sources of the rewrites, small because there are many of them.
ASYM_16 = integer(4, symmetric=False, group_size=16)
TINY = (
    Fixture("tiny-w4a16-asym-g16-head", "44 head rows pad their packed zero points", LLAMA_TINY, one(ASYM_16)),
    Fixture(
        "tiny-w4a16-asym-channel-head",
        "one zero point a row, packed along the rows",
        LLAMA_TINY,
        one(integer(4, "channel", symmetric=False)),
    ),
    Fixture("tiny-w4a16-sym-g16", "head ignored", LLAMA_TINY, one(integer(4, group_size=16), ignore=HEAD)),
    Fixture(
        "tiny-wna16-every-width-asym-g16-head",
        "2 to 8 bits; head 5 bits",
        LLAMA_TINY,
        every_width(False, 16, 5),
    ),
    Fixture("tiny-w8a8-dynamic-head", "preset W8A8", LLAMA_TINY, Recipe(preset="W8A8")),
    Fixture("tiny-fp8-static-head", "preset FP8", LLAMA_TINY, Recipe(preset="FP8", calibrate=True)),
    Fixture("tiny-fp8-dynamic-head", "preset FP8_DYNAMIC", LLAMA_TINY, Recipe(preset="FP8_DYNAMIC")),
    Fixture(
        "tiny-w8a8-kv-fp8",
        "calibrated FP8 KV cache; head ignored",
        LLAMA_TINY,
        one(INT8_CHANNEL, INT8_TOKEN, ignore=HEAD, kv_cache=FP8_CACHE, calibrate=True),
    ),
)

FIXTURES = (*UNQUANTIZED, *PACKED, *INTEGER, *FLOAT8, *FLOAT4, *COMBINED, *EXPERTS, *TINY)
