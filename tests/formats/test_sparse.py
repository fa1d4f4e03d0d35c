"""Sparse bitmask tensors: expanded to what they were, under either name, and refused where their parts disagree."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import BF16, E4M3, block, dense, fp8, integers, llama, llama_tensors, write

from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import CheckpointError, FewbitsError
from fewbits.formats.compressed_tensors import sparse as sparse_tensors
from fewbits.load import decode, inspect, load, load_linear
from fewbits.qweight import QLinear

PREFIXES = ["", "weight."]


def sparse(whole: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
    """As sparse-bitmask stores a matrix or a vector, one bit after the other."""
    rows = whole.reshape(-1, whole.shape[-1])
    masks, values, offsets = [], [], []
    for row in rows:
        offsets.append(len(values))
        kept = [place for place, value in enumerate(row) if float(value) != 0]
        masks.append(sum(1 << place for place in kept).to_bytes(-(-len(row) // 8), "little"))
        values += [row[place] for place in kept]
    mask = np.frombuffer(b"".join(masks), np.uint8).reshape(*whole.shape[:-1], -1)
    parts = {
        "bitmask": mask,
        "compressed": np.array(values, whole.dtype),
        "row_offsets": np.array(offsets).reshape(whole.shape[:-1]),
        "shape": np.array(whole.shape),
    }
    return {prefix + part: array for part, array in parts.items()}


def two_of_four(whole: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
    """As sparse-24-bitmask stores a matrix: the two largest of each four, zeros too."""
    rows, columns = whole.shape
    fours = np.abs(whole.astype(np.float64)).reshape(rows, -1, 4)
    kept = np.zeros(fours.shape, bool)
    np.put_along_axis(kept, np.argsort(-fours, axis=2, kind="stable")[:, :, :2], True, axis=2)
    kept = kept.reshape(rows, columns)
    masks = [sum(1 << int(place) for place in np.nonzero(row)[0]).to_bytes(columns // 8, "little") for row in kept]
    parts = {
        "bitmask": np.frombuffer(b"".join(masks), np.uint8).reshape(rows, -1),
        "compressed": np.array([row[mask] for row, mask in zip(whole, kept, strict=True)]),
        "shape": np.array([[rows], [columns]]),
    }
    return {prefix + part: array for part, array in parts.items()}


def pruned(whole: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two of four columns set to zero."""
    keys = np.random.default_rng(seed).random((whole.shape[0], whole.shape[1] // 4, 4))
    kept = keys.argsort(axis=2).argsort(axis=2) < 2
    return np.where(kept.reshape(whole.shape), whole, np.zeros((), whole.dtype))


def plan_one(folder: Path, tensors: dict[str, Any], weights: dict[str, Any] | None = None, **more: Any) -> Any:
    stored = {f"x.y.{suffix}": tensor for suffix, tensor in tensors.items()}
    return inspect(write(folder, stored, {"quantization_config": block(weights)}, **more))


def read(folder: Path, tensors: dict[str, Any], weights: dict[str, Any] | None = None) -> QLinear:
    planned = plan_one(folder, tensors, weights)
    assert planned.errors == [] and planned.leftover_tensors == []
    [row] = planned.rows
    assert row.executed_as in ("native", "reference")
    assert sorted(row.tensors) == sorted(f"x.y.{suffix}" for suffix in tensors)
    with planned.checkpoint.reader() as reader:
        linear, notices = decode(planned, row, reader)
    assert notices == []
    return linear


# ---- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_row_by_hand(tmp_path, prefix):
    """0 3 0 -1 5 0 0 2 0 0 is kept at 1, 3, 4 and 7: the bytes 9A 00, the values 3 -1 5 2."""
    parts = {
        "bitmask": np.array([[0x9A, 0x00]], np.uint8),
        "compressed": np.array([3, -1, 5, 2], np.float32),
        "row_offsets": np.array([0]),
        "shape": np.array([1, 10]),
    }
    weight = read(tmp_path, {prefix + part: array for part, array in parts.items()}).weight
    assert weight.dequantize().tolist() == [[0, 3, 0, -1, 5, 0, 0, 2, 0, 0]]
    assert str(weight.spec) == "float32"


@pytest.mark.parametrize("shape", [[1, 8], [[1], [8]]])
def test_two_of_four_by_hand(tmp_path, shape):
    """0.5 -3 0.1 2, 0 0 1 -4: the byte CA, the values -3 2 1 -4."""
    parts = {
        "bitmask": np.array([[0xCA]], np.uint8),
        "compressed": np.array([[-3, 2, 1, -4]], BF16),
        "shape": np.array(shape),
    }
    assert read(tmp_path, parts).weight.dequantize().tolist() == [[0, -3, 0, 2, 0, 0, 1, -4]]


def test_a_kept_zero_of_two_of_four(tmp_path):
    parts = two_of_four(np.array([[0, 0, 0, 5, 1, 2, 0, 0]], np.float16))
    assert parts["compressed"].tolist() == [[0, 5, 1, 2]]
    assert read(tmp_path, parts).weight.dequantize().tolist() == [[0, 0, 0, 5, 1, 2, 0, 0]]


# ---- what may be sparse --------------------------------------------------------------------------------------------

# Stored modules whose weight isn't packed, with half of their values pruned.
KINDS = {
    "bfloat16": dense(8, 64),
    "float16": dense(8, 64, np.float16),
    "float32": dense(8, 64, np.float32),
    "int8 channel": integers(8, 64, 8, plain=True),
    "int8 g16 asym": integers(8, 64, 8, 16, True, plain=True),
    "fp8 channel": fp8(8, 64),
    "fp8 blocks": fp8(8, 64, (4, 32)),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("way", [sparse, two_of_four])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_sparse_is_what_it_was(tmp_path, kind, way, prefix):
    stored = KINDS[kind]
    beside = {suffix: array for suffix, array in stored.tensors.items() if suffix != "weight"}
    whole = pruned(stored.tensors["weight"])
    weights = stored.weights
    as_dense = read(tmp_path / "dense", beside | {"weight": whole}, weights)
    as_sparse = read(tmp_path / "sparse", beside | way(whole, prefix), weights)
    assert as_sparse.spec == as_dense.spec
    assert as_sparse.weight.codes.dtype == as_dense.weight.codes.dtype
    assert as_sparse.weight.codes.tobytes() == as_dense.weight.codes.tobytes()
    np.testing.assert_array_equal(as_sparse.weight.dequantize(), as_dense.weight.dequantize())
    assert (as_sparse.weight.dequantize() == 0).sum() >= (0 if "asym" in kind else 256)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    dtype=st.sampled_from([BF16, np.float16, np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_any_mask(tmp_path_factory, rows, columns, share, dtype, seed):
    """Rows of zeros, full rows, columns that end inside a byte."""
    random = np.random.default_rng(seed)
    whole = np.where(random.random((rows, columns)) < share, random.standard_normal((rows, columns)), 0).astype(dtype)
    folder = tmp_path_factory.getbasetemp() / "mask"
    np.testing.assert_array_equal(read(folder, sparse(whole)).weight.dequantize(), whole.astype(np.float64))


@pytest.mark.parametrize("shape", [(8, 0), (0, 8), (0, 0)])
def test_nothing_at_all(tmp_path, shape):
    parts = {
        "bitmask": np.zeros((shape[0], -(-shape[1] // 8)), np.uint8),
        "compressed": np.zeros(0, BF16),
        "row_offsets": np.zeros(shape[0], np.int64),
        "shape": np.array(shape),
    }
    planned = plan_one(tmp_path, parts)
    assert planned.errors == []
    [row] = planned.rows
    with planned.checkpoint.reader() as reader:
        assert decode(planned, row, reader)[0].weight.dequantize().shape == shape


def test_every_tensor_of_a_module(tmp_path):
    """Up to 0.8 the library compressed whatever a model had, scales and biases included."""
    stored = integers(8, 64, 4, 16, True)
    tensors: dict[str, Any] = {}
    for suffix, array in (stored.tensors | {"bias": np.array([1, 0, 2, 0, 0, 3, 4, 5], np.float32)}).items():
        tensors |= sparse(array, f"{suffix}.")
    linear = read(tmp_path, tensors, stored.weights)
    np.testing.assert_array_equal(linear.weight.dequantize(), stored.values)
    assert linear.bias.tolist() == [1, 0, 2, 0, 0, 3, 4, 5]


@pytest.mark.parametrize("bias", [np.ones(7, np.float32), np.ones(8, np.int32), np.ones((8, 1), np.float32)])
def test_a_sparse_bias_that_is_none(tmp_path, bias):
    planned = plan_one(tmp_path, {"weight": dense(8, 64).tensors["weight"]} | sparse(bias, "bias."))
    [error] = planned.errors
    assert error.code == "tensors-disagree" and "bias" in error.text


def test_many_rows_are_expanded_in_several_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_tensors, "_BITS_AT_ONCE", 100)
    whole = pruned(dense(23, 32).tensors["weight"])
    np.testing.assert_array_equal(read(tmp_path, sparse(whole)).weight.dequantize(), whole.astype(np.float64))


# ---- in a model ------------------------------------------------------------------------------------------------------


def whole_model(prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The small Llama whole, and with every `.weight` sparse, its norms and its embedding too."""
    tensors = {name: pruned(tensor) if tensor.ndim == 2 else tensor for name, tensor in llama_tensors().items()}
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        parts |= {f"{module}.{suffix}": array for suffix, array in sparse(tensor, prefix).items()}
    return tensors, parts


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_is_all_sparse(tmp_path, prefix, known):
    """The block says no more than a sparsity_config, under the key of 2024."""
    tensors, parts = whole_model(prefix)
    family = {} if known else {"architectures": ["SomethingElse"], "model_type": "other"}
    config = llama(**family) | {"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}}
    planned = inspect(write(tmp_path, parts, config))
    assert planned.errors == [] and planned.leftover_tensors == [] and planned.format.name == "compressed-tensors"
    whole = inspect(write(tmp_path / "whole", tensors, llama(**family)))
    assert [(row.name, row.kind, row.shape, row.spec) for row in planned.rows] == [
        (row.name, row.kind, row.shape, row.spec) for row in whole.rows
    ]
    assert planned.parameters == whole.parameters
    [notice] = [warning for warning in planned.warnings if warning.code == "sparse-expanded"]
    assert "expanded when it is loaded" in notice.text and f"and {len(tensors) - 1} more modules" in notice.text
    if not known:
        return
    results = []
    for folder in (tmp_path, tmp_path / "whole"):
        loaded = load(folder)
        cache = KVCache(loaded.cache_layers, max_pages=8)
        results.append(loaded.decoder.forward(cache.batch([Part(0, [1, 2, 3], 3)]), cache).logits)
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("way", [sparse, two_of_four])
def test_headers_alone(tmp_path, way):
    """Without data the last axis of a mask is known to a multiple of 8; of 2:4 exactly."""
    whole = pruned(dense(8, 60).tensors["weight"])
    parts = way(np.pad(whole, ((0, 0), (0, 4))) if way is two_of_four else whole)
    planned = plan_one(tmp_path, parts, header_only=True)
    [row] = planned.rows
    assert planned.errors == [] and row.shape == (8, 64) and str(row.spec) == "bfloat16"


def test_load_linear(tmp_path):
    stored = fp8(8, 64)
    whole = pruned(stored.tensors["weight"])
    tensors = two_of_four(whole) | {"weight_scale": stored.tensors["weight_scale"]}
    config = {"quantization_config": block(stored.weights)}
    folder = write(tmp_path, {f"x.y.{suffix}": array for suffix, array in tensors.items()}, config)
    y = load_linear(folder, "x.y", allow_reference=True)(np.eye(64, dtype=np.float32))
    scale = stored.tensors["weight_scale"].astype(np.float64)
    np.testing.assert_allclose(y.T, whole.astype(np.float64) * scale, rtol=1e-6)


# ---- hostile -------------------------------------------------------------------------------------------------------

WHOLE = pruned(dense(8, 60).tensors["weight"])
GOOD = sparse(WHOLE)
GOOD_24 = two_of_four(pruned(dense(8, 64).tensors["weight"]))


def with_bits(mask: np.ndarray, row: int, byte: int, bits: int) -> np.ndarray:
    changed = mask.copy()
    changed[row, byte] |= bits
    return changed


def moved(mask: np.ndarray) -> np.ndarray:
    """A bit less in one row, one more in the next: as many as before in all."""
    changed = mask.copy()
    kept = int(changed[0, 0]) & -int(changed[0, 0])
    changed[0, 0] ^= kept
    free = ~int(changed[1, 0]) & (int(changed[1, 0]) + 1)
    changed[1, 0] |= free & 0xFF
    return changed


# From the headers alone.
PLANNED = {
    "no values": {"compressed": None},
    "no shape": {"shape": None},
    "no values, no shape": {"compressed": None, "shape": None},
    "a weight beside it": {"weight": WHOLE},
    "the same under its other name": {f"weight.{part}": array for part, array in GOOD.items()},
    "a mask that is sparse itself": {f"bitmask.{part}": array for part, array in GOOD.items()},
    "a mask of words": {"bitmask": GOOD["bitmask"].astype(np.int32)},
    "a mask of three axes": {"bitmask": GOOD["bitmask"][None]},
    "a mask without axes": {"bitmask": np.array(1, np.uint8)},
    "a mask with a row less": {"bitmask": GOOD["bitmask"][:7]},
    "a shape of floats": {"shape": np.array([8.0, 60.0])},
    "a shape of one number": {"shape": np.array([480])},
    "a shape of a million numbers": {"shape": np.zeros(1_000_000, np.int64)},
    "offsets of floats": {"row_offsets": GOOD["row_offsets"].astype(np.float32)},
    "an offset too many": {"row_offsets": np.arange(9)},
    "values of three axes": {"compressed": GOOD["compressed"].reshape(1, 1, -1)},
    "values without axes": {"compressed": np.array(1, BF16)},
    "rows of values that aren't the mask's": {"compressed": GOOD["compressed"].reshape(2, -1)},
    "2:4 values as wide as the weight": {"compressed": np.ones((8, 60), BF16)},
    "more columns than the mask": {"shape": np.array([8, 65])},
    "fewer columns than the mask": {"shape": np.array([8, 56])},
    "negative columns": {"shape": np.array([8, -60])},
    "endless columns": {"shape": np.array([8, (1 << 63) - 1])},
}


@pytest.mark.parametrize("name", PLANNED)
def test_parts_that_make_no_tensor(tmp_path, name):
    tensors = {suffix: array for suffix, array in (GOOD | PLANNED[name]).items() if array is not None}
    planned = plan_one(tmp_path, tensors)
    [error] = planned.errors
    assert (error.code, error.module) == ("sparse-invalid", "x.y") and len(error.text) < 300
    [row] = planned.rows
    assert row.executed_as == "refused" and sorted(row.tensors) == sorted(f"x.y.{suffix}" for suffix in tensors)


# Only the data shows these.
DAMAGED = {
    "rows by another count": ({"shape": np.array([7, 60])}, "shape"),
    "rows without end": ({"shape": np.array([1 << 62, 60])}, "shape"),
    "a bit more": ({"bitmask": with_bits(GOOD["bitmask"], 2, 0, 0xFF)}, "bitmask"),
    "a bit beyond the last column": ({"bitmask": with_bits(GOOD["bitmask"], 7, 7, 0xF0)}, "bitmask"),
    "bits of another row": ({"bitmask": moved(GOOD["bitmask"])}, "row_offsets"),
    "a value too few": ({"compressed": GOOD["compressed"][:-1]}, "bitmask"),
    "a value too many": ({"compressed": np.append(GOOD["compressed"], GOOD["compressed"][:1])}, "bitmask"),
    "no value": ({"compressed": GOOD["compressed"][:0]}, "bitmask"),
    "an offset less": ({"row_offsets": GOOD["row_offsets"] - np.eye(8, dtype=np.int64)[5]}, "row_offsets"),
    "negative offsets": ({"row_offsets": -GOOD["row_offsets"] - 1}, "row_offsets"),
    "endless offsets": ({"row_offsets": np.full(8, (1 << 63) - 1)}, "row_offsets"),
}
DAMAGED_24 = {
    "three of a row": ({"bitmask": with_bits(GOOD_24["bitmask"], 3, 0, 0xFF)}, "bitmask"),
    "bits of another row": ({"bitmask": moved(GOOD_24["bitmask"])}, "bitmask"),
    "another shape": ({"shape": np.array([[8], [60]])}, "shape"),
    "another count of rows": ({"shape": np.array([[4], [64]])}, "shape"),
}


@pytest.mark.parametrize(("good", "changes"), [(GOOD, DAMAGED), (GOOD_24, DAMAGED_24)], ids=["unstructured", "2:4"])
def test_parts_whose_data_disagree(tmp_path, good, changes):
    for name, (changed, named) in changes.items():
        for prefix in PREFIXES:
            tensors = {prefix + part: array for part, array in (good | changed).items()}
            folder = tmp_path / (name + prefix)
            planned = plan_one(folder, tensors)
            with pytest.raises(FewbitsError) as caught:
                load_linear(folder, "x.y")
            assert caught.value.code == "sparse-invalid", name
            if planned.errors == []:
                assert caught.value.module == f"x.y.{prefix}{named}", name


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, BF16), (np.inf, np.float16), (np.nan, E4M3)])
def test_values_that_are_no_numbers(tmp_path, value, dtype):
    whole = np.array([[0, value, 1, 0, 0, 0, 0, 2]]).astype(dtype)
    tensors = sparse(whole)
    weights = None
    if dtype is E4M3:
        tensors["weight_scale"], weights = np.ones((1, 1), np.float32), fp8(8, 64).weights
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, tensors, weights)
    assert (caught.value.code, caught.value.module) == ("weight-nan", "x.y.weight")


def test_memory_is_taken_only_for_a_shape_that_the_mask_backs(tmp_path):
    """A few bytes that claim a terabyte: refused by the plan, or when the data is read, before anything is made."""
    for shape in ([1 << 20, 1 << 20], [8, 1 << 40], [1 << 40, 60]):
        folder = tmp_path / str(shape[0])
        write(folder, {f"x.y.{k}": v for k, v in (GOOD | {"shape": np.array(shape)}).items()}, llama(block(None)))
        tracemalloc.start()
        with pytest.raises(FewbitsError) as caught:
            load_linear(folder, "x.y", allow_reference=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == "sparse-invalid" and peak < 10_000_000
