"""Native products against float64, and every row against itself in other company.

The tier is fixed when the process starts: the last test runs this file again under each other one.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import _native

KINDS = ["int4", "int8", "bf16", "f16", "f32"]
FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
RAW = {"bf16": np.uint16, "f16": np.uint16, "f32": np.float32}
UNIT_F32 = 2.0**-24  # largest relative error of rounding to float32
UNIT_BF16 = 2.0**-8  # and to bfloat16, as the avx512_bf16 tier does with x


@pytest.fixture(autouse=True)
def threads():
    before = _native.thread_count()
    yield
    _native.set_thread_count(before)


@dataclass
class Weight:
    """A packed weight and what it stands for: `values` in float64, and the size of the codes that are summed."""

    kind: str
    packed: _native.PackedWeight
    values: np.ndarray
    summed: np.ndarray


def nibbles(codes):
    """Two codes a byte, low nibble first; the nibble behind an odd row is all ones and must not count."""
    N, K = codes.shape
    padded = np.full((N, K + K % 2), 15, np.uint8)
    padded[:, :K] = codes
    return padded[:, ::2] | padded[:, 1::2] << 4


def make(kind, N, K, group_size=None, zero=False, seed=0, blocks=1):
    rng = np.random.default_rng([seed, N, K])
    group_size = group_size or K
    packed = _native.PackedWeight(kind, N, K, group_size, zero)
    scale = zeros = None
    if kind in FLOATS:
        values = rng.standard_normal((N, K)).astype(FLOATS[kind])
        codes, values = values.view(RAW[kind]), values.astype(np.float64)
        summed = np.abs(values)
    else:
        bits = int(kind[3:])
        raw = rng.integers(0, 2**bits, (N, K), dtype=np.uint8)
        codes = nibbles(raw) if bits == 4 else raw
        groups = -(-K // group_size)
        scale = rng.uniform(0.001, 0.1, (N, groups)).astype(np.float32)
        offset = np.full((N, groups), 2.0 ** (bits - 1))
        if zero:
            zeros = rng.integers(0, 2**bits, (N, groups)).astype(np.float32)
            offset = zeros.astype(np.float64)
        wide_scale, wide_offset = (np.repeat(a, group_size, axis=1)[:, :K] for a in (scale, offset))
        values = (raw - wide_offset) * wide_scale
        # At most: the bf16 tier sums 128 + code for int4, the others code - 2^(bits-1); then the offsets.
        summed = wide_scale * {4: 2 * 143.0, 8: 2 * 128.0}[bits]
    for rows in np.array_split(np.arange(N), blocks):
        part = slice(rows[0], rows[-1] + 1)
        packed.fill(
            int(rows[0]),
            np.ascontiguousarray(codes[part]),
            None if scale is None else np.ascontiguousarray(scale[part]),
            None if zeros is None else np.ascontiguousarray(zeros[part]),
        )
    return Weight(kind, packed, values, summed)


def guarded(shape):
    """An array in the middle of a larger one that is NaN everywhere."""
    count = int(np.prod(shape))
    whole = np.full(count + 128, np.nan, np.float32)
    return whole[64 : 64 + count].reshape(shape), whole


def run(weights, x, biases=None, add_to=None):
    gemm = _native.Gemm([w.packed for w in weights], biases or [None] * len(weights))
    M, K = x.shape
    inside, _ = guarded((M, K))
    inside[:] = x
    outputs = [guarded((M, w.packed.N)) for w in weights]
    if add_to is not None:
        for (y, _), start in zip(outputs, add_to, strict=True):
            y[:] = start
    gemm.run(_native.address(inside), M, [_native.address(y) for y, _ in outputs], add_to is not None)
    for _, whole in outputs:
        assert np.isnan(whole[:64]).all() and np.isnan(whole[-64:]).all(), "written outside of y"
    return [y for y, _ in outputs]


def product(weight, x):
    return run([weight], x)[0]


def activations(M, K, seed=1):
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)


def rounds_x(kind):
    return _native.tier() == "avx512_bf16" and kind in ("int4", "int8", "bf16")


def check(weight, x, y):
    exact = x.astype(np.float64) @ weight.values.T
    size = np.abs(x).astype(np.float64)
    # Errors of rounding in a sum of K grow as its root; 4 standard deviations of it, and a little for short sums.
    bound = 4 * np.sqrt(x.shape[1] + 16) * UNIT_F32 * (size @ weight.summed.T)
    if rounds_x(weight.kind):
        bound += UNIT_BF16 * (size @ np.abs(weight.values).T)
    error = np.abs(y - exact)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"y[{worst}] is off by {error[worst]:.3g}, bound {bound[worst]:.3g}"


def specs(kind):
    """Group sizes and zero points that a kind can have."""
    if kind in FLOATS:
        return [(None, False)]
    word = {"int4": 8, "int8": 4}[kind]
    return [(group, zero) for group in (None, word, 32, 128, 520) for zero in (False, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind):
    shapes = [(1, 1), (64, 128), (65, 203), (130, 1100), (15, 1031), (200, 36), (3, 2050)]
    for (N, K), (group_size, zero) in itertools.product(shapes, specs(kind)):
        if group_size is not None and group_size > K:
            continue
        weight = make(kind, N, K, group_size, zero, blocks=min(N, 3))
        for M in (1, 13):
            x = activations(M, K)
            check(weight, x, product(weight, x))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_against_float64(kind, data):
    N = data.draw(st.integers(1, 140), "N")
    K = data.draw(st.integers(1, 700), "K")
    M = data.draw(st.integers(1, 40), "M")
    group_size, zero = data.draw(st.sampled_from(specs(kind)), "group size and zero point")
    if group_size is not None and group_size > K:
        group_size = None
    weight = make(kind, N, K, group_size, zero)
    x = activations(M, K)
    check(weight, x, product(weight, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind):
    for group_size, zero in specs(kind)[:4:3]:
        weight = make(kind, 70, 77, group_size, zero)
        x = activations(300, 77)
        alone = np.concatenate([product(weight, x[m : m + 1]) for m in range(300)])
        for M in range(2, 301):
            rows = product(weight, x[300 - M :])
            np.testing.assert_array_equal(rows, alone[300 - M :], err_msg=f"M = {M}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind):
    weight = make(kind, 700, 600, None)
    x = activations(270, 600)
    _native.set_thread_count(1)
    y = product(weight, x)
    for count in (2, 3, 4):
        _native.set_thread_count(count)
        np.testing.assert_array_equal(product(weight, x), y, err_msg=f"{count} threads")


def test_weights_that_share_x_are_each_as_they_are_alone():
    weights = [
        make("int4", 100, 640, 32, True, seed=1),
        make("int4", 64, 640, 128, False, seed=2),
        make("int8", 70, 640, 32, True, seed=3),
        make("int8", 65, 640, None, False, seed=4),
        make("bf16", 9, 640, seed=5),
        make("f32", 130, 640, seed=6),
    ]
    for M in (1, 5, 33):
        x = activations(M, 640)
        for weight, y in zip(weights, run(weights, x), strict=True):
            np.testing.assert_array_equal(y, product(weight, x))


def test_bias_and_residual():
    weights = [make("int4", 70, 256, 32, True), make("bf16", 130, 256)]
    x = activations(5, 256)
    plain = run(weights, x)
    biases = [np.arange(70, dtype=np.float32), None]
    with_bias = run(weights, x, biases)
    np.testing.assert_array_equal(with_bias[0], plain[0] + biases[0])
    np.testing.assert_array_equal(with_bias[1], plain[1])
    start = [np.full_like(y, 0.5) for y in plain]
    added = run(weights, x, biases, start)
    np.testing.assert_array_equal(added[0], start[0] + with_bias[0])
    np.testing.assert_array_equal(added[1], start[1] + with_bias[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_no_other(kind):
    weight = make(kind, 70, 96)
    x = activations(9, 96)
    clean = product(weight, x)
    x[2, 95], x[7, 0] = np.nan, np.inf
    y = product(weight, x)
    others = [0, 1, 3, 4, 5, 6, 8]
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.isnan(y[2]).all() and not np.isfinite(y[7]).any()


def test_symmetric_weights_cancel_nothing():
    """With x of one sign, codes that stand for zero give exactly that, unless the tier sums an offset."""
    packed = _native.PackedWeight("int4", 64, 512, 128, False)
    packed.fill(0, np.full((64, 256), 0x88, np.uint8), np.ones((64, 4), np.float32), None)
    weight = Weight("int4", packed, np.zeros((64, 512)), np.full((64, 512), 2 * 143.0))
    x = np.abs(activations(3, 512)) + 100
    y = product(weight, x)
    if rounds_x("int4"):
        check(weight, x, y)
    else:
        assert not y.any()


def test_half_precision_subnormals_and_bounds():
    codes = np.array([[0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x8000]], np.uint16)
    packed = _native.PackedWeight("f16", 1, 6, 6, False)
    packed.fill(0, codes, None, None)
    for k, value in enumerate(codes.view(np.float16)[0]):
        x = np.zeros((1, 6), np.float32)
        x[0, k] = 1
        assert product(Weight("f16", packed, codes, codes), x)[0, 0] == np.float32(value)


def test_memory_is_what_the_layout_needs():
    assert make("int4", 70, 203, None, True).packed.nbytes == 128 * 4 * (26 + 2)
    assert make("int8", 64, 256, 32).packed.nbytes == 64 * 4 * (64 + 8)
    assert make("bf16", 1, 3).packed.nbytes == 64 * 4 * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("int3", 4, 8, 8, False), "int4, int8, bf16, f16 or f32"),
        (("int4", 0, 8, 8, False), "can't be packed"),
        (("int4", 4, 2**31, 2**31, False), "can't be packed"),
        (("int4", 4, 16, 12, False), "multiple of 8"),
        (("int8", 4, 16, 6, False), "multiple of 4"),
        (("int8", 4, 16, 32, False), "groups of 32 columns of 16"),
        (("int8", 4, 16, 0, False), "groups of 0 columns"),
        (("bf16", 4, 16, 8, False), "of floats the whole row"),
        (("f32", 4, 16, 16, True), "no zero points"),
    ],
)
def test_weights_that_cannot_be(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        _native.PackedWeight(*arguments)


def test_what_does_not_fit_a_weight_is_refused():
    weight = _native.PackedWeight("int4", 8, 24, 8, True)
    codes, scale = np.zeros((8, 12), np.uint8), np.ones((8, 3), np.float32)
    for sentence, arguments in {
        "two dimensions": (0, codes.ravel(), scale, scale),
        r"codes must be a contiguous uint8 array of shape \[8, 12\]": (0, codes[:, :11].copy(), scale, scale),
        "codes must be a contiguous": (0, np.zeros((8, 24), np.uint8)[:, ::2], scale, scale),
        "scale must be a contiguous float32": (0, codes, scale.astype(np.float64), scale),
        r"zero must be .* \[8, 3\]": (0, codes, scale, scale[:7].copy()),
        "only for those": (0, codes, None, scale),
        "only there": (0, codes, scale, None),
        "rows 1 to 9 lie outside": (1, codes, scale, scale),
        "rows -1 to 7 lie outside": (-1, codes, scale, scale),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            weight.fill(*arguments)
    weight.fill(0, codes[:5].copy(), scale[:5].copy(), scale[:5].copy())
    with pytest.raises(ValueError, match="row 5 of a packed weight has not been filled"):
        _native.Gemm([weight], [None])


def test_products_that_cannot_be():
    weight, other = make("f32", 8, 24), make("f32", 8, 25)
    with pytest.raises(ValueError, match="24 and 25 columns can't share x"):
        _native.Gemm([weight.packed, other.packed], [None, None])
    with pytest.raises(ValueError, match="at least one weight"):
        _native.Gemm([], [])
    with pytest.raises(ValueError, match="as many biases as weights"):
        _native.Gemm([weight.packed], [])
    with pytest.raises(ValueError, match="a bias of 7 elements"):
        _native.Gemm([weight.packed], [np.zeros(7, np.float32)])
    gemm = _native.Gemm([weight.packed], [None])
    with pytest.raises(ValueError, match="one address per weight"):
        gemm.run(0, 1, [], False)
    gemm.run(0, 0, [0], False)


def test_a_weight_outlives_its_python_object():
    weight = make("int4", 70, 256, 32)
    gemm = _native.Gemm([weight.packed], [None])
    x = activations(1, 256)
    expected = product(weight, x)
    weight.packed = None
    y = np.empty((1, 70), np.float32)
    gemm.run(_native.address(x), 1, [_native.address(y)], False)
    np.testing.assert_array_equal(y, expected)


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_tiers():
    tiers = _native.supported_tiers()
    assert tiers[0] == "ref" and _native.tier() in tiers
    features = _native.cpu_features()
    assert ("avx512" in tiers) == all(features[f"avx512{part}"] for part in ("f", "bw", "vl", "dq"))
    done = python("from fewbits import _native; _native.tier()", FEWBITS_ISA="sse9")
    assert "ValueError: FEWBITS_ISA=sse9 is not an instruction set tier that this machine can run" in done.stderr


def test_importing_starts_no_thread_and_a_fork_computes_on():
    program = """
import os, threading
import numpy as np
os.environ["OPENBLAS_NUM_THREADS"] = "1"
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
from fewbits import _native
assert count() == before, "a thread was started by the import"
_native.set_thread_count(3)
weight = _native.PackedWeight("f32", 256, 16, 16, False)
weight.fill(0, np.ones((256, 16), np.float32), None, None)
gemm = _native.Gemm([weight], [None])
x, y = np.ones((1, 16), np.float32), np.empty((1, 256), np.float32)
def run():
    y[:] = 0
    gemm.run(_native.address(x), 1, [_native.address(y)], False)
    assert (y == 16).all()
run()
assert count() == before + 2, "the pool has two workers beside the caller"
child = os.fork()
if child == 0:
    run()
    os._exit(0 if count() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
run()
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("this system doesn't list a process's threads in /proc")
    done = python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tier", ["ref", "avx2", "avx512", "avx512_bf16"])
def test_under_each_other_tier(tier):
    if tier == _native.tier() or "FEWBITS_ISA" in os.environ:
        pytest.skip("this is the run of that tier" if tier == _native.tier() else "one run per tier is enough")
    if tier not in _native.supported_tiers():
        pytest.skip(f"this machine doesn't run {tier}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not tier"],
        env={**os.environ, "FEWBITS_ISA": tier, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
