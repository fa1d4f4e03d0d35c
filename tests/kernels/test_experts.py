"""Routing and experts on both back ends: worked numbers, the definition, and rows by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits import _native
from fewbits.kernels import KERNELS
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.ops import Activation, Chosen, Expert, Routing
from fewbits.kernels.reference.linear import linear_exact
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import ActSpec, WeightSpec, dense

OPS = [ReferenceOps(), CpuOps()]
H, WIDTH, EXPERTS = 64, 96, 7


@pytest.fixture(params=OPS, ids=lambda ops: ops.name)
def ops(request):
    return request.param


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def row(*numbers):
    return np.array([numbers], np.float32)


# ---- routing


@pytest.mark.parametrize(
    ("routing", "bias", "experts", "weights"),
    [
        (Routing(2, "sigmoid", scale=3.0), [-0.3, 0.1, 0.4, 0.0], [3, 1], [1.620352, 1.379648]),
        (Routing(2, "sigmoid", scale=3.0), None, [0, 3], [1.639347, 1.360653]),
        (Routing(2), None, [0, 3], [0.731059, 0.268941]),
        (Routing(2, normalize=False), None, [0, 3], [0.609460, 0.224208]),
        (Routing(2, normalize=False, scale=16.0), None, [0, 3], [16 * 0.609460, 16 * 0.224208]),
        (Routing(2, epsilon=1.0), None, [0, 3], [0.609460 / 1.833668, 0.224208 / 1.833668]),
        (Routing(4), None, [0, 3, 1, 2], [0.609460, 0.224208, 0.135989, 0.030343]),
    ],
)
def test_routing_by_hand(ops, routing, bias, experts, weights):
    """The bias chooses and weighs nothing."""
    vector = None if bias is None else ops.vector(np.array(bias))
    chosen = ops.route(routing, vector)(row(2, 0.5, -1, 1))
    assert chosen.experts.tolist() == [experts]
    np.testing.assert_allclose(chosen.weights, [weights], rtol=2e-6, atol=1e-6)
    assert (chosen.experts.dtype, chosen.weights.dtype) == (np.int32, np.float32)


GROUPS = row(3, -5, 2, 1.5, 2.5, -1, 1.9, 1.4)  # sigmoids .953 .007 | .881 .818 | .924 .269 | .870 .802


@pytest.mark.parametrize(
    ("group_best", "bias", "experts", "weights"),
    [
        (1, None, [0, 4, 5], [0.952574, 0.924142, 0.268941]),
        (2, None, [2, 6, 3], [0.880797, 0.869892, 0.817574]),
        (2, 2.0, [1, 0, 2], [0.006693, 0.952574, 0.880797]),
    ],
)
def test_only_the_best_groups_are_chosen_from(ops, group_best, bias, experts, weights):
    """Two of four: by their best, by the sum of their two best, and with a bias for the second expert."""
    routing = Routing(3, "sigmoid", normalize=False, groups=4, kept_groups=2, group_best=group_best)
    vector = None if bias is None else ops.vector([0, bias, 0, 0, 0, 0, 0, 0])
    chosen = ops.route(routing, vector)(GROUPS)
    assert chosen.experts.tolist() == [experts]
    np.testing.assert_allclose(chosen.weights, [weights], atol=1e-6)


@pytest.mark.parametrize(("E", "groups", "kept", "group_best"), [(8, 4, 2, 1), (160, 8, 3, 1), (256, 8, 4, 2)])
def test_both_back_ends_keep_the_same_groups(E, groups, kept, group_best):
    logits, bias = random(300, E, seed=E) * 3, random(E, seed=1)
    logits[:50] = np.rint(logits[:50])  # ties
    bias[: E // 2] = 0
    routing = Routing(4, "sigmoid", groups=groups, kept_groups=kept, group_best=group_best)
    expected, found = (ops.route(routing, ops.vector(bias))(logits) for ops in OPS)
    np.testing.assert_array_equal(found.experts, expected.experts)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-7)
    assert all(len(set(of_row)) <= kept for of_row in (expected.experts // (E // groups)).tolist())


def test_of_equals_the_lower_number_is_chosen(ops):
    chosen = ops.route(Routing(3), None)(row(0, 1, 1, -2, 1, 1))
    assert chosen.experts.tolist() == [[1, 2, 4]]
    saturated = ops.route(Routing(2, "sigmoid"), None)(row(100, 200, 300))
    assert saturated.experts.tolist() == [[0, 1]] and saturated.weights.tolist() == [[0.5, 0.5]]


def test_numbers_that_are_none(ops):
    """NaN is chosen last and seen in what it weighs; numbers of experts stay numbers of experts."""
    nan, inf = np.nan, np.inf
    sigmoid = ops.route(Routing(2, "sigmoid"), None)
    with np.errstate(all="ignore"):
        assert sigmoid(row(nan, 1, 2)).experts.tolist() == [[2, 1]]
        chosen = sigmoid(row(nan, nan, 2))
        assert chosen.experts.tolist() == [[2, 0]] and np.isnan(chosen.weights).all()
        for logits in (row(nan, 1, 2), row(inf, 1, inf), row(-inf, -inf, -inf)):
            chosen = ops.route(Routing(2), None)(logits)
            assert chosen.experts.tolist() == [[0, 1]] and np.isnan(chosen.weights).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E", [1, 3, 8, 60, 288])
def test_both_back_ends_choose_alike_and_rows_stand_alone(score, E):
    logits, bias = random(300, E, seed=E) * 3, random(E, seed=1)
    routing = Routing(min(E, 8), score, epsilon=1e-20, scale=2.5)
    reference, native = (ops.route(routing, ops.vector(bias)) for ops in OPS)
    expected, found = reference(logits), native(logits)
    np.testing.assert_array_equal(found.experts, expected.experts)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-7)
    for route, whole in ((reference, expected), (native, found)):
        for t in (0, 17, 299):
            alone = route(logits[t : t + 1])
            assert [part.tobytes() for part in alone] == [part[t].tobytes() for part in whole]


def test_more_experts_than_there_are():
    with pytest.raises(ValueError, match="of 3 experts 4 can't be chosen"):
        CpuOps().route(Routing(4), None)(row(1, 2, 3))
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        _native.Routing(3, 1, "tanh", True, 0.0, 1.0, 1, 1, 1, 0)
    for groups, kept, best in ((2, 1, 1), (0, 1, 1), (3, 4, 1), (3, 0, 1), (3, 1, 2), (3, 1, 1)):
        with pytest.raises(ValueError, match="can't be chosen from"):
            _native.Routing(3, 2, "softmax", True, 0.0, 1.0, groups, kept, best, 0)


# ---- gates


@pytest.mark.parametrize(
    ("gate", "up", "plain", "limited"),
    [(10, 9, 89.9959, 49.0), (-3, -9, 1.280499, 0.995943), (7.005, 1, 6.998650, 6.998650), (10, -9, -89.9959, -49.0)],
)
def test_the_limit_is_for_what_silu_gives(ops, gate, up, plain, limited):
    """7.005 before, 6.998650 behind silu: a limit of 7 changes nothing; from below the gate has none."""
    for limit, expected in ((0.0, plain), (7.0, limited)):
        y = ops.gate(Activation("silu", limit))(row(gate), row(up))
        np.testing.assert_allclose(np.asarray(y), [[expected]], rtol=2e-6)


@pytest.mark.parametrize(
    ("gate", "up", "limit", "expected"),
    # gpt-oss: gate, up, then 7 for both of these, 1.702 and the 1 beside up; worked out by hand in float64
    [(10, 9, 7.0, 55.99963), (-3, -9, 7.0, 0.108428), (1, 0, 0.0, 0.845796), (10, 9, 0.0, 99.999996)],
)
def test_swiglu_of_gpt_oss(ops, gate, up, limit, expected):
    y = ops.gate(Activation("swiglu_oai", limit))(row(gate), row(up))
    np.testing.assert_allclose(np.asarray(y), [[expected]], rtol=2e-6)


@pytest.mark.parametrize("width", [1, 15, 16, 33, 700])
def test_swiglu_agrees_with_the_definition(width):
    gate, up = random(9, width) * 6, random(9, width, seed=1) * 6
    reference, native = (np.asarray(one.gate(Activation("swiglu_oai", 5.0))(gate, up)) for one in OPS)
    # Half an ulp of 1.702 x gate is up to 1e-6 of the exponential, and up + 1 may cancel.
    np.testing.assert_allclose(native, reference, rtol=3e-6, atol=1e-6 * np.abs(gate).max())


def test_limits_agree_and_leave_nan_alone():
    gate, up = random(9, 130) * 6, random(9, 130, seed=1) * 6
    gate[0, :3], up[1, :3] = [np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf]
    with np.errstate(invalid="ignore"):
        reference, native = (np.asarray(ops.gate(Activation("silu", 2.0))(gate, up)) for ops in OPS)
    np.testing.assert_allclose(native, reference, rtol=1e-6)
    assert np.isnan(native[0, 0]) and np.isnan(native[1, 0]) and np.isfinite(native[1, 1:]).all()


def test_scaling_by_sigmoids(ops):
    x, gates = random(5, 3 * 40), random(5, 3, seed=1) * 4
    gates[0] = [0.5, 1000, -1000]
    with np.errstate(over="ignore"):
        expected = x.reshape(5, 3, 40) / (1 + np.exp(-gates.astype(np.float64)))[:, :, None]
    found = x.copy()
    ops.scale_by_sigmoid(found, gates)
    np.testing.assert_allclose(found, expected.reshape(5, 120), rtol=3e-7, atol=1e-30)
    np.testing.assert_allclose(found[0, :40], x[0, :40] * 0.622459, rtol=1e-6)
    alone = x[2:3].copy()
    ops.scale_by_sigmoid(alone, gates[2:3])
    np.testing.assert_array_equal(alone, found[2:3])


# ---- experts


def weight(rows, columns, spec, seed):
    random = np.random.default_rng(seed)
    if not spec.quantized:
        values = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return QWeight(spec, (rows, columns), values)
    codes = random.integers(0, 256, (rows, columns // 2 if spec.bits == 4 else columns)).astype(np.uint8)
    scale = random.uniform(0.5, 2, spec.blocks_of((rows, columns))).astype(np.float32) / (2**spec.bits * 4)
    return QWeight(spec, (rows, columns), codes, scale)


INT4 = WeightSpec("int", 4, (1, 32), "float32")
INT8 = WeightSpec("int", 8, (1, 0), "float32")
TOKEN = ActSpec("int", 8, "token", True)
STATIC = ActSpec("int", 8, "tensor", False)


def linear(rows, columns, number, seed, bias=False):
    """One of four kinds by the expert's number: nothing of an expert follows from another."""
    spec, act = [(dense("float32"), None), (INT4, None), (INT8, TOKEN), (INT8, STATIC)][number % 4]
    scale = 0.01 * (1 + number) if act is STATIC else None
    offset = random(rows, seed=seed + 5) if bias else None
    return QLinear(weight(rows, columns, spec, seed), act, offset, input_scale=scale)


def experts_of(fused=False, bias=False):
    """(inputs, down) of each."""
    return [
        (
            [linear(2 * WIDTH, H, e, 100 * e, bias)]
            if fused
            else [linear(WIDTH, H, e, 100 * e + i, bias) for i in range(2)],
            linear(H, WIDTH, e, 100 * e + 2, bias),
        )
        for e in range(EXPERTS)
    ]


def bound(ops, linears, activation):
    backend = "reference" if ops.name == "reference" else "cpu"

    def param(one):
        for kernel in KERNELS:
            if kernel.op == "linear" and kernel.name.startswith(backend):
                if kernel.accepts(one.spec, one.weight.shape) is None:
                    return kernel, kernel.pack(one)
        raise AssertionError(one.spec)

    experts = [Expert(tuple(param(one) for one in inputs), param(down)) for inputs, down in linears]
    return ops.experts(experts, activation)


def definition(linears, x, chosen, limit):
    """Token by token, in float64 but for what products are given."""
    y = np.zeros((len(x), H))
    for t in range(len(x)):
        for e, w in zip(chosen.experts[t], chosen.weights[t], strict=True):
            inputs, down = linears[e]
            gate, up = np.split(np.concatenate([linear_exact(one, x[t : t + 1]) for one in inputs], axis=1), 2, axis=1)
            gate = gate / (1 + np.exp(-gate))
            if limit:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            y[t] += float(w) * linear_exact(down, (gate * up).astype(np.float32))[0]
    return y


def chosen_of(T, k=3, seed=3):
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(EXPERTS)[:k] for _ in range(T)]).astype(np.int32)
    return Chosen(experts, random.uniform(0.1, 1, (T, k)).astype(np.float32))


@pytest.mark.parametrize("limit", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_their_definition(ops, fused, bias, limit):
    """Each has its own spec and its own static scale; a bias is weighed with the rest; what was there is added to."""
    linears = experts_of(fused, bias)
    x, residual, chosen = random(20, H), random(20, H, seed=9), chosen_of(20)
    expected = definition(linears, x, chosen, limit)
    found = residual.copy()
    bound(ops, linears, Activation("silu", limit))(x, chosen, found)
    # Where a product's input is quantized, a difference in its last bit may move it over to the next code, a step of
    # 1/127 of the largest; and bfloat16 may stand for unquantized inputs.
    error = np.linalg.norm(found - residual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.01
    assert np.median(error) < (1e-6 if ops.name == "reference" else 4e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_has_the_same_bits_whatever_its_company(ops, fused):
    run = bound(ops, experts_of(fused), Activation())
    x, residual, chosen = random(64, H), random(64, H, seed=9), chosen_of(64)
    alone = np.concatenate([residual[t : t + 1].copy() for t in range(64)])
    for t in range(64):
        run(x[t : t + 1], Chosen(*(part[t : t + 1] for part in chosen)), alone[t : t + 1])
    for rows in (slice(0, 2), slice(3, 8), slice(0, 16), slice(20, 53), slice(0, 64), slice(63, None, -3)):
        together = residual[rows].copy()
        run(np.ascontiguousarray(x[rows]), Chosen(*(np.ascontiguousarray(part[rows]) for part in chosen)), together)
        np.testing.assert_array_equal(together, alone[rows])


def test_the_order_of_a_rows_experts_doesnt_matter(ops):
    run = bound(ops, experts_of(), Activation())
    x, chosen = random(5, H), chosen_of(5)
    first, second = np.zeros((5, H), np.float32), np.zeros((5, H), np.float32)
    run(x, chosen, first)
    run(x, Chosen(chosen.experts[:, ::-1].copy(), chosen.weights[:, ::-1].copy()), second)
    np.testing.assert_array_equal(first, second)


def test_no_rows(ops):
    y = np.empty((0, H), np.float32)
    nobody = Chosen(np.empty((0, 3), np.int32), np.empty((0, 3), np.float32))
    bound(ops, experts_of(), Activation())(np.empty((0, H), np.float32), nobody, y)
    assert y.shape == (0, H)
