"""MXFP4 as gpt-oss is published: experts in blocks of 32 fp4 codes under one exponent, all else in full precision.

    <stack>_blocks  uint8 [N, K / 32, 16]   two codes a byte, the lower one first
    <stack>_scales  uint8 [N, K / 32]       exponents, 2^(s - 127)
    <stack>_bias    floats [N]

of each expert. Source: transformers/integrations/mxfp4.py, convert_moe_packed_tensors.
"""

from __future__ import annotations

from dataclasses import replace

import regex

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import Config
from fewbits.checkpoint.files import DTYPES
from fewbits.errors import Notice
from fewbits.formats import scales, values
from fewbits.formats.dense import Dense
from fewbits.formats.find import find_config
from fewbits.formats.resolved import Arrays, FormatReport, ModuleKind, Resolved, StoredModule, Warn
from fewbits.formats.stored import failed, present
from fewbits.qweight import QLinear, QWeight
from fewbits.spec import QuantSpec, WeightSpec

_BLOCK = 32  # numbers that share an exponent
_SPEC = WeightSpec("float", 4, (1, _BLOCK), "float8_e8m0fnu", exponent=2, mantissa=1)
LAYOUT = "mxfp4-blocks"
Rule = str | None  # the entry of modules_to_not_convert that a module's name falls under


def claim(checkpoint: Checkpoint) -> MXFP4 | None:
    """The format, opened, where the checkpoint's quantization block says mxfp4."""
    config = find_config(checkpoint)
    if config is None or config.data.get("quant_method") != "mxfp4":
        return None
    return MXFP4(config)


def resolve_blocks(module: StoredModule) -> Resolved | None:
    """What blocks and their exponents make; None of a module that has none."""
    blocks, exponents = module.tensors.get("blocks"), module.tensors.get("scales")
    if blocks is None or exponents is None:
        return None
    fits = blocks.dtype == exponents.dtype == "U8" and blocks.shape == (*exponents.shape, _BLOCK // 2)
    if not fits or len(exponents.shape) != 2:
        text = (
            f"blocks {blocks.dtype} {list(blocks.shape)} and scales {exponents.dtype} {list(exponents.shape)}"
            f" aren't uint8 [N, K / {_BLOCK}, {_BLOCK // 2}] and [N, K / {_BLOCK}]"
        )
        return failed(module, LAYOUT, ("tensors-disagree", text))
    shape = (exponents.shape[0], exponents.shape[1] * _BLOCK)
    return Resolved(QuantSpec(_SPEC), shape, "", LAYOUT, "its tensors", present(module, ("blocks", "scales", "bias")))


def decode_blocks(module: str, resolved: Resolved, arrays: Arrays) -> QLinear:
    rows, columns = resolved.shape
    codes = arrays["blocks"].reshape(rows, columns // 2)
    weight = QWeight(_SPEC, (rows, columns), codes, arrays["scales"].view(DTYPES["F8_E8M0"][1]))
    scales.check(weight, module, "scales")
    return QLinear(weight, bias=values.bias(arrays.get("bias"), f"{module}.bias"))


class MXFP4:
    name: str | None = "mxfp4"

    def __init__(self, config: Config) -> None:
        config.ignore("quant_method", "dequantize")  # the latter is what a program did when it loaded the model
        self._config = config
        self._kept = dict.fromkeys(map(str, config.get("modules_to_not_convert", list, [])), False)
        self._plain = Dense(None)  # what has no blocks

    def rule(self, name: str, kind: ModuleKind) -> Rule:
        """Entries name modules, a * any part of a name; what is below a module is meant too."""
        for entry in self._kept:
            if regex.match(regex.escape(entry).replace(r"\*", "[^.]*") + r"(\.|\[|$)", name):
                self._kept[entry] = True
                return entry
        return None

    def resolve(self, module: StoredModule, rule: Rule) -> Resolved:
        resolved = resolve_blocks(module)
        if resolved is None:
            return self._plain.resolve(module, self._plain.rule(module.name, module.kind))
        if rule is None or resolved.error is not None:
            return resolved
        text = f"the config excludes it, but it is stored as {_SPEC}; it runs as stored"
        return replace(resolved, notices=(("ignored-but-quantized", text),))

    def decode(self, module: str, resolved: Resolved, arrays: Arrays, warn: Warn) -> QLinear:
        if resolved.layout != LAYOUT:
            return self._plain.decode(module, resolved, arrays, warn)
        return decode_blocks(module, resolved, arrays)

    def report(self) -> FormatReport:
        unmatched = [entry for entry, hit in self._kept.items() if not hit]
        warnings = [Notice("pattern-no-match", "", f"{entry} matches no module") for entry in unmatched]
        return FormatReport(unmatched, list(self._config.leftovers()), warnings)
