"""What the native products ask of their callers, and what they say otherwise.

native/tests/gemm_test.cc and tests/kernels hold their results to the definition.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from fewbits import _native

UINT8 = {"int4": 8, "int8": 4, "fp4": 8, "fp8": 4}  # codes in a word
SCALES = {"none": 0, "f32": 4, "bf16": 2, "f16": 2, "e4m3": 1, "e8m0": 1}  # bytes


def codes_of(kind, N, K):
    if kind in UINT8:
        return np.zeros((N, (K + 1) // 2 if UINT8[kind] == 8 else K), np.uint8)
    return np.zeros((N, K), np.float32 if kind == "f32" else np.uint16)


def scales_of(scale, shape):
    if scale == "none":
        return None
    return np.ones(shape, {1: np.uint8, 2: np.uint16, 4: np.float32}[SCALES[scale]])


def weight(kind="f32", N=8, K=24, group=None, scale="none", shared=False, zero=False):
    group = group or K
    packed = _native.PackedWeight(kind, N, K, group, scale, shared, zero)
    shape = (N, -(-K // group))
    packed.fill(0, codes_of(kind, N, K), scales_of(scale, shape), np.zeros(shape, np.int8) if zero else None)
    return packed


def gemm(*products):
    return _native.Gemm([*products])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp4", "fp8", "bf16", "f16", "f32"])
def test_memory_is_what_the_layout_needs(kind, scale):
    """Whole words, whole panels, and a scale for each row of these and each group, or one for all of a panel."""
    word = UINT8.get(kind, 1 if kind == "f32" else 2)
    words, groups = -(-203 // word), -(-203 // 32)
    for shared in (False, True):
        packed = weight(kind, 70, 203, 32, scale, shared)
        assert (packed.N, packed.K, packed.group_size) == (70, 203, 32)
        assert packed.nbytes == 128 * 4 * words + groups * SCALES[scale] * (2 if shared else 128)
    if kind.startswith("int"):
        plain, zero = weight(kind, 70, 203, 32, scale), weight(kind, 70, 203, 32, scale, zero=True)
        assert zero.nbytes == plain.nbytes + 128 * groups


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("int3", 4, 8, 8, "f32", False, False), "no kind of weight int3"),
        (("int4", 4, 8, 8, "f64", False, False), "no type of scales f64"),
        (("int4", 0, 8, 8, "f32", False, False), "can't be packed"),
        (("int4", 4, 2**31, 2**31, "f32", False, False), "can't be packed"),
        (("int4", 4, 16, 12, "f32", False, False), "multiple of 8 or the whole row"),
        (("fp4", 4, 16, 4, "e4m3", False, False), "multiple of 8"),
        (("int8", 4, 16, 6, "f32", False, False), "multiple of 4"),
        (("bf16", 4, 16, 3, "f32", False, False), "multiple of 2"),
        (("int8", 4, 16, 32, "f32", False, False), "groups of 32 columns of 16"),
        (("int8", 4, 16, 0, "f32", False, False), "groups of 0 columns"),
        (("fp8", 4, 16, 16, "f32", False, True), "only integer codes have zero points"),
    ],
)
def test_weights_that_cannot_be(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        _native.PackedWeight(*arguments)


def test_what_does_not_fit_a_weight_is_refused():
    packed = _native.PackedWeight("int4", 8, 24, 8, "f16", False, True)
    codes, scale, zero = np.zeros((8, 12), np.uint8), np.ones((8, 3), np.uint16), np.ones((8, 3), np.int8)
    for sentence, arguments in {
        "two dimensions": (0, codes.ravel(), scale, zero),
        r"codes must be a contiguous uint8 array of shape \[8, 12\]": (0, codes[:, :11].copy(), scale, zero),
        "codes must be a contiguous": (0, np.zeros((8, 24), np.uint8)[:, ::2], scale, zero),
        "scale must be a contiguous uint16": (0, codes, scale.astype(np.float32), zero),
        r"zero must be .* int8 .* \[8, 3\]": (0, codes, scale, zero[:7].copy()),
        "zero must be a contiguous int8": (0, codes, scale, zero.astype(np.uint8)),
        "a scale is given where the weight has them": (0, codes, None, zero),
        "zero points are given where the weight has them": (0, codes, scale, None),
        "rows 1 to 9 lie outside": (1, codes, scale, zero),
        "rows -1 to 7 lie outside": (-1, codes, scale, zero),
    }.items():
        with pytest.raises(ValueError, match=sentence):
            packed.fill(*arguments)
    packed.fill(0, codes[:5].copy(), scale[:5].copy(), zero[:5].copy())
    with pytest.raises(ValueError, match="row 5 of a packed weight has not been filled"):
        gemm(_native.Product(packed, None))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp8", "uint8"), ("bf16", "uint16"), ("f16", "uint16"), ("f32", "float32")]
)
def test_codes_have_the_dtype_of_their_kind(kind, dtype):
    packed = _native.PackedWeight(kind, 2, 4, 4, "none", False, False)
    with pytest.raises(ValueError, match=rf"codes must be a contiguous {dtype} array of shape \[2, 4\]"):
        packed.fill(0, np.zeros((2, 4), np.float64), None, None)
    with pytest.raises(ValueError, match="a scale is given where the weight has them, and only there"):
        packed.fill(0, codes_of(kind, 2, 4), np.ones((2, 1), np.float32), None)


@pytest.mark.parametrize("scale, dtype", [("f32", "float32"), ("bf16", "uint16"), ("e4m3", "uint8"), ("e8m0", "uint8")])
def test_scales_have_their_dtype(scale, dtype):
    packed = _native.PackedWeight("fp4", 2, 32, 16, scale, False, False)
    with pytest.raises(ValueError, match=rf"scale must be a contiguous {dtype} array of shape \[2, 2\]"):
        packed.fill(0, codes_of("fp4", 2, 32), np.ones((2, 2), np.float64), None)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"bias": np.zeros(7, np.float32)}, "doesn't fit a weight of 8 x 24"),
        ({"bias": np.zeros(8)}, "a bias must be a contiguous float32"),
        ({"bias": np.zeros(0, np.float32)}, "a bias can't be empty"),
        ({"order": np.arange(23, dtype=np.int32)}, "an order doesn't fit"),
        ({"order": np.arange(24)}, "an order must be a contiguous int32"),
        ({"order": np.arange(1, 25, dtype=np.int32)}, "an order names column 24"),
        ({"order": np.arange(-1, 23, dtype=np.int32)}, "an order names column -1"),
        ({"row_sums": np.zeros(9, np.float32)}, "sums or an order doesn't fit"),
        ({"quantizer": "int7_token"}, "no quantizer int7_token"),
        ({"quantizer": "int8_token_asymmetric"}, "zero points of x need the sums of the weight's rows"),
        ({"quantizer": "int8_static_asymmetric", "zero": 3}, "zero points of x need the sums"),
        ({"quantizer": "int8_group", "group_size": 6}, "groups of 6 columns of x cut a word in two"),
        ({"quantizer": "int8_group", "group_size": -8}, "groups of -8 columns"),
        ({"quantizer": "int16_group"}, "groups of 0 columns of 16 bits overflow"),
        ({"quantizer": "int16_group", "group_size": 512}, "groups of 512 columns of 16 bits overflow"),
    ],
)
def test_products_that_cannot_be(keywords, sentence):
    packed = weight("int8", scale="f32")
    with pytest.raises(ValueError, match=sentence):
        gemm(_native.Product(packed, keywords.pop("bias", None), **keywords))


def test_only_integers_are_multiplied_with_integers():
    with pytest.raises(ValueError, match="only integer weights take x as integers of 16 bits"):
        gemm(_native.Product(weight("fp8", scale="f32"), None, "int16_group", group_size=128))


def test_products_that_cannot_share_a_call():
    with pytest.raises(ValueError, match="24 and 25 columns can't share x"):
        gemm(_native.Product(weight(), None), _native.Product(weight(K=25), None))
    with pytest.raises(ValueError, match="at least one weight"):
        gemm()
    call = gemm(_native.Product(weight(), None))
    assert call.K == 24
    for M, y in ((1, []), (1, [0, 0]), (-1, [0])):
        with pytest.raises(ValueError, match="M >= 0 rows and one address per result"):
            call.run(0, M, y, False)
    call.run(0, 0, [0], False)


def test_a_group_of_x_may_be_larger_than_the_row():
    gemm(_native.Product(weight("int4", K=21, scale="f32"), None, "int8_group", group_size=129))


def test_a_weight_outlives_its_python_objects():
    packed = _native.PackedWeight("f32", 70, 256, 256, "none", False, False)
    packed.fill(0, np.ones((70, 256), np.float32), None, None)
    product = _native.Product(packed, np.full(70, 3, np.float32))
    call = gemm(product)
    del packed, product
    x, y = np.ones((1, 256), np.float32), np.empty((1, 70), np.float32)
    call.run(_native.address(x), 1, [_native.address(y)], False)
    assert (y == 259).all()


def test_addresses_are_those_of_contiguous_arrays():
    array = np.zeros((4, 6), np.float32)
    assert _native.address(array) == array.ctypes.data
    for wrong in (array[:, ::2], np.asfortranarray(array), [1.0]):
        with pytest.raises((TypeError, BufferError, ValueError)):
            _native.address(wrong)


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
weight = _native.PackedWeight("f32", 256, 16, 16, "none", False, False)
weight.fill(0, np.ones((256, 16), np.float32), None, None)
gemm = _native.Gemm([_native.Product(weight, None)])
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
