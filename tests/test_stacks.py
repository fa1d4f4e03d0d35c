"""Experts stacked in one tensor: each is what it would be by itself, whatever the shapes could be mistaken for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import BF16, E4M3, Raw, block, dense, fp8, integers, mx, nvfp4, write

from fewbits.checkpoint import open_checkpoint
from fewbits.load import decode, inspect, load_linear
from fewbits.plan import LoadPlan

UP = "model.layers.0.mlp.experts.up_proj"


def row_name(expert: int, stack: str = UP) -> str:
    parent, _, projection = stack.rpartition(".")
    return f"{parent}[{expert}].{projection}"


def values(planned: LoadPlan, codes: Any = "read") -> list[np.ndarray]:
    assert planned.checkpoint is not None and planned.errors == []
    with planned.checkpoint.reader() as reader:
        return [decode(planned, row, reader, codes)[0].weight.dequantize() for row in planned.rows]


def stacked(*experts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of one stack, by their whole names; `weight_shape` stays one expert's."""
    first = experts[0]
    return {
        f"{UP}.{suffix}": first[suffix]
        if suffix == "weight_shape"
        else np.stack([expert[suffix] for expert in experts])
        for suffix in first
    }


def int8(experts: int, rows: int, columns: int, scale_shape: tuple[int, ...]) -> tuple[dict[str, Any], np.ndarray]:
    """int8 weights [E, N, K] under scales of a shape, and those scales."""
    random = np.random.default_rng(0)
    weight = random.integers(-128, 128, (experts, rows, columns)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, scale_shape).astype(np.float32)
    return {f"{UP}.weight": weight, f"{UP}.weight_scale": scale}, scale


def config(weights: Any, **more: Any) -> dict[str, Any]:
    return {"torch_dtype": "bfloat16", "quantization_config": block(weights, **more)}


PER_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
PER_TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}


@pytest.mark.parametrize(
    "make_one",
    [
        lambda seed: integers(16, 64, 4, 32, seed=seed),
        lambda seed: integers(16, 64, 4, 32, asymmetric=True, seed=seed),
        lambda seed: integers(16, 64, 3, None, seed=seed),
        lambda seed: integers(16, 64, 8, None, plain=True, seed=seed),
        lambda seed: fp8(16, 64, seed=seed),
        lambda seed: fp8(16, 64, (8, 32), seed=seed),
        lambda seed: nvfp4(16, 64, seed=seed),
        lambda seed: mx(16, 64, 4, seed=seed),
        lambda seed: mx(16, 64, 6, seed=seed),
        lambda seed: dense(16, 64, seed=seed),
    ],
    ids=["int4", "uint4", "int3", "int8", "fp8", "fp8 block", "nvfp4", "mxfp4", "mxfp6", "bf16"],
)
@pytest.mark.parametrize("codes", ["read", "in blocks"])
def test_every_expert_of_a_stack_has_its_own_numbers(tmp_path: Path, make_one: Any, codes: str) -> None:
    experts = [make_one(seed) for seed in range(3)]
    weights = experts[0].weights
    folder = write(tmp_path, stacked(*(expert.tensors for expert in experts)), config(weights) if weights else {})
    planned = inspect(folder)
    assert [row.name for row in planned.rows] == [row_name(expert) for expert in range(3)]
    assert {row.executed_as for row in planned.rows} == {"native"}
    if codes == "read":
        for expert, found in zip(experts, values(planned), strict=True):
            np.testing.assert_allclose(found, expert.values, rtol=1e-15)
        return
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    for number, expert in enumerate(experts):
        y = load_linear(folder, row_name(number))(x)
        assert np.abs(y - x @ expert.values.T).max() < 0.02 * np.abs(y).max()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1)])
def test_a_scale_for_each_row_of_each_expert(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """E = N = 4: broadcast along the wrong axis, [E, N] would fit too, and give garbage."""
    tensors, scale = int8(4, 4, 32, shape)
    found = values(inspect(write(tmp_path, tensors, config(PER_CHANNEL))))
    weight = tensors[f"{UP}.weight"].astype(np.float64)
    np.testing.assert_array_equal(np.stack(found), weight * scale.reshape(4, 4, 1))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (4, 1, 1)])
def test_a_scale_for_each_expert_or_one_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors, scale = int8(4, 4, 32, shape)
    found = values(inspect(write(tmp_path, tensors, config(PER_TENSOR))))
    weight = tensors[f"{UP}.weight"].astype(np.float64)
    np.testing.assert_array_equal(np.stack(found), weight * np.broadcast_to(scale.reshape(-1, 1, 1), (4, 1, 1)))


def test_a_scale_for_each_expert_is_none_for_each_row(tmp_path: Path) -> None:
    """[E] where E = N: the first axis is the experts', so that there is none left for the rows."""
    planned = inspect(write(tmp_path, int8(4, 4, 32, (4,))[0], config(PER_CHANNEL)))
    [error] = planned.errors
    assert error.code == "tensors-disagree" and error.module == UP and "weight_scale has shape []" in error.text
    assert {row.executed_as for row in planned.rows} == {"refused"} and len(planned.rows) == 4


@pytest.mark.parametrize("shape", [(5,), (5, 16), (3, 16), (16, 1), (1, 4, 16)])
def test_companions_of_another_number_of_experts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    planned = inspect(write(tmp_path, int8(4, 16, 32, shape)[0], config(PER_CHANNEL)))
    [error] = planned.errors
    assert error.code == "tensors-disagree" and "doesn't begin with the 4 experts of [4, 16, 32]" in error.text
    assert {tensor for row in planned.rows for tensor in row.tensors} == {f"{UP}.weight", f"{UP}.weight_scale"}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.array([0.5, 0.25, 2.0], np.float32), [0.5, 0.25, 2.0]),
        (np.array([[0.5], [0.25], [2.0]], np.float32), [0.5, 0.25, 2.0]),
        (np.array([0.5], np.float32), [0.5] * 3),
        (np.array(0.5, np.float32), [0.5] * 3),
    ],
    ids=["[E]", "[E, 1]", "[1]", "[]"],
)
def test_every_expert_has_its_own_static_input_scale(tmp_path: Path, stored: np.ndarray, expected: list[float]) -> None:
    """Never the largest of them."""
    weight = np.random.default_rng(0).standard_normal((3, 16, 32)).astype(E4M3)
    tensors = {f"{UP}.weight": weight, f"{UP}.weight_scale": np.full(3, 0.1, np.float32), f"{UP}.input_scale": stored}
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    planned = inspect(write(tmp_path, tensors, config(scheme, inputs=scheme | {"dynamic": False})))
    assert planned.checkpoint is not None and planned.errors == []
    with planned.checkpoint.reader() as reader:
        linears = [decode(planned, row, reader)[0] for row in planned.rows]
    assert [linear.input_scale for linear in linears] == expected


@pytest.mark.parametrize("experts", [2, 3])
def test_the_shape_of_an_expert_has_no_axis_of_experts(tmp_path: Path, experts: int) -> None:
    """weight_shape, [2] or [3] numbers, may be as long as there are experts."""
    made = [integers(16, 64, 4, 32, seed=seed) for seed in range(experts)]
    tensors = stacked(*(one.tensors for one in made))
    if experts == 3:
        tensors[f"{UP}.weight_shape"] = np.array([3, 16, 64])
    found = values(inspect(write(tmp_path, tensors, config(made[0].weights))))
    np.testing.assert_array_equal(np.stack(found), np.stack([one.values for one in made]))


def test_tensors_that_are_called_like_the_module(tmp_path: Path) -> None:
    """As transformers 5 keeps them; in a family that knows experts, and in none."""
    weight = np.random.default_rng(0).standard_normal((3, 32, 16)).astype(BF16)
    planned = inspect(write(tmp_path, {"h.0.experts.gate_up_proj": weight}, {}))
    assert [row.name for row in planned.rows] == [f"h.0.experts[{e}].gate_up_proj" for e in range(3)]
    assert [row.tensors for row in planned.rows] == [("h.0.experts.gate_up_proj",)] * 3
    np.testing.assert_array_equal(np.stack(values(planned)), weight.astype(np.float64))


def test_only_one_expert_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [integers(16, 64, 8, None, plain=True, seed=seed) for seed in range(5)]
    folder = write(tmp_path, stacked(*(one.tensors for one in made)), config(made[0].weights))
    planned = inspect(folder)
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(buffer.nbytes for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with open_checkpoint(folder).reader() as reader:
        decode(planned, planned.rows[3], reader)
    assert sum(read) == 16 * 64 + 16 * 2


def test_a_fault_is_that_of_its_expert(tmp_path: Path) -> None:
    weight = np.ones((3, 4, 8), BF16)
    weight[2, 1, 5] = np.nan
    folder = write(tmp_path, {f"{UP}.weight": weight}, {})
    with pytest.raises(Exception, match=r"experts\[2\].up_proj.weight.*\[1, 5\]"):
        load_linear(folder, row_name(2))
    assert load_linear(folder, row_name(1))(np.ones((1, 8), np.float32)).tolist() == [[8.0] * 4]


def test_experts_that_end_inside_of_a_byte(tmp_path: Path) -> None:
    planned = inspect(write(tmp_path, {f"{UP}.weight": Raw("F4", (2, 1, 3), bytes(3))}, {}))
    assert "end inside of a byte" in planned.errors[0].text


def test_a_stack_of_none(tmp_path: Path) -> None:
    planned = inspect(write(tmp_path, {f"{UP}.weight": Raw("BF16", (0, 4, 8))}, {}))
    [row] = planned.rows
    assert row.executed_as == "refused" and "no experts" in row.reason and row.tensors == (f"{UP}.weight",)


def test_memory_and_parameters_are_those_of_all_experts(tmp_path: Path) -> None:
    made = [integers(64, 128, 8, None, plain=True, seed=seed) for seed in range(5)]
    one = inspect(write(tmp_path / "one", made[0].under("h.experts.0.up"), config(made[0].weights)))
    stack = {name.replace(UP, "h.experts.up"): array for name, array in stacked(*(m.tensors for m in made)).items()}
    all_five = inspect(write(tmp_path / "five", stack, config(made[0].weights)))
    assert all_five.parameters == 5 * 64 * 128 and one.parameters == 64 * 128
    assert all_five.weight_bytes() == 5 * one.weight_bytes() and all_five.nbytes == 5 * (one.nbytes or 0)


def test_a_zero_point_for_each_row_of_each_expert(tmp_path: Path) -> None:
    """[E, N] beside scales [E, N], as one number a row is stored by some."""
    tensors, scale = int8(3, 16, 64, (3, 16))
    zero = np.random.default_rng(1).integers(-20, 20, (3, 16)).astype(np.int8)
    tensors[f"{UP}.weight_zero_point"] = zero
    weights = PER_CHANNEL | {"symmetric": False}
    found = values(inspect(write(tmp_path, tensors, config(weights))))
    expected = (tensors[f"{UP}.weight"] - zero[..., np.newaxis].astype(np.float64)) * scale[..., np.newaxis]
    assert np.array_equal(np.stack(found), expected)
