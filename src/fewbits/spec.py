"""What stored numbers mean: frozen, hashable descriptions without arrays.

A `QuantSpec` is a weight spec with or without an activation spec; it is a dictionary key, a test id and a phrase
in an error message: `uint4 g128 asym × a16`, `int8 channel × int8 token dynamic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

WHOLE = 0  # in `WeightSpec.block`: the block spans the whole axis

Kind = Literal["int", "uint", "float"]
Per = Literal["tensor", "token", "group"]
ScaleRounding = Literal["even", "floor", "ceil"]
ZeroPoint = Literal["none", "integer", "float"]

_FLOAT_NAMES = {
    (2, 1): "fp4",
    (2, 3): "fp6",
    (3, 2): "fp6e3m2",
    (4, 3): "fp8",
    (5, 2): "fp8e5m2",
    (5, 10): "float16",
    (8, 7): "bfloat16",
    (8, 23): "float32",
    (11, 52): "float64",
}


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Number format of a stored weight and the block of values that shares a scale.

    `block` is (rows, columns) of `[N, K]`, `WHOLE` for an entire axis: tensor (WHOLE, WHOLE), channel
    (1, WHOLE), group (1, g), FP8 block (128, 128). `scale_dtype` is a NumPy/ml_dtypes name, None for weights
    that aren't quantized. `int` means symmetric: the zero point is 2^(bits-1) of the offset-binary codes.
    """

    kind: Kind
    bits: int
    block: tuple[int, int] = (WHOLE, WHOLE)
    scale_dtype: str | None = None
    exponent: int = 0
    mantissa: int = 0
    zero_point: ZeroPoint = "none"
    global_scale: bool = False
    act_order: bool = False

    @property
    def quantized(self) -> bool:
        return self.scale_dtype is not None

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """`block` with `WHOLE` replaced by the axis of `shape` ([N, K])."""
        return (self.block[0] or shape[0], self.block[1] or shape[1])

    def blocks_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale of a weight of `shape` ([N, K])."""
        rows, cols = self.block_of(shape)
        return (-(-shape[0] // max(rows, 1)), -(-shape[1] // max(cols, 1)))

    @property
    def number(self) -> str:
        """Name of the codes; "unknown" where the tensors don't tell (no bits)."""
        if not self.bits:
            return "unknown"
        if self.kind == "float":
            return _FLOAT_NAMES.get((self.exponent, self.mantissa), f"float{self.bits}e{self.exponent}m{self.mantissa}")
        return f"{self.kind}{self.bits}"

    def __str__(self) -> str:
        if not self.quantized:
            return self.number
        match self.block:
            case (0, 0):
                block = "tensor"
            case (1, 0):
                block = "channel"
            case (1, cols):
                block = f"g{cols}"
            case (rows, cols):
                block = f"{rows}x{cols}"
        parts = [self.number, block + ("+global" if self.global_scale else "")]
        if self.scale_dtype == "float8_e8m0fnu":
            parts.append("e8m0")
        if self.zero_point != "none":
            parts.append("asym" if self.zero_point == "integer" else "float-zero")
        if self.act_order:
            parts.append("act-order")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class ActSpec:
    """How a linear's input is quantized before the product. `group_size` is set where `per` is "group".

    `scale_rounding`: how the largest magnitude of a group of MXFP4 or MXFP6 becomes a power of two, "even" as an
    element is rounded.
    """

    kind: Literal["int", "float"]
    bits: int
    per: Per
    dynamic: bool
    group_size: int | None = None
    symmetric: bool = True
    global_scale: bool = False
    scale_dtype: str | None = None
    exponent: int = 0
    mantissa: int = 0
    scale_rounding: ScaleRounding = "even"

    def __str__(self) -> str:
        if self.kind == "float":
            number = _FLOAT_NAMES.get((self.exponent, self.mantissa), f"float{self.bits}")
        else:
            number = f"int{self.bits}"
        if self.global_scale:
            return f"{number} local"
        per = self.per if self.per != "group" else f"g{self.group_size}" if self.group_size else "head"
        if self.scale_dtype == "float8_e8m0fnu":
            per += " e8m0" if self.scale_rounding == "even" else f" e8m0-{self.scale_rounding}"
        text = f"{number} {per} {'dynamic' if self.dynamic else 'static'}"
        return text if self.symmetric else f"{text} asym"


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A weight spec with or without an activation spec; `act` None is A16, unquantized activations."""

    weight: WeightSpec
    act: ActSpec | None = None

    def __str__(self) -> str:
        if not self.weight.quantized and self.act is None:
            return str(self.weight)
        return f"{self.weight} × {self.act or 'a16'}"


_DENSE = {
    "bfloat16": WeightSpec("float", 16, exponent=8, mantissa=7),
    "float16": WeightSpec("float", 16, exponent=5, mantissa=10),
    "float32": WeightSpec("float", 32, exponent=8, mantissa=23),
    "float64": WeightSpec("float", 64, exponent=11, mantissa=52),
}


def dense(dtype: str) -> WeightSpec:
    """The spec of a weight that isn't quantized. Raises KeyError for a dtype that isn't a float of 16 bits or more."""
    return _DENSE[dtype]


class HeadRows(NamedTuple):
    """A weight whose rows are, head by head, so many that make keys, and so many that make values."""

    keys: int
    values: int


def widened(spec: QuantSpec) -> QuantSpec:
    """What a router runs as: floats of 16 bits as float32, so that nothing is rounded before experts are chosen."""
    narrow = not spec.weight.quantized and spec.weight.kind == "float" and spec.weight.bits == 16
    return QuantSpec(dense("float32"), spec.act) if narrow else spec
