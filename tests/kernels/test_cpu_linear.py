"""Native products against the definition, for every kind, odd shapes and any number of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_weights import ACTS, GROUP, WEIGHTS, exact_and_bound, integers, random_input, random_linear

from fewbits import _native
from fewbits.kernels.cpu import linear
from fewbits.kernels.reference.probes import probes
from fewbits.qweight import QLinear
from fewbits.spec import QuantSpec

NATIVE = [*WEIGHTS]
WITH_ACTS = [
    "int8-channel", "uint8-channel", "uint8-tensor", "int4-g32", "uint4-g32", "uint5-g32", "fp8-channel",
    "fp8-block128", "nvfp4", "mxfp4", "mxfp8", "bfloat16", "uint8-g5", "int4-g12",
]  # fmt: skip
SHAPES = [(1, 8), (3, 40), (52, 64), (64, 96), (65, 7), (130, 33), (200, 520), (17, 1100)]


def run(layer: QLinear, x: np.ndarray) -> np.ndarray:
    (y,) = linear.bind([linear.pack(layer)])(x)
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_products_are_the_definition_within_rounding(name, shape):
    layer = random_linear(WEIGHTS[name], shape, bias=True)
    for x in (*(random_input(M, shape[1]) for M in (1, 2, 9)), probes(shape[1])[1]):
        exact, bound = exact_and_bound(linear, layer, x)
        error = np.abs(run(layer, x) - exact)
        assert (error <= bound).all(), (len(x), (error / bound).max())


@pytest.mark.parametrize("name", NATIVE)
def test_every_weight_has_a_native_kernel(name):
    assert linear.accepts(QuantSpec(WEIGHTS[name]), (96, 64)) is None


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", WITH_ACTS)
def test_products_of_quantized_inputs_are_the_definition_within_rounding(name, act):
    """The bound has no room for a code of x that differs from the reference's."""
    for shape in [(3, 40), (65, 7), (130, 520), (17, 1100)]:
        layer = random_linear(WEIGHTS[name], shape, ACTS[act], bias=True)
        for x in (*(random_input(M, shape[1]) * np.float32(3) for M in (1, 2, 9)), probes(shape[1])[1]):
            exact, bound = exact_and_bound(linear, layer, x)
            error = np.abs(run(layer, x) - exact)
            assert (error <= bound).all(), (shape, len(x), (error / bound).max())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NATIVE),
    act=st.sampled_from([None, *ACTS]),
    shape=st.tuples(st.integers(1, 140), st.integers(1, 700)),
    M=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_any_product_is_the_definition_within_rounding(name, act, shape, M, seed):
    layer = random_linear(WEIGHTS[name], shape, ACTS.get(act), bias=True)
    assume(linear.accepts(layer.spec, shape) is None)
    x = random_input(M, shape[1], seed)
    exact, bound = exact_and_bound(linear, layer, x)
    error = np.abs(run(layer, x) - exact)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("act", ["int8-token", "int8-static-asymmetric", "int8-g32", "fp8-g128", "nvfp4", "mxfp8"])
def test_a_quantized_row_has_the_same_bits_in_any_company(act):
    for name in ("int8-channel", "uint4-g32", "nvfp4"):
        same_in_any_company(random_linear(WEIGHTS[name], (130, 320), ACTS[act]))


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_has_the_same_bits_in_any_company(name):
    same_in_any_company(random_linear(WEIGHTS[name], (130, 320)))


def same_in_any_company(layer: QLinear) -> None:
    runner = linear.bind([linear.pack(layer)])
    x = random_input(300, 320)
    (whole,) = runner(x)
    alone = np.concatenate([runner(x[m : m + 1])[0] for m in range(300)])
    np.testing.assert_array_equal(alone, whole)
    for M in (2, 3, 5, 8, 31, 64, 129):
        np.testing.assert_array_equal(runner(x[7 : 7 + M])[0], whole[7 : 7 + M])


def test_threads_do_not_change_a_bit():
    layer = random_linear(WEIGHTS["uint4-g32"], (500, 320))
    runner = linear.bind([linear.pack(layer)])
    x = random_input(37, 320)
    before = _native.thread_count()
    try:
        results = []
        for count in (1, 2, 3):
            _native.set_thread_count(count)
            results.append(runner(x)[0])
    finally:
        _native.set_thread_count(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_weights_that_share_x_give_what_each_gives_alone():
    schemes = [
        ("int4-g32", None),
        ("uint8-channel", None),
        ("int4-act-order", None),
        ("int8-channel", "int8-token"),
        ("nvfp4", "nvfp4"),
        ("bfloat16", None),
        ("float32", None),
        ("int8-channel", "int8-static"),
    ]
    layers = [
        random_linear(WEIGHTS[name], (40 + 30 * i, 64), ACTS.get(act), bias=i % 2 == 0)
        for i, (name, act) in enumerate(schemes)
    ]
    packed = [linear.pack(layer) for layer in layers]
    x = random_input(5, 64)
    for one, y in zip(packed, linear.bind(packed)(x), strict=True):
        np.testing.assert_array_equal(linear.bind([one])(x)[0], y)


def test_add_to_adds_in_place():
    runner = linear.bind([linear.pack(random_linear(WEIGHTS["int4-g32"], (40, 64), bias=True))])
    x, residual = random_input(3, 64), random_input(3, 40, seed=5)
    expected = residual + runner(x)[0]
    (result,) = runner(x, residual)
    assert result is residual
    np.testing.assert_array_equal(residual, expected)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resident_bytes_are_known_beforehand(name, shape):
    layer = random_linear(WEIGHTS[name], shape)
    assert linear.pack(layer).nbytes == linear.nbytes(layer.spec, shape)


def test_many_groups_are_packed_in_pieces(monkeypatch):
    layer = random_linear(integers(4, GROUP, True), (300, 64))
    x = random_input(2, 64)
    whole = run(layer, x)
    monkeypatch.setattr(linear, "_BLOCK", 1)
    np.testing.assert_array_equal(run(layer, x), whole)


def test_what_was_packed_needs_its_source_no_more():
    layer = random_linear(WEIGHTS["uint4-g32"], (40, 64))
    packed = linear.pack(layer)
    x = random_input(1, 64)
    before = linear.bind([packed])(x)[0].copy()
    layer.weight.codes[:] = 0
    layer.weight.scale[:] = 0
    np.testing.assert_array_equal(linear.bind([packed])(x)[0], before)


def test_no_rows_is_a_batch_too():
    assert run(random_linear(WEIGHTS["int4-g32"], (40, 64)), random_input(0, 64)).shape == (0, 40)


def test_inputs_are_checked():
    runner = linear.bind([linear.pack(random_linear(WEIGHTS["int4-g32"], (40, 64)))])
    with pytest.raises(ValueError, match=r"float32 \[M, 64\]"):
        runner(random_input(2, 63))
    with pytest.raises(ValueError, match=r"float32 \[M, 64\]"):
        runner(random_input(2, 64).astype(np.float64))
    with pytest.raises(ValueError, match=r"float32 \[2, 40\]"):
        runner(random_input(2, 64), np.zeros((3, 40), np.float32))
    with pytest.raises((TypeError, BufferError, ValueError)):
        runner(np.asfortranarray(random_input(2, 64)))
    both = linear.bind([linear.pack(random_linear(WEIGHTS["int4-g32"], (40, 64)))] * 2)
    with pytest.raises(ValueError, match="single weight"):
        both(random_input(2, 64), np.zeros((2, 40), np.float32))
