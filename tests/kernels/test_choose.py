"""The table of kernels: which is chosen for what, and what the others say."""

from __future__ import annotations

import pytest
from random_weights import ACTS, CHANNEL, GROUP, WEIGHTS, integers

from fewbits.kernels import KERNELS, choose
from fewbits.spec import ActSpec, QuantSpec, WeightSpec, dense

SHAPE = (96, 64)
NO_INT8 = ("cpu.dot_int8", "integer weights and int8 activations, or fp4 and fp4")
NO_INT16 = ("cpu.dot_int16", "integer weights and unquantized activations")
NATIVE = ["cpu.dot_int8", "cpu.dot_int16", "cpu.dot_bf16"]
INTEGERS = ("int", "uint")


def in_words(spec, act=None, codes=4):
    """Codes in groups of columns that aren't whole words are stored as wider ones."""
    columns = [spec.block_of(SHAPE)[1], act.group_size or SHAPE[1] if act else SHAPE[1]]
    return all(size >= SHAPE[1] or size % codes == 0 for size in columns)


def is_fp4(spec):
    return (spec.kind, spec.exponent, spec.mantissa) == ("float", 2, 1)


@pytest.mark.parametrize("allow_reference", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_runs_natively(name, allow_reference):
    spec = QuantSpec(WEIGHTS[name])
    linear = choose("linear", spec, SHAPE, allow_reference)
    integer = WEIGHTS[name].kind in INTEGERS and in_words(WEIGHTS[name])
    assert linear.kernel is not None and linear.kernel.name == ("cpu.dot_int16" if integer else "cpu.dot_bf16")
    assert linear.declined == ((NO_INT8,) if integer else (NO_INT8, NO_INT16))
    embedding = choose("embedding", spec, SHAPE, allow_reference)
    assert embedding.kernel is not None and embedding.kernel.name == "cpu.embedding" and embedding.declined == ()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_meet_integers_where_both_are_stored_so(name, act):
    spec = WEIGHTS[name]
    kernel = choose("linear", QuantSpec(spec, ACTS[act]), SHAPE, allow_reference=False).kernel
    if spec.act_order and ACTS[act].group_size:
        assert kernel is None
        return
    integer = spec.kind in INTEGERS and ACTS[act].kind == "int" and in_words(spec, ACTS[act])
    fp4 = is_fp4(spec) and is_fp4(ACTS[act]) and in_words(spec, ACTS[act], codes=8)
    assert kernel is not None and kernel.name == ("cpu.dot_int8" if integer or fp4 else "cpu.dot_bf16")


FLOAT64 = "floats of 16 or 32 bits"
DECLINED = [
    (QuantSpec(dense("float64")), FLOAT64),
    (QuantSpec(dense("float64"), ACTS["int8-token"]), FLOAT64),
    (QuantSpec(WeightSpec("uint", 4, GROUP, "bfloat16", zero_point="float")), "integer zero points"),
    (QuantSpec(WeightSpec("int", 12, CHANNEL, "bfloat16")), "codes of at most 8 bits"),
    (
        QuantSpec(WeightSpec("int", 4, GROUP, "bfloat16", act_order=True), ACTS["int8-g32"]),
        "activations in groups beside weights in input order",
    ),
    (QuantSpec(integers(4, GROUP), ActSpec("int", 4, "token", True)), "activations whose quantization is defined"),
]


@pytest.mark.parametrize("spec, sentence", DECLINED, ids=str)
def test_the_native_kernel_declines_with_a_sentence(spec, sentence):
    declined = choose("linear", spec, SHAPE, allow_reference=True).declined
    assert [name for name, _ in declined[:3]] == NATIVE
    assert declined[2][1] == sentence


@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_the_reference_only_when_asked(op):
    spec = QuantSpec(dense("float64"))
    choice = choose(op, spec, SHAPE, allow_reference=True)
    assert choice.kernel is not None and choice.kernel.name == f"reference.{op}"
    alone = choose(op, spec, SHAPE, allow_reference=False)
    assert alone.kernel is None and alone.declined == choice.declined
    assert dict(alone.declined)[{"linear": "cpu.dot_bf16", "embedding": "cpu.embedding"}[op]] == FLOAT64


def test_a_spec_without_definition_has_no_kernel():
    act = ActSpec("int", 4, "token", True)
    choice = choose("linear", QuantSpec(integers(4, GROUP), act), SHAPE, allow_reference=True)
    assert choice.kernel is None
    assert [name for name, _ in choice.declined] == [*NATIVE, "reference.linear"]


def test_names_are_unique_and_the_reference_stands_last():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    flags = [kernel.reference for kernel in KERNELS]
    assert flags == sorted(flags)
