"""Folders: which files belong to a checkpoint, and what is wrong with those that don't fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from make import block, file_bytes, integers, llama, llama_tensors, safetensors_bytes, write

from fewbits.checkpoint import open_checkpoint
from fewbits.errors import CheckpointError, FewbitsError
from fewbits.load import inspect

A = {"a.weight": np.arange(4, dtype=np.float32), "b.weight": np.arange(6, dtype=np.float32)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def fails(folder: Path, code: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.code == code, caught.value
    return caught.value


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "sharded", A, {}, shards=[["a.weight"], ["b.weight"]])


def test_a_single_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, A, {"model_type": "x"}))
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert checkpoint.config.get("model_type", str) == "x"
    assert not checkpoint.header_only and not checkpoint.notices and not checkpoint.generation_config
    with checkpoint.reader() as reader:
        assert reader.read("b.weight").tolist() == [0, 1, 2, 3, 4, 5]


def test_shards_with_an_index(sharded):
    checkpoint = open_checkpoint(sharded)
    assert [path.name for path in checkpoint.paths] == [FIRST, SECOND]
    with checkpoint.reader() as reader:
        assert reader.read("a.weight").tolist() == [0, 1, 2, 3]
        assert reader.read("b.weight").tolist() == [0, 1, 2, 3, 4, 5]


def test_shards_without_an_index_are_all_taken(sharded):
    (sharded / INDEX).unlink()
    assert open_checkpoint(sharded).tensors.keys() == A.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_a_single_file_goes_before_an_index(sharded, name):
    (sharded / name).write_bytes(safetensors_bytes({"c.weight": A["a.weight"]}))
    (sharded / INDEX).write_text("not even JSON")
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["c.weight"]
    assert [path.name for path in checkpoint.paths] == [name]


def test_the_index_decides_which_files_belong(sharded):
    (sharded / "other.safetensors").write_bytes(b"no safetensors file at all")
    assert open_checkpoint(sharded).tensors.keys() == A.keys()


def test_the_index_of_mistrals_own_folders(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 4}')
    (tmp_path / "consolidated-1.safetensors").write_bytes(safetensors_bytes(A))
    weight_map = dict.fromkeys(A, "consolidated-1.safetensors")
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == A.keys()
    assert checkpoint.config.source == "params.json"


def test_config_json_goes_before_params_json(tmp_path):
    write(tmp_path, A, {"model_type": "config"})
    (tmp_path / "params.json").write_text('{"model_type": "params"}')
    assert open_checkpoint(tmp_path).config.get("model_type", str) == "config"


def test_no_folder(tmp_path):
    fails(tmp_path / "nowhere", "folder-missing")
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file", "folder-missing")
    fails(tmp_path / ("x" * 5000), "folder-missing")


def test_no_config(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(A))
    assert "config.json" in fails(tmp_path, "config-absent").what


def test_a_config_that_cant_be_read(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert fails(tmp_path, "file-unreadable").module == "config.json"


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', "{" * 5000])
@pytest.mark.parametrize("file", ["config.json", INDEX, "generation_config.json"])
def test_json_that_is_none(sharded, file, text):
    (sharded / file).write_text(text)
    assert fails(sharded, "json-invalid").module == file


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    error = fails(tmp_path, "shards-missing")
    assert ".bin" in error.hint


def test_a_missing_shard(sharded):
    (sharded / SECOND).unlink()
    assert SECOND in fails(sharded, "shards-missing").what


def test_several_missing_shards_are_counted(sharded):
    (sharded / FIRST).unlink()
    (sharded / SECOND).unlink()
    assert "(2 of 2 files)" in fails(sharded, "shards-missing").what


@pytest.mark.parametrize(
    "name",
    ["../weights.safetensors", "/weights.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "../../x"],
)
def test_an_index_that_points_out_of_the_folder(sharded, name):
    (sharded.parent / "weights.safetensors").write_bytes(safetensors_bytes(A))
    index(sharded, {"a.weight": name, "b.weight": name})
    assert fails(sharded, "index-invalid").module == INDEX


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.safetensors", "\N{SNOWMAN}.safetensors"])
def test_an_index_with_names_that_no_file_has(sharded, name):
    index(sharded, dict.fromkeys(A, name))
    fails(sharded, "shards-missing")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a.weight": 1}, {"a.weight": None}, {"a.weight": [FIRST]}])
def test_an_index_that_maps_nothing(sharded, weight_map):
    index(sharded, weight_map)
    assert fails(sharded, "index-invalid").module == INDEX


def test_an_index_that_names_a_tensor_the_file_lacks(sharded):
    index(sharded, {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND})
    assert fails(sharded, "index-invalid").module == "c.weight"


def test_an_index_that_names_the_wrong_file(sharded):
    index(sharded, {"a.weight": SECOND, "b.weight": FIRST})
    assert FIRST in fails(sharded, "index-invalid").what or SECOND in fails(sharded, "index-invalid").what


def test_an_index_that_leaves_tensors_out(sharded):
    more = {"b.weight": A["b.weight"], "z.weight": A["a.weight"], "y.weight": A["a.weight"]}
    (sharded / SECOND).write_bytes(safetensors_bytes(more))
    checkpoint = open_checkpoint(sharded)
    assert "z.weight" in checkpoint.tensors
    [notice] = checkpoint.notices
    assert notice.code == "index-incomplete" and "2 tensors" in notice.text and "y.weight" in notice.text


def test_a_tensor_in_two_shards(sharded):
    (sharded / SECOND).write_bytes(safetensors_bytes(A))
    error = fails(sharded, "tensor-twice")
    assert error.module == "a.weight" and FIRST in error.what and SECOND in error.what


def test_headers_without_data(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, A, {}, header_only=True))
    assert checkpoint.header_only and checkpoint.tensors["b.weight"].shape == (6,)


def test_shards_without_data(tmp_path):
    assert open_checkpoint(write(tmp_path, A, {}, header_only=True, shards=[["a.weight"], ["b.weight"]])).header_only


def test_a_shard_with_data_beside_one_without(sharded):
    (sharded / FIRST).write_bytes(safetensors_bytes({"a.weight": A["a.weight"]}, header_only=True))
    error = fails(sharded, "file-size")
    assert error.module == FIRST and SECOND in error.what


def test_a_shard_without_a_tensor_is_neither(sharded):
    (sharded / FIRST).write_bytes(file_bytes({}))
    (sharded / INDEX).unlink()
    assert not open_checkpoint(sharded).header_only


def test_a_text_config_goes_before_the_top_level(tmp_path):
    config = {"hidden_size": 1, "model_type": "outer", "text_config": {"model_type": "inner"}}
    opened = open_checkpoint(write(tmp_path, A, config)).config
    assert (opened.get("model_type", str), opened.get("hidden_size", int)) == ("inner", 1)


# ---- where the quantization block is found -----------------------------------------------------------------------

QUANTIZED = integers(64, 64, 4, 32, seed=3)
BLOCK = block(QUANTIZED.weights, ignore=["re:.*[kvo]_proj", "re:.*mlp", "lm_head"])
PLACES = {
    "quantization_config": {"quantization_config": BLOCK},
    "compression_config": {"compression_config": BLOCK},
    "nested compression_config": {"compression_config": {"quantization_config": BLOCK, "sparsity_config": {"a": 1}}},
    "text_config": {"text_config": {"quantization_config": BLOCK}},
    "text_config.compression_config": {"text_config": {"compression_config": BLOCK}},
    "any nest": {"thinker_config": {"quantization_config": BLOCK}},
    "underscores": {"quantization_config": BLOCK | {"quant_method": "Compressed_Tensors"}},
    "no quant_method": {"quantization_config": {key: BLOCK[key] for key in BLOCK if key != "quant_method"}},
    "the first of two": {"quantization_config": BLOCK, "compression_config": block(None)},
    "an empty one first": {"quantization_config": {}, "compression_config": BLOCK},
}


def is_found(folder: Path) -> None:
    planned = inspect(folder)
    rows = {row.name: row for row in planned.rows}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert str(row.spec) == "int4 g32 × a16"
    assert row.decided_by == "config_groups.group_0, target Linear"
    assert planned.format.name == "compressed-tensors"
    assert [notice.code for notice in (*planned.warnings, *planned.errors)] == []


@pytest.mark.parametrize("place", PLACES)
def test_places_of_the_quantization_block(tmp_path, place):
    config = llama(vision_config={}) | PLACES[place]
    if "text_config" in config:
        config["text_config"] |= llama()
    is_found(write(tmp_path, llama_tensors(q_proj=QUANTIZED), config))


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_params_json(tmp_path, key):
    folder = write(tmp_path, llama_tensors(q_proj=QUANTIZED), llama() | {key: BLOCK})
    shutil.move(folder / "config.json", folder / "params.json")
    is_found(folder)


@pytest.mark.parametrize("value", ["int4", 4, ["compressed-tensors"], True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_block_that_is_no_object(tmp_path, key, value):
    folder = write(tmp_path, llama_tensors(q_proj=QUANTIZED), llama() | {key: value})
    with pytest.raises(FewbitsError) as caught:
        inspect(folder)
    assert (caught.value.code, caught.value.source) == ("config-type", f"config.json, {key}")
