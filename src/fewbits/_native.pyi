"""The native kernels: packed weights and products (this part), attention and elementwise operations (below)."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

def cpu_features() -> dict[str, bool]: ...
def supported_tiers() -> list[str]:
    """Instruction set tiers that this machine runs, in ascending order; the first is `ref`."""

def tier() -> str:
    """The tier in use: the highest, or what FEWBITS_ISA says. ValueError where the machine can't run that."""

def thread_count() -> int: ...
def set_thread_count(count: int) -> None:
    """The threads that every native call shares, the caller's included; by default one per CPU of the affinity mask."""

def address(array: Array) -> int:
    """Where the data of a C-contiguous array lies. TypeError for any other array."""

class PackedWeight:
    """A weight [N, K] in the layout of the kernels, drawn in native/gemm/kernel.h. It copies what it is given.

    kind: "int4", "int8", "bf16", "f16" or "f32". Integers have a scale, and a zero point where `zero`, per row and
    group of `group_size` columns: a multiple of 8 (int4) or 4 (int8), or K. Floats have group_size K and neither.
    """

    def __init__(self, kind: str, N: int, K: int, group_size: int, zero: bool) -> None: ...
    def fill(self, row_begin: int, codes: Array, scale: Array | None, zero: Array | None) -> None:
        """Rows [row_begin, row_begin + len(codes)); every row must be filled before the weight is used.

        codes: uint8 [rows, ceil(K / 2)] for int4 (low nibble first), uint8 [rows, K] for int8, both offset-binary;
        uint16 [rows, K] for bf16 and f16; float32 [rows, K]. scale and zero: float32 [rows, ceil(K / group_size)],
        None where the weight has none; zero points are in the units of the codes. ValueError where one doesn't fit.
        """

    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Memory in use, padding included."""

class Gemm:
    """Products of several weights [N_i, K] with the same x, in one pass of the thread pool.

    biases: float32 [N_i] or None for each weight.
    """

    def __init__(self, weights: Sequence[PackedWeight], biases: Sequence[Array | None]) -> None: ...
    def run(self, x: int, M: int, y: Sequence[int], add: bool) -> None:
        """y_i = x @ W_i.T + bias_i, added to what y_i holds where `add`.

        x and y_i are addresses of contiguous float32 [M, K] and [M, N_i]. The caller answers for them.
        """

    @property
    def K(self) -> int: ...
