"""The native kernels: packed weights and products, attention, elementwise operations; and the reader of headers."""

from collections.abc import Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

Array = NDArray[Any]
Tensor = TypeVar("Tensor", bound=tuple[Any, ...])

def cpu_features() -> dict[str, bool]: ...
def supported_tiers() -> list[str]:
    """Instruction set tiers that this machine runs, in ascending order; the first is `ref`."""

def tier() -> str:
    """The tier in use: the highest, or what FEWBITS_ISA says. ValueError where the machine can't run that."""

def thread_count() -> int: ...
def set_thread_count(count: int) -> None:
    """The threads that every native call shares, the caller's included; by default one per CPU of the affinity mask."""

class ReadProbe:
    """Memory to read, rounded down to whole MiB; in huge pages where the system has them."""

    def __init__(self, bytes: int) -> None: ...
    def rate(self) -> float:
        """Bytes per second that all threads read together, in one pass."""

    @property
    def bytes(self) -> int: ...

def dot_rate(dot: str) -> float:
    """Multiply-accumulates per second of all threads, in a few milliseconds; dot: "f32", "bf16" or "int8".

    0 where the tier in use has no instruction for it.
    """

def read_header(
    text: bytes, bits: dict[str, int], info: type[Tensor], file: int, start: int
) -> tuple[dict[str, Tensor], int] | None:
    """The tensors of a safetensors header by name, and where the last one ends; `start` is where the first begins.

    bits: those of an element, by dtype. info: a subclass of tuple for (dtype, shape, file, begin, nbytes). None where
    the text isn't in the very form that native/header.h shows, whatever it is then.
    """

def address(array: Array) -> int:
    """Where the data of a C-contiguous array lies. TypeError for any other array."""

def pooled(rows: int, columns: int) -> Array:
    """An uninitialized float32 [rows, columns], in memory that earlier ones of these gave back."""

class PackedWeight:
    """A weight [N, K] in the layout of the kernels, drawn in native/gemm/kernel.h. It copies what it is given.

    kind: "int4", "int8", "fp4" (e2m1), "fp8" (e4m3fn), "bf16", "f16" or "f32"; a group of `group_size` columns is a
    multiple of 8 (four bits), 4 (eight), 2 (sixteen) or 1, or K. scale: "none", "f32", "bf16", "f16", "e4m3" or
    "e8m0", the type of a scale per row and group, or, where `shared`, per panel of 64 rows and group. Integers may have
    zero points.
    """

    def __init__(self, kind: str, N: int, K: int, group_size: int, scale: str, shared: bool, zero: bool) -> None: ...
    def fill(self, row_begin: int, codes: Array, scale: Array | None, zero: Array | None) -> None:
        """Rows [row_begin, row_begin + len(codes)); every row must be filled before the weight is used.

        codes: uint8 [rows, ceil(K / 2)] (four bits, low nibble first) or [rows, K] (eight), integers offset-binary;
        uint16 [rows, K] for bf16 and f16; float32 [rows, K]. scale: [rows, ceil(K / group_size)] of uint8, uint16 or
        float32; zero: int8 of that shape, relative to the middle of the range; None where the weight has none.
        ValueError where one doesn't fit.
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

class Product:
    """What a weight is multiplied with: y = multiplier x global_scale x quantized(x[order]) @ weight.T + bias.

    quantizer: "none", "int16_group" (for integer weights; integers with a scale for up to 256 columns of x) or a name
    of `fewbits.kernels.formulas.FORMULAS`. `group_size` (0: the row): the columns of x that share a scale. `scale` and
    `zero`: those of static formulas. `global_scale`: nvfp4's multiplier. order: int32 [K], stored column j is column
    order[j] of x. row_sums: float32 [N], sums of the weight's rows before `multiplier`, for formulas with zero points.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Array | None,
        quantizer: str = "none",
        group_size: int = 0,
        scale: float = 1.0,
        zero: float = 0.0,
        global_scale: float = 1.0,
        multiplier: float = 1.0,
        order: Array | None = None,
        row_sums: Array | None = None,
    ) -> None: ...

class Gemm:
    """Products that share x, or with `apart` take their own parts of its rows and make their own parts of those of one
    y, in one pass of the thread pool. ValueError where they can't.
    """

    def __init__(self, products: Sequence[Product], apart: bool = False) -> None: ...
    def run(self, x: int, M: int, y: Sequence[int], add: bool) -> None:
        """y_i = x @ W_i.T + bias_i, added to what y_i holds where `add`.

        x and y_i are addresses of contiguous float32 [M, K] and [M, N_i]. The caller answers for them.
        """

    def run_norm(self, x: int, weight: int, eps: float, offset: float, M: int, y: Sequence[int], add: bool) -> None:
        """`run` of the rows that `rms_norm` makes of x [M, K]; a row at a time, and none is stored."""

    def run_gated(self, gate: int, up: int, activation: str, limit: float, M: int, y: Sequence[int], add: bool) -> None:
        """`run` of the rows that `gated` makes of gate and up [M, K]; a row at a time, and none is stored."""

    @property
    def K(self) -> int: ...

class Experts:
    """The experts of a layer: of each the products of gate and up, or of both as one, and that of down.

    ValueError where they don't fit together.
    """

    def __init__(self, experts: Sequence[tuple[Sequence[Product], Product]], activation: str, limit: float) -> None:
        """`activation` and `limit` are those of `ops.Activation`."""

    def run(self, x: int, chosen: int, weights: int, T: int, k: int, y: int) -> None:
        """y += the weighted sum of each row's k experts; ValueError where there is no expert of a number.

        Addresses of contiguous x and y float32 [T, H], chosen int32 [T, k], weights float32 [T, k]. The caller answers
        for them.
        """

# Attention and elementwise operations. Arguments that are int stand for addresses of contiguous arrays, whose dtype and
# shape the docstring gives; 0 where there is none. The caller answers for them.

class AttentionSpec:
    """A layer's attention: grouped queries of D numbers, of which rotary_dim from rotary_begin on are rotated.

    Norms float32 [D], sinks float32 [heads]; see native/attention/attention.h. ValueError where sizes can't be.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        D: int,
        value_D: int,
        rotary_begin: int,
        rotary_dim: int,
        interleaved: bool,
        q_norm: int,
        k_norm: int,
        norm_eps: float,
        norm_offset: float,
        scale: float,
        window: int,
        sinks: int,
    ) -> None: ...
    def rope_and_append(self, q: int, k: int, v: int, step: Step, cache: LayerCache, cos: int, sin: int) -> None:
        """Norm and rotate q in place and k; store k and v in the cache at their slots.

        q float32 [T, heads * D], k [T, kv_heads * D], v [T, kv_heads * value_D], cos and sin [positions,
        rotary_dim / 2] up to the step's highest.
        """

    def attend(self, q: int, out: int, step: Step, cache: LayerCache) -> None:
        """softmax(scale q K^T) V over what each token sees, into out; q float32 [T, heads * D], out [T, heads *
        value_D]. ValueError where the step's lengths don't fit the cache.
        """

class LayerCache:
    """Arrays [pages, kv_heads, page_size, D or value_D] of kind "f32", "bf16", "f16", "fp8" or "int8".

    Values in the array of the keys are their first value_D numbers. Scales: float32 [kv_heads] for fp8, [pages,
    kv_heads, page_size] for int8, which are stored with the keys and values. ValueError where they don't go together.
    """

    def __init__(self, keys: int, values: int, page_size: int, kind: str, k_scale: int, v_scale: int) -> None: ...

class Step:
    """The tokens of a pass. It keeps its arrays. ValueError where they don't fit together."""

    def __init__(
        self,
        slots: Array,
        positions: Array,
        query_start: Array,
        kv_len: Array,
        block_table: Array,
        mask: Array | None,
        wanted: Array | None = None,
    ) -> None:
        """int64 [T] twice, int32 [sequences + 1], int32 [sequences], int32 [sequences, max_pages], uint8 [T, T]: as
        `kernels.batch.Batch` has them. `wanted`, int64 [R]: the rows whose results are, or all.
        """

    @property
    def wanted(self) -> list[int] | None:
        """None where all are. ValueError where they aren't the last of their sequences, or there is a mask."""

    def of_last(self) -> Step:
        """The pass that the wanted rows are."""

    def ahead(self, rows: Sequence[int], page_size: int) -> list[Step]:
        """`ops.Ops.ahead`. ValueError where the block table has no pages for that."""

    @property
    def T(self) -> int: ...
    @property
    def highest(self) -> int:
        """Position, 0 where there is none."""

class Source:
    """Rows that a step of a program takes: a value's, or computed of values on the way."""

    @staticmethod
    def plain(x: int) -> Source: ...
    @staticmethod
    def normed(x: int, weight: int, eps: float, offset: float) -> Source: ...
    @staticmethod
    def gated(gate: int, up: int, activation: str, limit: float) -> Source: ...

class Program:
    """Steps on values, which have numbers: first the inputs', then what `value` gives. See native/program/program.h.

    Arrays whose addresses a step's arguments have must outlive it.
    """

    def __init__(self, inputs: int) -> None: ...
    def value(self, width: int) -> int:
        """A new value [T, width], which the next step makes."""

    def multiply(self, gemm: Gemm, x: Source, y: Sequence[int], add: bool) -> None: ...
    def compute(self, x: Source, width: int, y: int) -> None: ...
    def rope_and_append(self, spec: AttentionSpec, q: int, k: int, v: int, cache: int, rotation: int) -> None:
        """v is -1 where keys hold the values; `cache` and `rotation` number `run`'s."""

    def attend(self, spec: AttentionSpec, q: int, out: int, cache: int) -> None: ...
    def scale_by_sigmoid(self, x: int, gates: int, heads: int, width: int) -> None: ...
    def add(self, x: int, to: int, width: int) -> None: ...
    def copy(self, x: int, y: int, heads: int, width: int, begin: int, count: int, y_width: int, place: int) -> None:
        """Channels [begin, begin + count) of each of the `heads` parts, `width` wide, to those of y from `place` on."""

    def route(self, routing: Routing, logits: int, chosen: int, weights: int) -> None: ...
    def experts(self, experts: Experts, x: int, chosen: int, weights: int, k: int, y: int) -> None: ...
    def embed(self, table: EmbeddingTable, tokens: int, y: int) -> None:
        """`tokens` is an input, int64 [T]."""

    def best(
        self, logits: int, columns: int, ids: Sequence[int], among: bool, to: int, before: int, after: int
    ) -> None:
        """`ops.Ops.best_tokens`; `to`, `before` and `after` are inputs, int64 and float32 [T]."""

    def narrow(self, values: Sequence[int], widths: Sequence[int]) -> None:
        """`ops.Ops.narrow`; no later step may use others that were made before."""

    @property
    def steps(self) -> int: ...
    def widths(self) -> tuple[int, int]:
        """Numbers of memory that a token takes in `run`, and from `narrow` on a wanted one. No step may follow."""

    def run(
        self,
        inputs: Sequence[int],
        memory: int,
        step: Step,
        caches: Sequence[LayerCache],
        rotations: Sequence[tuple[int, int]],
        nanoseconds: int,
    ) -> None:
        """Every step; an exception of a signal's handler ends it between two. memory float32 [T, the sum of widths()];
        rotations are cosines and sines; nanoseconds, int64 [steps] or 0: what each took is added.
        """

    def chain(
        self,
        first: Program,
        its: Sequence[int],
        inputs: Sequence[tuple[int, int]],
        memory: int,
        step: Step,
        rows: Sequence[int],
        page_size: int,
        caches: Sequence[LayerCache],
        rotations: Sequence[tuple[int, int]],
        nanoseconds: int,
        its_nanoseconds: int,
        chances: int,
        least: float,
    ) -> int:
        """`ops.Fused.chain`: inputs of the first pass; addresses of those of the others, and how many bytes each lies
        further on in the next pass.
        """

def rms_norm(x: int, weight: int, y: int, T: int, H: int, eps: float, offset: float) -> None:
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) for rows [T, H] of float32."""

def gated(gate: int, up: int, y: int, T: int, I: int, activation: str = "silu", limit: float = 0.0) -> None:
    """y = activation(gate) * up, [T, I] of float32, as `ops.Activation` says. ValueError for another name."""

def scale_by_sigmoid(x: int, gate: int, T: int, heads: int, width: int) -> None:
    """x[t, h, :] *= sigmoid(gate[t, h]), in place; x float32 [T, heads, width], gate float32 [T, heads]."""

class Routing:
    """Which experts a token goes to: `native/experts/route.h`, `ops.Routing`. bias float32 [experts] is added for the
    choice alone. ValueError where numbers can't be.
    """

    def __init__(
        self,
        experts: int,
        top_k: int,
        score: str,
        normalize: bool,
        epsilon: float,
        scale: float,
        groups: int,
        kept_groups: int,
        group_best: int,
        bias: int,
    ) -> None: ...
    def route(self, logits: int, T: int, chosen: int, weights: int) -> None:
        """Of logits float32 [T, experts] the best, int32 [T, top_k], best first, and their weights, float32."""

def argmax(x: int, R: int, V: int, columns: int) -> None:
    """Into columns int64 [R]: of each row of x float32 [R, V] the first NaN, or else the first of the largest."""

class EmbeddingTable:
    """What an `Embedding` holds, which must outlive it."""

class Embedding:
    """A table [N, K] whose rows are dequantized when asked for. It keeps the arrays that it is given.

    kind, codes and group_size as for `PackedWeight` and its `fill`; scale and zero are float32, zero points in the
    units of the codes.
    """

    def __init__(
        self, kind: str, codes: Array, K: int, scale: Array | None, zero: Array | None, group_size: int
    ) -> None: ...
    def rows(self, ids: int, T: int, y: int) -> None:
        """Row ids[t] (int64 [T]) into y[t] (float32 [T, K]). ValueError for an id that isn't in the table."""

    @property
    def table(self) -> EmbeddingTable: ...
    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
