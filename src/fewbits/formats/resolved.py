"""What goes into a format and what comes out of it, between the headers and the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

from fewbits.checkpoint.files import TensorInfo
from fewbits.errors import Notice
from fewbits.qweight import QLinear
from fewbits.spec import ActSpec, QuantSpec

ModuleKind = Literal["linear", "embedding", "head", "expert", "router", "norm", "conv", "other"]
Arrays = Mapping[str, NDArray[Any]]  # the values of `weight` and `weight_packed` may be StoredTensors
Warn = Callable[[str, str], None]  # code of the warning, its text


class StoredModule(NamedTuple):
    """One module as stored: the part of its tensors' names behind the module's own → header entry.

    `expected` is [N, K] where the model's family knows it. `peek` reads a small tensor's data, None in a
    header-only folder.
    """

    name: str
    kind: ModuleKind
    tensors: dict[str, TensorInfo]
    expected: tuple[int, int] | None = None
    peek: Callable[[str], NDArray[Any] | None] = lambda suffix: None


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a format made of one module, from config and headers alone.

    `shape` is [N, K], of a dense tensor its own. `layout` names the decoder inside the format. `claimed` are the
    suffixes that this module explains; those left are leftovers. `notices` are (code, text). `error` (code, text)
    means that the module can't be run: a fault of the file, or a scheme that is recognised and refused.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: str
    layout: str
    decided_by: str
    claimed: tuple[str, ...]
    notices: tuple[tuple[str, str], ...] = ()
    error: tuple[str, str] | None = None


@dataclass(slots=True)
class FormatReport:
    """What a format has to say once every module has been resolved."""

    patterns_without_match: list[str] = field(default_factory=list)
    config_keys: list[str] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    errors: list[Notice] = field(default_factory=list)
    kv_cache: ActSpec | None = None


class Format(Protocol):
    """One way of storing quantized checkpoints, opened on one checkpoint."""

    @property
    def name(self) -> str | None:
        """As the config calls it; None where nothing is quantized."""

    def rule(self, name: str, kind: ModuleKind) -> Any:
        """What the config says of a module by its name; asked once for each. Hashable."""

    def resolve(self, module: StoredModule, rule: Any) -> Resolved:
        """What it is; the same for all that are alike in kind, rule, and dtypes and shapes, unless it peeked."""

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear: ...

    def report(self) -> FormatReport: ...
