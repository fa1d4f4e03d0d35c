"""Tensors whose shapes, dtypes or values don't make sense: scales, codes, indexes, experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import FOUR, QUANTIZED, Build, Case, entry, header_of, in_data, odd, seen, stranger, tensors_of, with_q
from make import BF16, E4M3, HEAD, Raw, Stored, block, dense, fp8, integers, llama, llama_tensors, mx, nvfp4, write

STACK = "model.layers.0.mlp.experts.up_proj.weight"
ATTENTION = "model.layers.0.self_attn"
NAN, INFINITE = float("nan"), float("inf")


def scaled(value: float) -> Build:
    scale = FOUR.tensors["weight_scale"].copy()
    scale[5, 1] = value
    return with_q({"weight_scale": scale})


def stored(module: Stored, changes: dict[str, Any], **config: Any) -> Build:
    """The small Llama with q_proj stored in another way, and then changed."""
    tensors = dict.fromkeys(FOUR.tensors) | module.tensors | changes
    return with_q(tensors, block(module.weights, ["re:.*q_proj"], **config))


def divided(value: float) -> Build:
    return stored(nvfp4(64, 64), {"weight_global_scale": np.array([value], np.float32)})


def with_input(value: Any, **changes: Any) -> Build:
    """A static activation scale of this value."""
    module = integers(64, 64, 8, plain=True)
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False} | changes
    return stored(module, {"input_scale": value}, inputs=inputs)


def with_cache_scale(value: Any, dtype: Any = np.float32) -> Build:
    scale = np.array([value], dtype)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    tensors = {f"{ATTENTION}.k_scale": scale, f"{ATTENTION}.v_scale": np.ones(1, np.float32)}
    return with_q(tensors, QUANTIZED | {"kv_cache_scheme": scheme})


def filled(name: str, value: float) -> Build:
    """One value of a tensor that isn't quantized is another one."""
    tensor = llama_tensors()[name].copy()
    tensor.reshape(-1)[7] = value
    return with_q({name: tensor})


def ordered(g_idx: Any) -> Build:
    return with_q({"weight_g_idx": np.asarray(g_idx)})


def codes_of_bits(bits: int, value: int) -> Build:
    """Plain int8 codes, one of them outside of its bits."""
    module = integers(64, 64, bits, plain=True)
    weight = module.tensors["weight"].copy()
    weight[3, 3] = value
    return stored(module, {"weight": weight})


def mx_scale(value: int) -> Build:
    exponents = mx(64, 64, 4).tensors["weight_scale"].copy()
    exponents[3, 1] = value
    return stored(mx(64, 64, 4), {"weight_scale": exponents})


def nan_code() -> Build:
    weight = fp8(64, 64).tensors["weight"].copy()
    weight.view(np.uint8)[4, 4] = 0x7F
    return stored(fp8(64, 64), {"weight": weight})


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


ASYMMETRIC = integers(64, 64, 8, 32, asymmetric=True, plain=True)
NO_CODES = FOUR.tensors["weight_packed"] * 0 - 0x77777778  # every code at the zero point

SCALES: dict[str, Case] = {
    "a scale that is no number": in_data(scaled(NAN), "scale-invalid"),
    "an infinite scale": in_data(scaled(INFINITE), "scale-invalid"),
    "a negative scale": in_data(scaled(-1), "scale-invalid"),
    "a negative zero as a scale": in_data(scaled(-0.0), "scale-invalid"),
    "a zero scale over codes": in_data(scaled(0), "scale-invalid"),
    "zero scales over nothing": odd(with_q({"weight_packed": NO_CODES, "weight_scale": np.zeros((64, 2), BF16)})),
    "a float64 scale beyond float32": in_data(with_q({"weight_scale": np.full((64, 2), 1e300)}), "scale-invalid"),
    "scales that make every logit infinite": in_data(
        with_q({"weight_scale": np.full((64, 2), 3e38, np.float32)}), "logits-not-finite"
    ),
    "FP8 weights beyond float32": in_data(
        stored(fp8(64, 64), {"weight_scale": np.full((64, 1), 3e38, np.float32)}), "logits-not-finite"
    ),
    "scales of another shape": seen(with_q({"weight_scale": np.ones((2, 64), BF16)}), "tensors-disagree"),
    "scales of three axes": seen(with_q({"weight_scale": np.ones((64, 2, 2), BF16)}), "tensors-disagree"),
    "scales that are integers": seen(with_q({"weight_scale": np.ones((64, 2), np.int64)}), "tensors-disagree"),
    "scales that are complex": seen(with_q({"weight_scale": np.ones((64, 2), np.complex64)}), "tensors-disagree"),
    "scales that are true": seen(with_q({"weight_scale": np.ones((64, 2), bool)}), "tensors-disagree"),
    "scales of half a byte": seen(with_q({"weight_scale": Raw("F4", (64, 2), bytes(64))}), "tensors-disagree"),
    "empty scales": seen(with_q({"weight_scale": np.ones((64, 0), BF16)}), "tensors-disagree"),
    "no scales": seen(with_q({"weight_scale": None}), "module-incomplete"),
    "E8M0 that is no number": in_data(mx_scale(255), "scale-invalid"),
    "a global scale of zero": in_data(divided(0), "scale-invalid"),
    "a negative global scale": in_data(divided(-3e4), "scale-invalid"),
    "a global scale that is no number": in_data(divided(NAN), "scale-invalid"),
    "an infinite global scale": in_data(divided(INFINITE), "scale-invalid"),
    "a global scale next to zero": in_data(divided(1e-45), "scale-invalid"),
    "two global scales": seen(
        stored(nvfp4(64, 64), {"weight_global_scale": np.ones(2, np.float32)}), "tensors-disagree"
    ),
    "no global scale": seen(stored(nvfp4(64, 64), {"weight_global_scale": None}), "tensors-disagree"),
    "a static input scale of zero": in_data(with_input(np.zeros(1, np.float32)), "scale-invalid"),
    "a static input scale that is no number": in_data(with_input(np.array([NAN], np.float32)), "scale-invalid"),
    "64 static input scales": in_data(with_input(np.ones(64, np.float32)), "scale-invalid"),
    "an empty static input scale": in_data(with_input(np.ones(0, np.float32)), "scale-invalid"),
    "a static input scale that is complex": in_data(with_input(np.ones(1, np.complex64)), "scale-invalid"),
    "no static input scale": seen(with_input(None), "scale-missing"),
    "a cache scale of zero": in_data(with_cache_scale(0), "scale-invalid"),
    "a cache scale beyond float32": in_data(with_cache_scale(1e300, np.float64), "scale-invalid"),
    "a cache scale below float32": in_data(with_cache_scale(1e-300, np.float64), "scale-invalid"),
    "a cache scale that is complex": in_data(with_cache_scale(1 + 1j, np.complex64), "scale-invalid"),
    "a cache scale that is no number": in_data(with_cache_scale(NAN), "scale-invalid"),
}

CODES: dict[str, Case] = {
    "a weight_shape from elsewhere": in_data(with_q({"weight_shape": np.array([64, 1 << 40])}), "tensors-disagree"),
    "a negative weight_shape": in_data(with_q({"weight_shape": np.array([-64, -64])}), "tensors-disagree"),
    "a weight_shape of megabytes": seen(with_q({"weight_shape": np.zeros(1 << 20, np.int64)}), "tensors-disagree"),
    "a weight_shape of floats": seen(with_q({"weight_shape": np.ones(2, np.float32)}), "tensors-disagree"),
    "codes outside of their bits": in_data(codes_of_bits(4, 8), "code-range"),
    "codes that aren't numbers": in_data(nan_code(), "weight-nan"),
    "zero points outside of their bits": in_data(
        stored(
            integers(64, 64, 4, 32, asymmetric=True, plain=True),
            {"weight_zero_point": np.full((64, 2), 100, np.int8)},
        ),
        "code-range",
    ),
    "zero points of 2^62": in_data(stored(ASYMMETRIC, {"weight_zero_point": np.full((64, 2), 1 << 62)}), "code-range"),
    "zero points at the end of int64": in_data(
        stored(ASYMMETRIC, {"weight_zero_point": np.full((64, 2), (1 << 63) - 1)}), "code-range"
    ),
    "zero points that are floats": seen(
        stored(ASYMMETRIC, {"weight_zero_point": np.ones((64, 2), np.float32)}), "tensors-disagree"
    ),
    "zero points under symmetric": odd(with_q({"weight_zero_point": np.ones((64, 2), np.int8)})),
    "an activation order out of range": in_data(ordered(np.full(64, 2, np.int32)), "act-order-invalid"),
    "a negative activation order": in_data(ordered(np.full(64, -2, np.int32)), "act-order-invalid"),
    "an activation order of 2^62": in_data(ordered(np.full(64, 1 << 62)), "act-order-invalid"),
    "an activation order of one group": in_data(ordered(np.zeros(64, np.int32)), "act-order-invalid"),
    "an activation order of floats": seen(ordered(np.zeros(64, np.float32)), "tensors-disagree"),
    "an activation order of another length": seen(ordered(np.zeros(63, np.int32)), "tensors-disagree"),
    "codes of one axis": seen(with_q({"weight_packed": zeros(512)}), "tensors-disagree"),
    "codes of three axes": seen(with_q({"weight_packed": zeros(64, 8, 1)}), "tensors-disagree"),
    "codes without columns": seen(with_q({"weight_packed": zeros(64, 0)}), "tensors-disagree"),
    "codes without rows": seen(with_q({"weight_packed": zeros(0, 8)}), "tensors-disagree"),
    "codes that are complex": seen(with_q({"weight_packed": np.ones((64, 8), np.complex64)}), "module-incomplete"),
    "codes that are true": seen(with_q({"weight_packed": np.ones((64, 8), bool)}), "module-incomplete"),
    "integers without a scale": seen(
        stored(integers(64, 64, 8, plain=True), {"weight_scale": None}), "module-incomplete"
    ),
    "FP8 of another kind": seen(
        stored(fp8(64, 64), {"weight": Raw("F8_E5M2", (64, 64), bytes(4096))}), "module-incomplete"
    ),
    "a block larger than all": odd(
        stored(
            integers(64, 64, 8, tensor=True, plain=True)._replace(
                weights={"strategy": "block", "block_structure": [1 << 62, 1 << 62]}
            ),
            {},
        )
    ),
    "sub-byte dtypes": seen(with_q({"weight_packed": Raw("F4", (64, 64), bytes(2048))}), "module-incomplete"),
    "packed and plain at once": seen(with_q({"weight": dense(64, 64).tensors["weight"]}), "tensors-disagree"),
    "marlin-24": seen(with_q({"meta": np.ones(4, np.int16)}), "format-refused"),
}

SHAPES: dict[str, Case] = {
    "empty matrices": seen(
        tensors_of(
            {f"lm_head.{name}": tensor[:0] for name, tensor in mx(32, 32, 6).tensors.items()},
            llama(block(mx(32, 32, 6).weights)),
        ),
        "shape-mismatch",
        "module-missing",
    ),
    "no tensors": seen(tensors_of({}, llama()), "module-missing"),
    "a projection that isn't there": seen(tensors_of(llama_tensors(v_proj=None), llama()), "module-missing"),
    "an embedding of other words": seen(
        with_q({"model.embed_tokens.weight": np.ones((HEAD[0] - 1, HEAD[1]), BF16)}), "shape-mismatch"
    ),
    "a head of other words": seen(with_q({"lm_head.weight": np.ones((HEAD[0] + 1, HEAD[1]), BF16)}), "shape-mismatch"),
    "a norm of two axes": seen(with_q({"model.norm.weight": np.ones((8, 8), BF16)}), "shape-mismatch"),
    "a norm without axes": seen(with_q({"model.norm.weight": np.array(1, BF16)}), "shape-mismatch"),
    "a norm of integers": seen(with_q({"model.norm.weight": np.ones(64, np.int64)}), "module-incomplete"),
    "a norm that is quantized": seen(
        with_q({"model.norm.weight": np.ones(64, np.int8), "model.norm.weight_scale": np.ones(1, BF16)}),
        "tensors-disagree",
    ),
    "a projection of eight axes": seen(
        with_q({"lm_head.weight": np.ones((40, 64, 1, 1, 1, 1, 1, 1), BF16)}), "shape-mismatch"
    ),
    "a bias of another length": seen(with_q({"bias": np.ones(63, BF16)}), "shape-mismatch"),
    "a bias of integers": seen(with_q({"bias": np.ones(64, np.int32)}), "tensors-disagree"),
    "a bias that is no number": in_data(with_q({"bias": np.full(64, NAN, BF16)}), "weight-nan", "bias-unexpected"),
    "a norm that is no number": in_data(filled("model.norm.weight", NAN), "weight-nan"),
    "a norm beyond float32": in_data(with_q({"model.norm.weight": np.full(64, 1e300)}), "logits-not-finite"),
    "an embedding beyond float32": in_data(
        with_q({"model.embed_tokens.weight": np.full(HEAD, 1e300)}), "logits-not-finite"
    ),
    "a head beyond float32": in_data(with_q({"lm_head.weight": np.full(HEAD, 1e300)}), "logits-not-finite"),
    "a bias beyond float32": in_data(with_q({"bias": np.full(64, 1e300)}), "weight-nan", "bias-unexpected"),
    "an infinite norm": in_data(filled("model.layers.0.input_layernorm.weight", INFINITE), "weight-nan"),
    "an embedding that is no number": in_data(
        with_q({"model.embed_tokens.weight": np.full(HEAD, NAN, BF16)}), "weight-nan"
    ),
    "a head that is no number": in_data(filled("lm_head.weight", NAN), "weight-nan"),
    "petabytes of experts": seen(header_of({STACK: entry("BF16", [1 << 30, 1 << 10, 2], 1 << 42)}), "tensors-disagree"),
    "endless empty experts": seen(header_of({STACK: entry("BF16", [1 << 50, 0, 2], 0)}), "tensors-disagree"),
    "2^40 packed experts": seen(
        header_of(
            {
                f"{STACK}_packed": entry("I32", [1 << 40, 0, 2], 0),
                f"{STACK}_scale": entry("BF16", [1 << 40, 0, 2], 0, 0),
            }
        ),
        "tensors-disagree",
    ),
    "2^40 experts by another name": seen(
        header_of({"model.layers.0.mlp.experts.gate_up_proj": entry("BF16", [1 << 40, 0, 2], 0)}), "tensors-disagree"
    ),
    "an expert of number 10^4000": stranger(
        header_of({f"model.layers.0.mlp.experts.{'9' * 4000}.up_proj.weight": entry("BF16", [2, 0], 0)})
    ),
    "headers alone": in_data(
        lambda folder: write(folder, llama_tensors(q_proj=FOUR), llama(QUANTIZED), header_only=True), "header-only"
    )._replace(header_only=True),
    "a scale of FP8 over integers": odd(with_q({"weight_scale": np.ones((64, 2), E4M3)})),
}

TENSORS = SCALES | CODES | SHAPES
