"""The bound of a kernel's rounding is no wider than it must be: what isn't rounding is beyond it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_weights import CHANNEL, GROUP, WEIGHTS, exact_and_bound, integers, random_linear, random_weight

from fewbits.kernels.arithmetic import Arithmetic
from fewbits.kernels.cpu import linear as cpu
from fewbits.kernels.reference import linear as reference
from fewbits.kernels.reference.bound import product_parts, row_parts
from fewbits.kernels.reference.linear import linear_exact
from fewbits.kernels.reference.probes import probes
from fewbits.qweight import QLinear
from fewbits.spec import ActSpec


@pytest.mark.parametrize("kernel", [cpu, reference], ids=lambda module: module.__name__)
@pytest.mark.parametrize("spec", [integers(4, GROUP, True), integers(8, CHANNEL), integers(4, CHANNEL)], ids=str)
def test_one_wrong_code_shows_on_the_probes(kernel, spec):
    layer = random_linear(spec, (40, 520))
    _, x = probes(520)
    exact, bound = exact_and_bound(kernel, layer, x)
    for row, column in ((0, 0), (17, 201), (39, 259)):
        codes = layer.weight.codes.copy()
        codes[row, column] ^= 1  # the smallest change there is
        wrong = linear_exact(replace(layer, weight=replace(layer.weight, codes=codes)), x)
        assert (np.abs(wrong - exact) > bound).any(axis=0).tolist() == [n == row for n in range(40)]


def test_only_unquantized_inputs_may_be_rounded():
    labels, x = probes(64)

    def bounds(act, dot):
        layer = random_linear(WEIGHTS["int8-channel"], (8, 64), act)
        [part] = product_parts(layer, x, Arithmetic(64, dot))
        return part.bound

    act = ActSpec("int", 8, "token", True)
    random = 1
    signs = next(i for i, label in enumerate(labels) if label.startswith("signs in"))
    for dot, exact, least in (("bf16", 3, 100), ("int16", signs, 1.5)):
        np.testing.assert_array_equal(bounds(act, dot), bounds(act, "f32"))
        assert (bounds(None, dot)[random] > least * bounds(None, "f32")[random]).all()
        np.testing.assert_allclose(bounds(None, dot)[exact], bounds(None, "f32")[exact], rtol=1e-2)


def test_a_large_weight_comes_in_parts_that_know_their_norms(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK", 640)
    weight = random_weight(WEIGHTS["float32"], (50, 64))
    weight.codes[7] = 0
    weight.codes[30, 5] = np.nan
    ids = np.array([49, 0, 7, 49])
    parts = list(row_parts(QLinear(weight), ids, reference.arithmetic(QLinear(weight).spec, weight.shape)))
    assert len(parts) == 5
    norms = np.concatenate([part.norms for _, part in parts])
    np.testing.assert_allclose(norms, np.linalg.norm(weight.codes.astype(np.float64), axis=1))
    assert norms[7] == 0 and np.isnan(norms[30])
    for found, part in parts:
        np.testing.assert_array_equal(part.exact, weight.codes[ids[found]])
    assert sorted(np.concatenate([found for found, _ in parts])) == [0, 1, 2, 3]


@pytest.mark.parametrize("K", [1, 2, 7, 15, 64, 1100])
def test_probes_are_the_same_every_time_and_see_every_column(K):
    labels, x = probes(K)
    assert x.dtype == np.float32 and x.shape == (len(labels), K) and len(x) % 2 == 1
    assert len(set(labels)) == len(labels) and np.isfinite(x).all()
    np.testing.assert_array_equal(x, probes(K)[1])
    windows = x[[label.startswith("signs in") for label in labels]]
    np.testing.assert_array_equal(np.abs(windows).sum(axis=0), 1)
