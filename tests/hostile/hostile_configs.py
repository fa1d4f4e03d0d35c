"""Values in config.json that no writer writes: of the model, of its quantization, and patterns that run forever."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from cases import (
    FOUR,
    QUANTIZED,
    Case,
    config_of,
    configured,
    group,
    odd,
    quantized,
    seen,
    stranger,
    tensors_of,
    weights,
)
from make import BF16, dense, llama

ESCAPES = "\x1b[2J\x1b]0;owned\x07"

MODEL: dict[str, Case] = {
    "values just not too deep": seen(
        config_of(json.dumps(llama()).replace('"hidden_size": 64', f'"hidden_size": {"[" * 900}{"]" * 900}').encode()),
        "config-type",
    ),
    "4,000 digits": seen(configured(hidden_size=10**4000), "json-invalid"),
    "infinity by its exponent": seen(config_of(json.dumps(llama()).replace("1e-05", "1e999").encode()), "json-invalid"),
    "a billion layers": seen(configured(num_hidden_layers=10**9), "config-unsupported"),
    "no layers": seen(configured(num_hidden_layers=0), "config-unsupported"),
    "fewer layers than none": seen(configured(num_hidden_layers=-1), "config-unsupported"),
    "true layers": seen(configured(num_hidden_layers=True), "config-type"),
    "a huge vocabulary": seen(configured(vocab_size=1 << 31), "shape-mismatch"),
    "a vocabulary of one more": seen(configured(vocab_size=41), "shape-mismatch"),
    "no vocabulary": seen(configured(vocab_size=0), "config-unsupported"),
    "no heads": seen(configured(num_attention_heads=0), "config-unsupported"),
    "heads that don't divide": seen(configured(num_attention_heads=7), "config-unsupported"),
    "huge heads": seen(configured(head_dim=1 << 40), "config-unsupported"),
    "a width that is text": seen(configured(hidden_size="64"), "config-type"),
    "a width that is a list": seen(configured(hidden_size=[64]), "config-type"),
    "a negative width": seen(configured(hidden_size=-64), "config-unsupported"),
    "no width": seen(configured(hidden_size=None), "config-missing"),
    "an activation that is an object": seen(configured(hidden_act={"silu": 1}), "config-unsupported"),
    "architectures that are text": seen(configured(architectures="LlamaForCausalLM"), "config-type"),
    "architectures that are objects": stranger(configured(architectures=[{"a": 1}])),
    "architectures of nothing": odd(configured(architectures=[])),
    "an architecture that moves the cursor": stranger(configured(architectures=[ESCAPES]), "family-unknown"),
    "a model_type that is a number": seen(configured(architectures=[], model_type=7), "config-type"),
    "layer_types of objects": seen(configured(layer_types=[{}]), "config-unsupported"),
    "fewer layer_types than layers": seen(configured(num_hidden_layers=2, layer_types=["x"]), "config-unsupported"),
    "a context without an end": odd(configured(max_position_embeddings=1 << 31)),
    "no context": seen(configured(max_position_embeddings=0), "config-unsupported"),
    "a text_config that is a list": odd(configured(text_config=[llama()])),
    "a text_config that is another model": seen(configured(text_config={"hidden_size": "64"}), "config-type"),
    "tied by a word": seen(configured(tie_word_embeddings="yes"), "config-type"),
    "a dtype that is a number": seen(configured(torch_dtype=16), "config-type"),
    "a torch_dtype of no one": odd(configured(torch_dtype="bfloat1024")),
    "a norm that divides by nothing": odd(configured(rms_norm_eps=0)),
    "a norm of the root of a negative": seen(configured(rms_norm_eps=-1e9), "config-unsupported"),
    "no rotation": seen(configured(rope_theta=0), "rope-unsupported"),
    "a rotation without a number": seen(configured(rope_theta="10000"), "config-type"),
    "a rotation that is a list": seen(configured(rope_scaling=["linear", 2]), "config-type"),
    "a rotation of no one": seen(configured(rope_scaling={"rope_type": "spiral"}), "rope-unsupported"),
    "a rotation divided by almost nothing": seen(
        configured(rope_scaling={"rope_type": "linear", "factor": 5e-324}), "rope-unsupported"
    ),
    "a yarn of next to nothing": odd(
        configured(rope_scaling={"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 1e-308})
    ),
    "a yarn that divides by zero": seen(
        configured(rope_scaling={"rope_type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": -14.426950408889635}),
        "rope-unsupported",
    ),
    "a llama3 of extremes": seen(
        configured(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 5e-324,
                "low_freq_factor": 5e-324,
                "high_freq_factor": 1e308,
                "original_max_position_embeddings": 1e308,
            }
        ),
        "rope-unsupported",
    ),
    "half a rotation": seen(configured(partial_rotary_factor=-0.5), "rope-unsupported"),
    "100,000 keys": odd(configured(**{f"key_{number}": number + 1 for number in range(100_000)}), "config-keys-unread"),
    "a key that moves the cursor": odd(configured(**{ESCAPES: 1}), "config-keys-unread"),
}

BLOCK: dict[str, Case] = {
    "a quantization that is a list": seen(configured(quantization_config=[QUANTIZED]), "config-type"),
    "a quantization that is text": seen(configured(quantization_config="int4"), "config-type"),
    "a method that is a list": seen(quantized(quant_method=["compressed-tensors"]), "format-unknown"),
    "a method that moves the cursor": seen(quantized(quant_method=ESCAPES), "format-unknown"),
    "a version that is a number": seen(quantized(version=0.19), "config-type"),
    "a version of 100,000 digits": odd(quantized(version="9" * 100_000)),
    "a format that is a list": seen(quantized(format=["pack-quantized"]), "config-type"),
    "groups that are a list": seen(quantized(config_groups=[QUANTIZED["config_groups"]["group_0"]]), "config-type"),
    "groups that are text": seen(quantized(config_groups="group_0"), "config-type"),
    "a group that is text": seen(quantized(config_groups={"group_0": "W4A16"}), "config-type"),
    "a group that is null": seen(quantized(config_groups={"group_0": None}), "config-type"),
    "a group of a preset's name that lists numbers": seen(quantized(config_groups={"W4A16": [1, 2]}), "config-type"),
    "targets that are text": seen(group(targets="Linear"), "config-type"),
    "targets that are an object": seen(group(targets={"Linear": 1}), "config-type"),
    "targets that are numbers": seen(group(targets=[4]), "config-type"),
    "weights that are text": seen(group(weights="int4"), "config-type"),
    "weights that are a list": seen(group(weights=[4]), "config-type"),
    "activations that are true": seen(group(input_activations=True), "config-type"),
    "no bits": seen(weights(num_bits=0), "scheme-unknown"),
    "fewer bits than none": seen(weights(num_bits=-4), "scheme-unknown"),
    "2^62 bits": seen(weights(num_bits=1 << 62), "scheme-unknown"),
    "bits that are text": seen(weights(num_bits="4"), "config-type"),
    "bits that are true": seen(weights(num_bits=True), "config-type"),
    "bits with a fraction": seen(weights(num_bits=4.5), "config-type"),
    "a type of no one": seen(weights(type="posit"), "scheme-unknown"),
    "no group size": seen(weights(group_size=0), "scheme-contradiction"),
    "a negative group size": seen(weights(group_size=-32), "scheme-contradiction"),
    "a group size that is text": seen(weights(group_size="32"), "config-type"),
    "a group size of 2^62": seen(weights(group_size=1 << 62), "tensors-disagree"),
    "groups of one column": seen(weights(group_size=1), "tensors-disagree"),
    "a strategy that is a list": seen(weights(strategy=["group"]), "config-type"),
    "a strategy of no one": seen(weights(strategy="galaxy"), "scheme-unknown"),
    "blocks of nothing": seen(
        weights(strategy="block", group_size=None, block_structure=[0, 0]), "scheme-contradiction"
    ),
    "blocks of text": seen(weights(strategy="block", group_size=None, block_structure="²x²"), "scheme-contradiction"),
    "blocks of objects": seen(
        weights(strategy="block", group_size=None, block_structure=[{}, {}]), "scheme-contradiction"
    ),
    "weights that are dynamic": seen(weights(dynamic=True), "scheme-contradiction"),
    "dynamic by an object": seen(weights(dynamic={"a": 1}), "config-type"),
    "symmetric by a number": seen(weights(symmetric=1), "config-type"),
    "an activation order that is an object": odd(weights(actorder={"a": 1})),
    "a scale dtype that is a number": seen(weights(scale_dtype=16), "config-type"),
    "ignored by an object": seen(quantized(ignore={"lm_head": True}), "config-type"),
    "ignored by text": seen(quantized(ignore="lm_head"), "config-type"),
    "ignored by numbers": seen(quantized(ignore=[0, None]), "config-type"),
    "ignored by an entry that moves the cursor": odd(quantized(ignore=[ESCAPES]), "pattern-no-match"),
    "a cache scheme that is a list": seen(quantized(kv_cache_scheme=[8]), "config-type"),
    "a cache scheme of no bits": odd(quantized(kv_cache_scheme={"num_bits": 0}), "kv-scheme-unsupported"),
    "transforms that are a list": seen(quantized(transform_config=["u"]), "config-type"),
    "transforms that are text": seen(quantized(transform_config={"config_groups": {"u": "R1"}}), "transform-online"),
    "a block inside itself": odd(quantized(sparsity_config=QUANTIZED)),
    "5,000 groups": odd(
        quantized(
            config_groups=QUANTIZED["config_groups"]
            | {f"g{number}": {"targets": [f"m{number}"], "weights": FOUR.weights} for number in range(5_000)}
        ),
        "pattern-no-match",
    ),
}


def ignoring(*patterns: str) -> Any:
    return quantized(ignore=list(patterns))


def alone(ignore: list[str], *modules: str) -> Any:
    """Only these modules, with this ignore list."""
    config = {"quantization_config": QUANTIZED | {"ignore": ignore}}
    return tensors_of({f"{module}.weight": np.ones((2, 2), BF16) for module in modules}, config)


A_60 = tensors_of(dense(8, 8).under("a" * 60 + "b"), {"quantization_config": QUANTIZED | {"ignore": ["re:(a|a)*$"]}})

PATTERNS: dict[str, Case] = {
    "a pattern without an end": seen(A_60, "pattern-timeout"),
    "hundreds of slow patterns": seen(
        alone(
            [f"re:(a|aa)+${'x' * number}" for number in range(50)], *(f"{'a' * 19}{number}b" for number in range(300))
        ),
        "pattern-timeout",
    ),
    # Python's re, whose patterns these are, has no recursion; the regex package has, and it takes gigabytes.
    "a pattern that calls itself": seen(ignoring("re:(?R)"), "pattern-invalid"),
    "a pattern with errors allowed": Case(ignoring("re:(?:x{1000}y{1000}){e}z"), (), "", may_time_out=True),
    "a pattern of deep groups": seen(ignoring("re:" + "(" * 100_000), "pattern-invalid"),
    "a pattern that isn't closed": seen(ignoring("re:[a-"), "pattern-invalid"),
    "a pattern of a list that isn't there": seen(ignoring(r"re:\L<names>"), "pattern-invalid"),
    "a pattern of no character": seen(ignoring(r"re:\N{no such character}"), "pattern-invalid"),
    "a pattern that counts to 10^30": Case(ignoring("re:m{" + "9" * 30 + "}"), ("pattern-invalid",), "pattern-invalid"),
    "a pattern that refers to nothing": seen(ignoring(r"re:\9"), "pattern-invalid"),
    "a long pattern": odd(ignoring("re:" + "(a|b)?" * 5_000)),
    "counts of counts": odd(ignoring("re:(((m{1,1000}){1,1000}){1,1000}){1,1000}x")),
    "a pattern with a zero byte": odd(ignoring("re:\0"), "pattern-no-match"),
    "endless ignore lists": odd(ignoring(*(f"module.{number}" for number in range(50_000)))),
    "100,000 patterns": Case(
        ignoring(*(f"re:module.{number}" for number in range(100_000))), (), "", may_time_out=True
    ),
}

CONFIGS = MODEL | BLOCK | PATTERNS
