"""Fused projections over several kernels, and what the layers may know."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from fewbits.kernels import KERNELS, choose
from fewbits.nn.embedding import Embedding, Head
from fewbits.nn.linear import Linear
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import WeightSpec, dense


def values(N, K, seed):
    return np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)


def param(weight, allow_reference=False):
    kernel = choose("linear", QLinear(weight).spec, weight.shape, allow_reference).kernel
    return kernel, kernel.pack(QLinear(weight))


def native(N, seed=0):
    return param(QWeight(dense("float32"), (N, 24), values(N, 24, seed)))


def reference(N, seed=0):
    random = np.random.default_rng(seed)
    spec = WeightSpec("int", 3, (1, 0), "float32")
    weight = QWeight(spec, (N, 24), random.integers(0, 8, (N, 24), np.uint8), np.full((N, 1), 0.1, np.float32))
    return param(weight, allow_reference=True)


def test_one_kernel_is_one_call():
    kernel, packed = native(5)
    calls = []

    class Counting:
        def bind(self, weights):
            run = kernel.bind(weights)

            def counted(x, add_to=None):
                calls.append(len(weights))
                return run(x, add_to)

            return counted

    counting = Counting()
    Linear(*[(counting, packed)] * 3)(values(2, 24, 9))
    assert calls == [3]


@pytest.mark.parametrize("order", ["nnn", "nrn", "rrn", "nnr"])
def test_projections_of_different_kernels_keep_their_order(order):
    params = [native(4 + i, i) if kind == "n" else reference(4 + i, i) for i, kind in enumerate(order)]
    x = values(3, 24, 9)
    fused = Linear(*params)(x)
    assert [y.shape for y in fused] == [(3, 4), (3, 5), (3, 6)]
    for one, y in zip(params, fused, strict=True):
        np.testing.assert_array_equal(Linear(one)(x)[0], y)


@pytest.mark.parametrize("make", [native, reference])
def test_add_to_adds_to_the_residual(make):
    layer, x, residual = Linear(make(24)), values(3, 24, 9), values(3, 24, 10)
    expected = residual + layer(x)[0]
    layer.add_to(x, residual)
    np.testing.assert_array_equal(residual, expected)


def test_only_a_single_weight_has_a_residual():
    with pytest.raises(ValueError, match="single weight"):
        Linear(native(24), reference(24)).add_to(values(3, 24, 9), values(3, 24, 10))


def test_embedding_and_head():
    table = QWeight(dense("float32"), (7, 24), values(7, 24, 1))
    kernel = next(kernel for kernel in KERNELS if kernel.op == "embedding")
    rows = Embedding((kernel, kernel.pack(QLinear(table))))(np.array([6, 0]))
    np.testing.assert_array_equal(rows, table.codes[[6, 0]])
    logits = Head(param(table))(rows)
    np.testing.assert_allclose(logits, rows @ table.codes.T, rtol=1e-5, atol=1e-5)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ["nn", "models"])
def test_arrays_are_opaque_here(folder):
    """A second back end is a second `ops`: these folders reach for no array library and no kernel."""
    files = sorted((Path(__file__).resolve().parents[2] / "src" / "fewbits" / folder).glob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            assert name.split(".")[0] not in ("numpy", "ml_dtypes"), path
            assert not name.startswith(("fewbits.formats", "fewbits.kernels.cpu", "fewbits.kernels.reference")), path
            assert not name.startswith("fewbits._native"), path
