"""Checkpoints without a quantization block that fewbits reads: every module is what its tensors hold.

Where the block belongs to a method that isn't read yet, its name is reported as an error and the plan shows what
the tensors tell.
"""

from __future__ import annotations

from fewbits.checkpoint import Checkpoint
from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import Notice
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.compressed_tensors.config import parse
from fewbits.formats.find import find_config
from fewbits.formats.resolved import FormatReport


class Dense(CompressedTensors):
    """No rules at all: the module resolver of compressed-tensors with an empty block."""

    def __init__(self, name: str | None) -> None:
        super().__init__(parse(Config({}, "config.json", "quantization_config")))
        self.name = name

    def report(self) -> FormatReport:
        report = super().report()
        if self.name is not None:
            text = f"quantization method {shorten(self.name)} isn't read yet; shown is what the tensors tell"
            report.errors.append(Notice("format-unknown", "", text))
        return report


def claim(checkpoint: Checkpoint) -> Dense:
    """Claims whatever no other format has claimed."""
    block = find_config(checkpoint)
    if block is None:
        return Dense(None)
    block.ignore(*block.data)
    named = block.data.get("quant_method") or block.data.get("quant_algo")  # the latter is ModelOpt's
    return Dense(str(named or "without a name"))
