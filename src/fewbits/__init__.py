"""fewbits runs quantized language-model checkpoints exactly as they were published.

    llm = fewbits.LLM("examples/stdlib-lm/w4a16-asym")
    [result] = llm.generate("def read_json(path):", fewbits.SamplingParams(max_tokens=64))
    print(result.text)

`inspect(folder)` is the plan of a checkpoint, `load_linear(folder, name)` one of its projections. Importing
this module loads nothing heavy, starts no thread and installs no signal handler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.engine.llm import LLM
    from fewbits.engine.request import Result, SamplingParams
    from fewbits.errors import FewbitsError
    from fewbits.load import inspect, load_linear

__all__ = ["LLM", "FewbitsError", "Result", "SamplingParams", "__version__", "inspect", "load_linear"]

_HOMES = {
    "LLM": "fewbits.engine.llm",
    "Result": "fewbits.engine.request",
    "SamplingParams": "fewbits.engine.request",
    "FewbitsError": "fewbits.errors",
    "inspect": "fewbits.load",
    "load_linear": "fewbits.load",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("fewbits")
        except metadata.PackageNotFoundError:  # run from a source tree that isn't installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
