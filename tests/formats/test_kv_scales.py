"""Scales of a quantized KV cache under all the names that producers give them."""

from __future__ import annotations

import numpy as np
import pytest
from make import BF16, block, dense, llama, llama_tensors, write

from fewbits.formats.kv_scales import find
from fewbits.load import inspect

ATTENTION = "model.layers.0.self_attn"
K_AND_V = [
    ("{}.k_scale", "{}.v_scale"),
    ("{}.attn.k_scale", "{}.attn.v_scale"),
    ("{}.mla_attn.k_scale", "{}.mla_attn.v_scale"),
    ("{}.k_proj.k_scale", "{}.v_proj.v_scale"),
    ("{}.k_proj.output_scale", "{}.v_proj.output_scale"),
    ("{}.qkv_proj.k_scale", "{}.qkv_proj.v_scale"),
    ("{}.k_cache.scale", "{}.v_cache.scale"),
    ("{}.kv_scale", "{}.kv_scale"),
]
BESIDE = [
    "{}.q_scale",
    "{}.q.scale",
    "{}.q_zero_point",
    "{}.k_zero_point",
    "{}.v_zero_point",
    "{}.k_proj.output_zero_point",
    "{}.v_proj.output_zero_point",
    "{}.q_proj.output_scale",
]


@pytest.mark.parametrize(
    "attention", [ATTENTION, "model.layers.0.mixer", "transformer.h.0.attn", "model.layers.0.attention"]
)
@pytest.mark.parametrize(("k", "v"), K_AND_V)
def test_names(attention, k, v):
    k, v = k.format(attention), v.format(attention)
    found = find([k, v, f"{attention}.k_proj.weight_scale", f"{attention}.k_proj.input_scale", "lm_head.output_scale"])
    assert list(found) == [attention]
    scales = found[attention]
    assert (scales.k, scales.v) == (k, v)
    assert scales.owners[k] == f"{attention}.k_proj"
    assert scales.owners.keys() == {k, v}


@pytest.mark.parametrize("name", BESIDE)
def test_what_belongs_with_them(name):
    """Claimed, and no scale of k or v."""
    found = find([name.format(ATTENTION)])
    assert found[ATTENTION].owners.keys() == {name.format(ATTENTION)}
    assert (found[ATTENTION].k, found[ATTENTION].v) == ("", "")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight_scale",
        "model.layers.0.self_attn.k_proj.weight_zero_point",
        "model.layers.0.self_attn.k_proj.input_scale",
        "model.layers.0.mlp.down_proj.output_scale",
        "model.layers.0.mlp.k_scale",
        "k_scale",
        "self_attn.k_scale",
        "model.norm.scale",
        "model.layers.0.self_attn.k_norm.scale",
    ],
)
def test_names_that_are_something_else(name):
    assert find([name]) == {}


def kv_plan(folder, names, stored=None, **more):
    tensors = llama_tensors(**(stored or {}))
    tensors |= {name.format(ATTENTION): np.ones(1, BF16) for name in names}
    scheme = {"num_bits": 8, "type": "float"}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme} | more
    return inspect(write(folder, tensors, llama(quantization)))


@pytest.mark.parametrize(("k", "v"), K_AND_V)
def test_every_name_makes_a_quantized_cache(tmp_path, k, v):
    names = dict.fromkeys([k, v, *BESIDE])
    planned = kv_plan(tmp_path, names)
    assert planned.errors == [] and planned.warnings == [] and planned.leftover_tensors == []
    assert planned.kv_scales == {0: (k.format(ATTENTION), v.format(ATTENTION))}
    assert (planned.kv_cache.kind, planned.kv_cache.bits) == ("float", 8)


def test_scales_are_shown_with_their_projection(tmp_path):
    rows = {row.name: row.tensors for row in kv_plan(tmp_path, ["{}.k_scale", "{}.v_scale", "{}.q_scale"]).rows}
    for letter in "qkv":
        assert rows[f"{ATTENTION}.{letter}_proj"] == (
            f"{ATTENTION}.{letter}_proj.weight",
            f"{ATTENTION}.{letter}_scale",
        )


def test_scales_of_a_fused_projection_are_shown_with_it(tmp_path):
    tensors = dense(96, 64).under("h.0.self_attn.qkv_proj") | {
        name: np.ones(1, BF16) for name in ("h.0.self_attn.k_scale", "h.0.self_attn.v_scale")
    }
    planned = inspect(write(tmp_path, tensors, {}))
    [row] = planned.rows
    assert len(row.tensors) == 3 and planned.leftover_tensors == []


def codes(planned):
    return [warning.code for warning in planned.warnings]


def test_a_scheme_without_scales(tmp_path):
    planned = kv_plan(tmp_path, [])
    assert codes(planned) == ["kv-scales-missing"] and planned.kv_cache is None and planned.kv_scales == {}


def test_half_of_the_scales(tmp_path):
    planned = kv_plan(tmp_path, ["{}.k_scale"])
    assert codes(planned) == ["kv-scales-missing"] and planned.kv_cache is None and planned.leftover_tensors == []


def test_scales_without_a_scheme(tmp_path):
    planned = kv_plan(tmp_path, ["{}.k_scale", "{}.v_scale"], kv_cache_scheme=None)
    assert codes(planned) == ["kv-scales-unused"] and planned.kv_cache is None and planned.leftover_tensors == []


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 8, "type": "int"},
        {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
        {"num_bits": 4, "type": "float"},
        {"num_bits": 8, "type": "float", "symmetric": False},
        {"num_bits": 7, "type": "float"},
    ],
)
def test_a_scheme_that_no_cache_has(tmp_path, scheme):
    planned = kv_plan(tmp_path, ["{}.k_scale", "{}.v_scale"], kv_cache_scheme=scheme)
    assert "kv-scheme-unsupported" in codes(planned)
    assert planned.kv_cache is None and planned.errors == []


def test_a_cache_in_the_style_of_attention_groups(tmp_path):
    group = {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8, "type": "float"}}
    more = block(None) | {"config_groups": {"group_0": group}, "kv_cache_scheme": None}
    planned = kv_plan(tmp_path, ["{}.k_scale", "{}.v_scale"], **more)
    assert planned.kv_scales and planned.patterns_without_match == [] and planned.errors == []
