"""Rows of embedding tables, native and reference."""

from __future__ import annotations

import numpy as np
import pytest
from random_weights import WEIGHTS, integers, random_weight

from fewbits.kernels.cpu import embedding as cpu
from fewbits.kernels.reference import embedding as reference
from fewbits.kernels.reference.bound import UNIT
from fewbits.qweight import QLinear
from fewbits.spec import ActSpec, QuantSpec

IDS = np.array([3, 0, 49, 3, 17], np.int64)
NATIVE = [name for name, spec in WEIGHTS.items() if cpu.accepts(QuantSpec(spec), (50, 72)) is None]


@pytest.mark.parametrize("name", WEIGHTS)
def test_reference_rows(name):
    weight = random_weight(WEIGHTS[name], (50, 72))
    rows = reference.bind([reference.pack(QLinear(weight))])(IDS)
    np.testing.assert_array_equal(rows, weight.dequantize().astype(np.float32)[IDS])
    assert reference.nbytes(QuantSpec(weight.spec), (50, 72)) == weight.nbytes - (
        0 if weight.perm is None else weight.perm.nbytes
    )


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("columns", [72, 33, 7])
def test_native_rows(name, columns):
    weight = random_weight(WEIGHTS[name], (50, columns))
    rows = cpu.bind([cpu.pack(QLinear(weight))])
    chain = cpu.arithmetic(QuantSpec(weight.spec), weight.shape).chain
    np.testing.assert_allclose(rows(IDS), weight.dequantize()[IDS], rtol=chain * UNIT)
    assert rows(IDS[:0]).shape == (0, columns)


def test_native_rows_of_unquantized_tables_are_exact():
    for name in ("bfloat16", "float16", "float32"):
        weight = random_weight(WEIGHTS[name], (50, 72))
        rows = cpu.bind([cpu.pack(QLinear(weight))])(IDS)
        np.testing.assert_array_equal(rows, weight.dequantize()[IDS])


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_a_packed_table_needs_its_source_no_more(scale_dtype):
    """The loader reads the next tensor into the memory of this one, float32 scales (no conversion copies them) too."""
    weight = random_weight(integers(4, (1, 32), asymmetric=True, scale_dtype=scale_dtype), (50, 64))
    rows = cpu.bind([cpu.pack(QLinear(weight))])
    before = rows(IDS)
    for array in (weight.codes, weight.scale, weight.zero):
        array[:] = 0
    np.testing.assert_array_equal(rows(IDS), before)


def test_ids_are_checked():
    rows = cpu.bind([cpu.pack(QLinear(random_weight(WEIGHTS["float32"], (50, 8))))])
    for wrong in (50, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} "):
            rows(np.array([0, wrong]))


def test_activations_make_no_sense_here():
    spec = QuantSpec(WEIGHTS["int8-channel"], ActSpec("int", 8, "token", True))
    assert reference.accepts(spec, (50, 72)) == "embeddings have no activations to quantize"
