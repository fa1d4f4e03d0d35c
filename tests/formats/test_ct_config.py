"""The quantization_config of compressed-tensors: every key, its default, its contradictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from make import block, integers, llama, llama_tensors, write

from fewbits.checkpoint.config import Config
from fewbits.errors import FewbitsError
from fewbits.formats.compressed_tensors.config import PRESETS, QuantConfig, Scheme, act_spec, parse, weight_spec
from fewbits.load import inspect, load, load_linear


def config(data: dict[str, Any]) -> Config:
    return Config(data, "config.json", "quantization_config")


def weights(**keys: Any) -> str:
    return str(weight_spec(config(keys)))


def act(**keys: Any) -> str:
    return str(act_spec(config(keys)))


def parsed(**keys: Any) -> QuantConfig:
    return parse(config(keys))


def one_group(**keys: Any) -> Scheme:
    [scheme] = parsed(config_groups={"group_0": {"targets": ["Linear"], **keys}}).schemes
    return scheme


# ---- QuantizationArgs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "spec"),
    [
        ({}, "int8 tensor"),
        (
            dict.fromkeys(["num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"]),
            "int8 tensor",
        ),
        ({"num_bits": 4, "group_size": 128}, "int4 g128"),
        ({"num_bits": 4, "group_size": -1}, "int4 channel"),
        ({"num_bits": 4, "group_size": -1, "strategy": "channel"}, "int4 channel"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "uint4 g32 asym"),
        ({"num_bits": 3, "type": "INT", "strategy": "Channel"}, "int3 channel"),
        ({"type": "float"}, "fp8 tensor"),
        ({"type": "Float", "strategy": "channel"}, "fp8 channel"),
        ({"type": "float", "strategy": "block", "block_structure": [128, 64]}, "fp8 128x64"),
        ({"type": "float", "strategy": "block", "block_structure": "128x64"}, "fp8 128x64"),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "fp4 g16+global"),
        ({"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}, "fp4 g32 e8m0"),
        ({"num_bits": 6, "type": "float", "group_size": 32, "scale_dtype": "uint8"}, "fp6 g32 e8m0"),
        ({"num_bits": 4, "group_size": 32, "actorder": "group"}, "int4 g32 act-order"),
        ({"num_bits": 4, "group_size": 32, "actorder": "dynamic"}, "int4 g32 act-order"),
        ({"num_bits": 4, "group_size": 32, "actorder": True}, "int4 g32 act-order"),
        ({"num_bits": 4, "group_size": 32, "actorder": "weight"}, "int4 g32"),
        ({"num_bits": 4, "group_size": 32, "actorder": "static"}, "int4 g32"),
        ({"num_bits": 4, "group_size": 32, "actorder": False}, "int4 g32"),
        ({"num_bits": 8, "strategy": "channel", "actorder": "static"}, "int8 channel"),
        (
            {"type": "float", "strategy": "block", "block_structure": [128, 128], "actorder": "weight"},
            "fp8 128x128",
        ),
        ({"observer": None, "observer_kwargs": {"a": 1}, "zp_dtype": "torch.int8"}, "int8 tensor"),
        *[({"num_bits": bits, "strategy": "channel"}, f"int{bits} channel") for bits in range(1, 9)],
    ],
    ids=str,
)
def test_weights(keys, spec):
    assert weights(**keys) == spec


@pytest.mark.parametrize(
    ("keys", "spec"),
    [
        ({}, "int8 tensor static"),
        ({"strategy": "token", "dynamic": True}, "int8 token dynamic"),
        ({"strategy": "token", "dynamic": True, "symmetric": False}, "int8 token dynamic asym"),
        ({"strategy": "tensor", "dynamic": True}, "int8 tensor dynamic"),
        ({"symmetric": False}, "int8 tensor static asym"),
        ({"num_bits": 4, "strategy": "token", "dynamic": True}, "int4 token dynamic"),
        ({"type": "float"}, "fp8 tensor static"),
        ({"type": "float", "group_size": 128, "dynamic": True}, "fp8 g128 dynamic"),
        ({"type": "float", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"}, "fp8 g32 e8m0 dynamic"),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            "fp4 local",
        ),
        ({"strategy": "attn_head", "type": "float"}, "fp8 head static"),
    ],
    ids=str,
)
def test_activations(keys, spec):
    assert act(**keys) == spec


CONTRADICTIONS = {
    "group_size": [{"group_size": 0}, {"group_size": -2}],
    "strategy": [
        {"strategy": "group"},
        {"strategy": "group", "group_size": -1},
        {"strategy": "tensor_group"},
        {"strategy": "channel", "group_size": 128},
        {"strategy": "tensor", "group_size": 128},
    ],
    "block_structure": [
        {"strategy": "block"},
        {"strategy": "block", "block_structure": [128]},
        {"strategy": "block", "block_structure": [128, 0]},
        {"strategy": "block", "block_structure": [128, True]},
        {"strategy": "block", "block_structure": "128"},
        {"strategy": "block", "block_structure": "128x-1"},
        {"strategy": "block", "block_structure": "9" * 5000 + "x1"},
        {"strategy": "channel", "block_structure": [128, 128]},
    ],
    "dynamic": [{"dynamic": True, "strategy": "channel"}, {"dynamic": "local"}],
}


@pytest.mark.parametrize(("key", "keys"), [(key, keys) for key in CONTRADICTIONS for keys in CONTRADICTIONS[key]])
def test_weights_that_contradict_themselves(key, keys):
    with pytest.raises(FewbitsError) as caught:
        weights(**keys)
    assert caught.value.code == "scheme-contradiction"
    assert caught.value.source == f"config.json, quantization_config.{key}"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "token"},
        {"strategy": "token", "dynamic": False},
        {"strategy": "tensor", "dynamic": "local"},
        {"strategy": "token", "dynamic": "local"},
        {"strategy": "tensor_group", "group_size": 16, "num_bits": 4, "type": "float", "dynamic": True},
        {"strategy": "tensor_group", "group_size": 16, "num_bits": 4, "type": "float"},
        {"strategy": "token", "dynamic": True, "group_size": 128},
    ],
    ids=str,
)
def test_activations_that_contradict_themselves(keys):
    with pytest.raises(FewbitsError) as caught:
        act(**keys)
    assert caught.value.code == "scheme-contradiction"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"num_bits": 9}, "num_bits"),
        ({"num_bits": 0}, "num_bits"),
        ({"num_bits": -4}, "num_bits"),
        ({"num_bits": 5, "type": "float"}, "num_bits"),
        ({"num_bits": 16, "type": "float"}, "num_bits"),
        ({"type": "nf"}, "type"),
        ({"strategy": "column"}, "strategy"),
    ],
)
@pytest.mark.parametrize("read", [weight_spec, act_spec])
def test_numbers_without_a_definition(read, keys, key):
    with pytest.raises(FewbitsError) as caught:
        read(config(keys))
    assert (caught.value.code, caught.value.source) == ("scheme-unknown", f"config.json, quantization_config.{key}")


@pytest.mark.parametrize(
    "keys", [{"strategy": "token"}, {"strategy": "attn_head"}, {"type": "float", "symmetric": False}]
)
def test_weights_without_a_definition(keys):
    with pytest.raises(FewbitsError) as caught:
        weights(**keys)
    assert caught.value.code == "scheme-unknown"


@pytest.mark.parametrize(
    "keys",
    [
        {"num_bits": "4"},
        {"num_bits": True},
        {"num_bits": 4.0},
        {"type": 1},
        {"symmetric": "yes"},
        {"strategy": ["group"]},
        {"group_size": "128"},
        {"dynamic": 0},
        {"dynamic": 1},
        {"dynamic": "yes"},
        {"dynamic": []},
        {"scale_dtype": 8},
    ],
    ids=str,
)
def test_values_of_the_wrong_type(keys):
    for read in (weight_spec, act_spec):
        with pytest.raises(FewbitsError) as caught:
            read(config({"strategy": "tensor", **keys} if "strategy" not in keys else keys))
        assert caught.value.code == "config-type"


# ---- groups ------------------------------------------------------------------------------------------------------


def test_a_group():
    scheme = one_group(
        weights={"num_bits": 4, "group_size": 32}, input_activations={"strategy": "token", "dynamic": True}
    )
    assert (scheme.name, scheme.targets, str(scheme.spec)) == (
        "config_groups.group_0",
        ("Linear",),
        "int4 g32 × int8 token dynamic",
    )
    assert scheme.problem is None


def test_a_group_without_weights_quantizes_none():
    assert one_group(weights=None).spec is None
    scheme = one_group(input_activations={"type": "float"})
    assert scheme.spec is None and str(scheme.inputs) == "fp8 tensor static" and scheme.problem is None


@pytest.mark.parametrize("key", ["weights", "input_activations", "output_activations"])
def test_an_empty_object_has_every_default(key):
    """As the owner's library reads it: int8, one scale for the tensor, static. Not the same as null."""
    scheme = one_group(**{"weights": {"num_bits": 4, "group_size": 32}, key: {}})
    assert scheme.problem is None
    assert (
        str(scheme.spec)
        == {
            "weights": "int8 tensor × a16",
            "input_activations": "int4 g32 × int8 tensor static",
            "output_activations": "int4 g32 × a16",
        }[key]
    )
    assert (str(scheme.outputs) == "int8 tensor static") == (key == "output_activations")
    null = one_group(**{"weights": {"num_bits": 4, "group_size": 32}, key: None})
    assert (null.spec is None) == (key == "weights") and null.inputs is None and null.outputs is None


def test_an_empty_object_is_read():
    data = {"config_groups": {"a": {"targets": ["Linear"], "weights": {}}}, "kv_cache_scheme": {}}
    block = parse(config(data))
    assert str(block.kv_cache) == "int8 tensor static" and list(block.config.leftovers()) == []


def test_weights_of_defaults_in_a_file(tmp_path):
    stored = integers(64, 64, 8, tensor=True, plain=True)
    plan = inspect(write(tmp_path, llama_tensors(q_proj=stored), llama(block({}, ["re:.*q_proj"]))))
    assert plan.errors == [] and {str(row.spec) for row in plan.rows if row.name.endswith("q_proj")} == {
        "int8 tensor × a16"
    }


DIALECTS = [[4, 3], (8,), {"weights": 4}, "(4, 3)", "e4m3", "nvfp4", "4,3", []]


@pytest.mark.parametrize("bits", DIALECTS, ids=str)
@pytest.mark.parametrize("part", ["weights", "input_activations"])
def test_other_tools_num_bits_are_refused_by_name(tmp_path, bits, part):
    bits = list(bits) if isinstance(bits, tuple) else bits
    stored = integers(64, 64, 4, 32)
    arguments = {"weights": stored.weights} | {part: {"num_bits": bits, "type": "float"}}
    quantization = block(None) | {"config_groups": {"group_0": {"targets": ["re:.*q_proj"], **arguments}}}
    plan = inspect(write(tmp_path, llama_tensors(q_proj=stored), llama(quantization)))
    [error] = plan.errors
    assert error.code == "scheme-dialect" and error.module.endswith("q_proj")
    assert f"num_bits is {bits!r}" in error.text and f"group_0.{part}.num_bits" in error.text


@pytest.mark.parametrize("named", [{"quant_method": "modelopt"}, {"quant_algo": "NVFP4"}, {"quant_algo": "FP8"}])
def test_groups_of_another_tool_are_refused_by_its_name(tmp_path, named):
    """ModelOpt's config_groups look alike and mean something else: static inputs, scales that multiply."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}}
    plan = inspect(write(tmp_path, llama_tensors(), llama({"config_groups": {"group_0": group}, **named})))
    [error] = plan.errors
    assert error.code == "format-unknown" and next(iter(named.values())) in error.text


def test_a_block_without_a_name_is_this_format():
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
    for data in ({"config_groups": {"a": group}}, {"sparsity_config": {"format": "sparse-bitmask"}}):
        assert parse(config(data)).config is not None


FOURS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


@pytest.mark.parametrize(
    ("group", "code"),
    [
        ({"weights": {"num_bits": 9}}, "scheme-unknown"),
        ({"weights": {"type": "nf"}}, "scheme-unknown"),
        ({"weights": {"num_bits": "4"}}, "config-type"),
        ({"weights": "W4A16"}, "config-type"),
        ({"weights": {"num_bits": 8}, "input_activations": {"strategy": "token"}}, "scheme-contradiction"),
        ({"weights": FOURS, "input_activations": {"strategy": "token", "dynamic": True}}, "scheme-contradiction"),
        ({"weights": {"num_bits": 8}, "input_activations": FOURS | {"dynamic": "local"}}, "scheme-contradiction"),
        ({"weights": {"num_bits": 8}, "format": "interleaved-quantized"}, "format-unknown"),
        ({"weights": {"num_bits": 8}, "format": 3}, "config-type"),
    ],
    ids=str,
)
def test_a_bad_group_is_a_problem_of_its_own(group, code):
    good = {"targets": ["re:.*q_proj"], "weights": {"num_bits": 4, "group_size": 32}}
    both = parsed(config_groups={"group_0": {"targets": ["Linear"], **group}, "group_1": good}).schemes
    assert both[0].problem is not None and both[0].problem[0] == code and both[0].spec is None
    assert both[0].targets == ("Linear",)
    assert both[1].problem is None and str(both[1].spec) == "int4 g32 × a16"


def test_the_format_of_all_groups_counts_where_a_group_has_none():
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    assert parsed(format="my-own", config_groups={"a": group}).schemes[0].problem[0] == "format-unknown"
    own = group | {"format": "int-quantized"}
    assert parsed(format="my-own", config_groups={"a": own}).schemes[0].problem is None
    assert parsed(format="mixed-precision", config_groups={"a": group}).schemes[0].problem is None


def test_only_modules_of_the_bad_group_are_refused(tmp_path):
    stored = {"q_proj": integers(64, 64, 4, 32, seed=1), "k_proj": integers(32, 64, 4, 32, seed=2)}
    groups = {
        "group_0": {"targets": ["re:.*q_proj"], "weights": stored["q_proj"].weights},
        "group_1": {"targets": ["re:.*k_proj"], "weights": {"num_bits": 4, "type": "nf", "group_size": 32}},
    }
    quantization = block(None) | {"config_groups": groups}
    plan = inspect(write(tmp_path, llama_tensors(**stored), llama(quantization)))
    rows = {row.name.rpartition(".")[2]: row for row in plan.rows}
    assert (rows["q_proj"].executed_as, str(rows["q_proj"].spec)) == ("native", "int4 g32 × a16")
    assert rows["k_proj"].executed_as == "refused" and "'nf'" in rows["k_proj"].reason
    assert [(error.code, error.module) for error in plan.errors] == [
        ("scheme-unknown", "model.layers.0.self_attn.k_proj")
    ]


@pytest.mark.parametrize(
    "keys",
    [
        {"config_groups": []},
        {"config_groups": {"a": {}}},
        {"config_groups": {"a": None}},
        {"config_groups": {"a": "W4A16"}},
        {"config_groups": {"a": {"targets": "Linear"}}},
        {"config_groups": {"a": {"targets": [1]}}},
        {"ignore": "lm_head"},
        {"ignore": [None]},
        {"version": 3},
        {"format": ["x"]},
        {"transform_config": []},
        {"kv_cache_scheme": "fp8"},
    ],
    ids=str,
)
def test_a_block_of_the_wrong_shape(keys):
    with pytest.raises(FewbitsError) as caught:
        parsed(**keys)
    assert caught.value.code == "config-type"


def test_an_empty_block():
    empty = parsed()
    assert (empty.schemes, empty.ignore, empty.kv_cache, empty.version) == ([], [], None, (0,))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.19.0", (0, 19, 0)),
        ("0.13.1.a20260112", (0, 13, 1)),
        ("0.9.4", (0, 9, 4)),
        ("", (0,)),
        ("unknown", (0,)),
        ("9" * 5000, (999999,)),
    ],
)
def test_versions(text, version):
    assert parsed(version=text).version == version


# ---- presets ---------------------------------------------------------------------------------------------------------

TABLE = {
    "W8A8": ("int8 channel", "int8 token dynamic"),
    "INT8": ("int8 channel", "int8 token dynamic"),
    **{f"W{bits}A16": (f"int{bits} g128", "a16") for bits in range(2, 9)},
    "W4A16_ASYM": ("uint4 g128 asym", "a16"),
    **{f"W{bits}A8": (f"int{bits} g128", "int8 token dynamic") for bits in range(2, 8)},
    **{f"W{bits}A4": (f"int{bits} g128", "int4 token dynamic") for bits in range(2, 5)},
    "W4AFP8": ("int4 g128", "fp8 token dynamic"),
    "FP8": ("fp8 tensor", "fp8 tensor static"),
    "FP8_DYNAMIC": ("fp8 channel", "fp8 token dynamic"),
    "FP8_BLOCK": ("fp8 128x128", "fp8 g128 dynamic"),
    "NVFP4A16": ("fp4 g16+global", "a16"),
    "NVFP4": ("fp4 g16+global", "fp4 local"),
    "MXFP4A16": ("fp4 g32 e8m0", "a16"),
    "MXFP4": ("fp4 g32 e8m0", "fp4 g32 e8m0 dynamic"),
    "MXFP4XFP8": ("fp4 g32 e8m0", "fp8 g128 dynamic"),
    "MXFP6A16": ("fp6 g32 e8m0", "a16"),
    "MXFP6A8": ("fp6 g32 e8m0", "fp8 g32 e8m0 dynamic"),
    "MXFP8A16": ("fp8 g32 e8m0", "a16"),
    "MXFP8": ("fp8 g32 e8m0", "fp8 g32 e8m0 dynamic"),
}


def test_the_table_of_presets_is_whole():
    assert PRESETS.keys() == TABLE.keys() | {"UNQUANTIZED"}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("spelled", [str.upper, str.lower])
def test_presets(name, spelled):
    [scheme] = parsed(config_groups={spelled(name): ["re:.*q_proj", "lm_head"]}).schemes
    assert scheme.targets == ("re:.*q_proj", "lm_head") and scheme.problem is None
    assert str(scheme.spec) == " × ".join(TABLE[name])


def test_the_preset_that_quantizes_nothing():
    [scheme] = parsed(config_groups={"UNQUANTIZED": ["Linear"]}).schemes
    assert scheme.spec is None and scheme.problem is None and scheme.targets == ("Linear",)


def test_an_unknown_preset_concerns_its_targets_only():
    both = parsed(config_groups={"W4A17": ["Linear"], "W4A16": ["lm_head"]}).schemes
    assert both[0].problem == ("scheme-unknown", "'W4A17' is not a preset's name") and both[0].targets == ("Linear",)
    assert str(both[1].spec) == "int4 g128 × a16"


def test_a_preset_whose_targets_are_no_strings():
    with pytest.raises(FewbitsError) as caught:
        parsed(config_groups={"W4A16": [1]})
    assert caught.value.code == "config-type"


# ---- unread keys -----------------------------------------------------------------------------------------------------

FULL = {
    "quant_method": "compressed-tensors",
    "version": "0.19.0",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": 1.5,
    "sparsity_config": {"format": "dense"},
    "moe_sparsity_config": {"method": "prune"},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "observer": "minmax"},
    "transform_config": {},
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "block_structure": None,
                "dynamic": False,
                "actorder": "static",
                "scale_dtype": None,
                "zp_dtype": "torch.int8",
                "observer": "mse",
                "observer_kwargs": {"a": 1},
            },
            "input_activations": {"strategy": "token", "dynamic": True, "observer": None},
            "output_activations": None,
        }
    },
}


def leftovers(data: dict[str, Any]) -> list[str]:
    return sorted(parse(config(data)).config.leftovers())


def test_every_key_of_the_schema_is_read():
    assert leftovers(FULL) == []


PLACES = {
    "quantization_config": (),
    "quantization_config.config_groups.group_0": ("config_groups", "group_0"),
    "quantization_config.config_groups.group_0.weights": ("config_groups", "group_0", "weights"),
    "quantization_config.config_groups.group_0.input_activations": ("config_groups", "group_0", "input_activations"),
    "quantization_config.kv_cache_scheme": ("kv_cache_scheme",),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("value", "left"), [("x", True), (0, True), (False, True), (None, False), ({}, False)])
def test_an_unknown_key_is_left_where_it_carries_a_value(place, value, left):
    import copy

    data = copy.deepcopy(FULL)
    at = data
    for key in PLACES[place]:
        at = at[key]
    at["unheard_of"] = value
    assert leftovers(data) == ([f"{place}.unheard_of"] if left else [])


# ---- KV cache, transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "spec"),
    [
        ({"num_bits": 8, "type": "float"}, "fp8 tensor static"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "fp8 head static"),
        ({"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}, "int8 token dynamic"),
        (None, "None"),
    ],
)
def test_kv_cache(scheme, spec):
    assert str(parsed(kv_cache_scheme=scheme).kv_cache) == spec


def test_a_kv_scheme_that_makes_no_sense_is_no_error():
    """The cache stays float then, with a warning: weights are as readable as ever."""
    odd = parsed(kv_cache_scheme={"num_bits": 3, "type": "float"})
    assert odd.kv_cache is None and "3 bits" in odd.kv_problem


def test_a_kv_scheme_as_a_group_on_attention():
    group = {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8, "type": "float"}}
    assert str(parsed(config_groups={"group_0": group}).kv_cache) == "fp8 tensor static"


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache", "somewhere", None, 3, ["input"]])
def test_transforms_at_run_time(location):
    groups = {"v": {"type": "hadamard", "apply": [{"location": "weight_input"}, {"location": location}]}}
    found = parsed(transform_config={"config_groups": groups}).online_transforms
    assert len(found) == 1 and found[0].startswith("v at ") and str(location) in found[0]


@pytest.mark.parametrize("group", [3, "hadamard", {"apply": "input"}, {"apply": [3]}, {"apply": {"location": "input"}}])
def test_transforms_that_cant_be_read(group):
    assert len(parsed(transform_config={"config_groups": {"u": group}}).online_transforms) == 1


@pytest.mark.parametrize("transforms", [{}, None, {"config_groups": {}}])
def test_no_transforms(transforms):
    assert parsed(transform_config=transforms).online_transforms == []


def transforms_of(folder, location):
    applied = [{"targets": ["re:.*q_proj"], "location": "weight_input"}, {"targets": ["Linear"], "location": location}]
    stored = integers(64, 64, 4, 32)
    quantization = block(stored.weights, ["re:.*q_proj"])
    quantization["transform_config"] = {"config_groups": {"R4": {"type": "hadamard", "apply": applied}}}
    return write(folder, llama_tensors(q_proj=stored), llama(quantization)), stored


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache"])
def test_a_model_that_is_rotated_at_run_time_is_refused_by_name(tmp_path, location):
    folder, _ = transforms_of(tmp_path, location)
    planned = inspect(folder)
    [error] = planned.errors
    assert error.code == "transform-online" and error.text.startswith(f"R4 at {location}")
    for run in (lambda: load(folder, allow_reference=True), lambda: load_linear(folder, "lm_head")):
        with pytest.raises(FewbitsError) as caught:
            run()
        assert caught.value.code == "transform-online"


@pytest.mark.parametrize("location", ["weight_input", "weight_output"])
def test_a_model_that_was_rotated_before_runs(tmp_path, location):
    """The stored weights are the rotated ones: nothing is done to them."""
    folder, stored = transforms_of(tmp_path, location)
    assert inspect(folder).errors == []
    load(folder)
    y = load_linear(folder, "model.layers.0.self_attn.q_proj")(np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(y.T, stored.values, rtol=1e-5)


def test_offline_transforms_are_in_the_weights_already():
    applied = [{"location": "weight_input", "targets": "Linear"}, {"location": "weight_output", "inverse": True}]
    data = {"transform_config": {"config_groups": {"u": {"type": "random-hadamard", "apply": applied}}}}
    assert parsed(**data).online_transforms == [] and leftovers(data) == []
