"""Every storage format at every shape of the reference's last vector: pack, write, load, decode, and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import Stored, block, dense, fp8, integers, mx, nvfp4, packed, write

from fewbits.load import decode, inspect

SHAPES = [(rows, columns) for rows in (1, 3, 8, 16, 40) for columns in (32, 64, 96, 128)]


def come_back(folder: Path, modules: dict[str, Stored], **more: Any) -> None:
    """Every module of one group, written, loaded and decoded: the formula's values."""
    tensors = {name: tensor for module, stored in modules.items() for name, tensor in stored.under(module).items()}
    weights = next(iter(modules.values())).weights
    planned = inspect(write(folder, tensors, {"quantization_config": block(weights, **more)}))
    assert planned.errors == [] and len(planned.rows) == len(modules)
    with planned.checkpoint.reader() as reader:
        for row in planned.rows:
            linear, notices = decode(planned, row, reader)
            stored = modules[row.name]
            assert notices == [] and linear.weight.shape == stored.values.shape
            ours = linear.weight.dequantize()
            if linear.weight.spec.global_scale:
                # The divisor becomes a multiplier once, in float64: its quotients may differ in the last place.
                np.testing.assert_allclose(ours, stored.values, rtol=4e-16)
                ours, expected = (values.astype(np.float32) for values in (ours, stored.values))
                np.testing.assert_array_equal(ours, expected)
            else:
                np.testing.assert_array_equal(ours, stored.values)


@pytest.mark.parametrize("group", [16, 32, None])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("form", ["packed", "padded", "plain"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_written_integers_come_back(tmp_path, bits, group, form, asymmetric):
    """Odd heights end their packed zero points inside a word."""
    options = {"asymmetric": asymmetric, "padded": form == "padded", "plain": form == "plain"}
    modules = {
        f"{rows}x{columns}.y": integers(rows, columns, bits, group, seed=rows + columns + bits, **options)
        for rows, columns in SHAPES
    }
    come_back(tmp_path, modules, version="0.15.0" if form == "padded" else "0.19.0")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_written_integers_with_a_scale_for_the_tensor_come_back(tmp_path, bits, asymmetric, plain):
    come_back(tmp_path, {
        f"{rows}x{columns}.y": integers(rows, columns, bits, None, asymmetric, tensor=True, plain=plain, seed=rows)
        for rows, columns in SHAPES
    })  # fmt: skip


@given(
    bits=st.integers(1, 8),
    group=st.integers(1, 130),
    groups=st.integers(1, 4),
    rows=st.integers(1, 20),
    asymmetric=st.booleans(),
    form=st.sampled_from(["packed", "padded", "plain"]),
)
def test_groups_of_any_size_come_back(tmp_path_factory, bits, group, groups, rows, asymmetric, form):
    """K that ends inside a word, groups that straddle words, zero points that end inside one."""
    options = {"asymmetric": asymmetric, "padded": form == "padded", "plain": form == "plain"}
    stored = integers(rows, group * groups, bits, group, seed=group + rows, **options)
    folder = tmp_path_factory.getbasetemp() / "any group"
    come_back(folder, {"x.y": stored}, version="0.15.0" if form == "padded" else "0.19.0")


FLOATS: dict[str, Callable[[int, int], Stored]] = {
    "fp8 channel": fp8,
    "fp8 blocks": lambda rows, columns: fp8(rows, columns, (3, 24)),
    "fp8 128x128": lambda rows, columns: fp8(rows, columns, (128, 128)),
    "fp8 g16": lambda rows, columns: fp8_groups(rows, columns, 16),
    "fp8 g32": lambda rows, columns: fp8_groups(rows, columns, 32),
    "nvfp4": nvfp4,
    "mxfp4": lambda rows, columns: mx(rows, columns, 4),
    "mxfp6": lambda rows, columns: mx(rows, columns, 6),
    "mxfp8": lambda rows, columns: mx(rows, columns, 8),
    "bfloat16": dense,
    "float16": lambda rows, columns: dense(rows, columns, np.float16),
    "float32": lambda rows, columns: dense(rows, columns, np.float32),
    "float64": lambda rows, columns: dense(rows, columns, np.float64),
}


def fp8_groups(rows: int, columns: int, size: int) -> Stored:
    """Groups with float scales: not MX, whatever the size."""
    stored = fp8(rows, columns, (1, size))
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": size}
    return Stored(stored.tensors, weights, stored.values)


@pytest.mark.parametrize("name", FLOATS)
def test_written_floats_come_back(tmp_path, name):
    come_back(tmp_path, {f"{rows}x{columns}.y": FLOATS[name](rows, columns) for rows, columns in SHAPES})


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_written_integers_in_any_order_of_groups_come_back(tmp_path, bits, asymmetric, plain, group):
    """weight_g_idx: every column of a random group, as many columns in each."""
    modules = {}
    for rows, columns in SHAPES:
        random = np.random.default_rng(rows * columns)
        g_idx = random.permutation(np.arange(columns) // group)
        stored = integers(rows, columns, bits, group, asymmetric, plain=plain, seed=rows)
        order = np.argsort(np.argsort(g_idx, kind="stable"), kind="stable")
        # The same codes in another order: column k of the file is place order[k] of plain groups.
        tensors = dict(stored.tensors) | {"weight_g_idx": g_idx.astype(np.int32)}
        if plain:
            tensors["weight"] = stored.tensors["weight"][:, order]
        else:
            codes = unpacked_bits(stored.tensors["weight_packed"], bits, columns)
            tensors["weight_packed"] = packed(codes[:, order], bits)
        modules[f"{rows}x{columns}.y"] = Stored(
            tensors, stored.weights | {"actorder": "group"}, stored.values[:, order]
        )
    come_back(tmp_path, modules)


def unpacked_bits(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int32 [R, W] → codes [R, columns], one bit after the other."""
    rows = []
    for row in words.view(np.uint32).tolist():
        stream = sum(word << (32 * place) for place, word in enumerate(row))
        rows.append([stream >> (bits * place) & ((1 << bits) - 1) for place in range(columns)])
    return np.array(rows)
