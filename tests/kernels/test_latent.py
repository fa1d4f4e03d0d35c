"""The product of latents, taken apart: with latents in the place of keys and values, nothing else is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_weights import GROUP, TENSOR, float_act, floats, int8, integers, random_input, random_linear

from fewbits.kernels import KERNELS, choose, latent
from fewbits.kernels.reference.linear import linear_exact
from fewbits.spec import ActSpec, HeadRows, WeightSpec, dense

ROWS, HEADS, RANK, TOKENS = HeadRows(20, 12), 5, 96, 7
SPECS: dict[str, tuple[WeightSpec, ActSpec | None]] = {
    "f32": (dense("float32"), None),
    "bf16": (dense("bfloat16"), None),
    "f16": (dense("float16"), None),
    "int4 asym": (integers(4, GROUP, asymmetric=True), None),
    "int8 token": (integers(8, (1, 0)), int8("token")),
    "fp8 tensor": (floats(4, 3, TENSOR, "float32"), float_act(4, 3, "token")),
    "int8 static": (integers(8, TENSOR), int8("tensor", dynamic=False)),
    "fp8 blocks": (floats(4, 3, (24, 32), "float32"), float_act(4, 3, "group", group_size=32)),
    "fp4": (floats(2, 1, (1, 16), "float8_e4m3fn", global_scale=True), None),
    "act-order": (replace(integers(4, GROUP, asymmetric=True), act_order=True), None),
}
REFERENCE = next(kernel for kernel in KERNELS if kernel.op == "linear" and kernel.reference)


def native(spec: WeightSpec):
    kernel = choose("linear", latent.runs_as(spec), (HEADS * sum(ROWS), RANK), allow_reference=False).kernel
    assert kernel is not None
    return kernel


@pytest.mark.parametrize("name", SPECS)
def test_scores_and_values_are_those_of_keys_and_values(name: str) -> None:
    """By the definition, in float64: the keys and values that the product makes of each latent."""
    linear = random_linear(SPECS[name][0], (HEADS * sum(ROWS), RANK), SPECS[name][1], bias=True)
    latents, weights = random_input(TOKENS, RANK), np.abs(random_input(TOKENS, 1)).astype(np.float64)
    weights /= weights.sum()
    made = linear_exact(linear, latents).reshape(TOKENS, HEADS, sum(ROWS))
    keys, values = made[:, :, : ROWS.keys], made[:, :, ROWS.keys :]
    queries = random_input(1, HEADS * ROWS.keys, seed=3)
    scores = np.einsum("hk,thk->ht", queries.reshape(HEADS, -1).astype(np.float64), keys)
    mixed = np.einsum("t,thv->hv", weights[:, 0], values)
    for kernel in (REFERENCE, native(SPECS[name][0])):
        packed = latent.pack(linear, ROWS, kernel)
        into, of = packed.bind()
        taken = packed.taken(latents)
        ours = into(queries).reshape(HEADS, RANK).astype(np.float64) @ taken.T.astype(np.float64)
        # The bias of keys moves all scores of a query alike.
        ours, theirs = (one - one.mean(axis=1, keepdims=True) for one in (ours, scores))
        mixture = (weights * taken).sum(axis=0).astype(np.float32)
        got = of(np.tile(mixture, HEADS)[np.newaxis]).reshape(HEADS, -1)
        # bfloat16 rounds weights and inputs by 2^-9 of themselves; the reference rounds to float32.
        allowed = 1e-5 if kernel.reference else 2.0**-7
        assert np.linalg.norm(ours - theirs) < allowed * np.linalg.norm(theirs)
        assert np.linalg.norm(got - mixed) < allowed * np.linalg.norm(mixed)


@pytest.mark.parametrize("name", SPECS)
def test_what_one_scale_holds_for_stays_quantized(name: str) -> None:
    """The rest has scales across the sum of the transposed product, or codes of less than a byte."""
    spec = SPECS[name][0]
    kept = not spec.quantized or name in ("fp8 tensor", "int8 static")
    assert latent.runs_as(spec).weight == (spec if kept else dense("bfloat16")) and latent.runs_as(spec).act is None


@pytest.mark.parametrize("name", SPECS)
def test_rows_have_the_same_bits_alone_and_the_plan_knows_the_bytes(name: str) -> None:
    spec = SPECS[name][0]
    linear = random_linear(spec, (HEADS * sum(ROWS), RANK), SPECS[name][1])
    kernel = native(spec)
    packed = latent.pack(linear, ROWS, kernel)
    assert packed.nbytes == latent.nbytes(kernel, spec, (HEADS * sum(ROWS), RANK), ROWS)
    for run, width in zip(packed.bind(), (ROWS.keys, RANK), strict=True):
        x = random_input(40, HEADS * width)
        whole = run(x)
        for row in (0, 17, 39):
            np.testing.assert_array_equal(run(x[row : row + 1]), whole[row : row + 1])
    latents = random_input(9, RANK)
    np.testing.assert_array_equal(packed.taken(latents[4:5]), packed.taken(latents)[4:5])
