"""The table of kernels: which is chosen for what, and what the others say."""

from __future__ import annotations

import pytest
from random_weights import CHANNEL, GROUP, WEIGHTS, floats, integers

from fewbits.kernels import KERNELS, choose
from fewbits.spec import ActSpec, QuantSpec, WeightSpec, dense

SHAPE = (96, 64)
NATIVE = {"bfloat16", "float16", "float32", "int4-g32", "int8-g32", "uint4-g32", "uint8-g32"} | {
    name for name in WEIGHTS if name.endswith(("-channel", "-tensor")) and "fp8" not in name
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_native_first_reference_when_asked(name, op):
    spec = QuantSpec(WEIGHTS[name])
    choice = choose(op, spec, SHAPE, allow_reference=True)
    native = {"linear": "cpu.dot_bf16", "embedding": "cpu.embedding"}[op]
    assert choice.kernel is not None
    assert choice.kernel.name == (native if name in NATIVE else f"reference.{op}")
    alone = choose(op, spec, SHAPE, allow_reference=False)
    assert alone.declined == choice.declined
    if name in NATIVE:
        assert alone.kernel is choice.kernel and not alone.declined
    else:
        assert alone.kernel is None and [decliner for decliner, _ in alone.declined] == [native]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (QuantSpec(integers(3, GROUP)), "codes of 4 or 8 bits"),
        (QuantSpec(integers(8, CHANNEL), ActSpec("int", 8, "token", True)), "unquantized activations"),
        (QuantSpec(floats(4, 3, CHANNEL, "bfloat16")), "integer codes"),
        (QuantSpec(WeightSpec("int", 4, GROUP, "bfloat16", act_order=True)), "weights in input order"),
        (QuantSpec(integers(4, (1, 12))), "groups of a multiple of 8 columns"),
        (QuantSpec(integers(8, (1, 6))), "groups of a multiple of 4 columns"),
        (QuantSpec(integers(8, (16, 32))), "blocks of a tensor, a row or a group of a row"),
        (QuantSpec(dense("float64")), "floats of 16 or 32 bits"),
    ],
    ids=str,
)
def test_the_native_kernel_declines_with_a_sentence(spec, sentence):
    assert dict(choose("linear", spec, SHAPE, allow_reference=True).declined) == {"cpu.dot_bf16": sentence}


def test_a_spec_without_definition_has_no_kernel():
    act = ActSpec("int", 4, "token", True)
    choice = choose("linear", QuantSpec(integers(4, GROUP), act), SHAPE, allow_reference=True)
    assert choice.kernel is None
    assert [name for name, _ in choice.declined] == ["cpu.dot_bf16", "reference.linear"]


def test_names_are_unique_and_the_reference_stands_last():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    flags = [kernel.reference for kernel in KERNELS]
    assert flags == sorted(flags)
