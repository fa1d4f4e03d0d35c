"""Formats: how published checkpoints store quantized weights. One file or folder each, and the ordered table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fewbits.checkpoint import Checkpoint
from fewbits.formats import compressed_tensors, dense, mxfp4, quark
from fewbits.formats.resolved import Format


class Row(NamedTuple):
    """`claim` opens the format on a checkpoint that is its own, else gives None."""

    name: str
    claim: Callable[[Checkpoint], Format | None]


FORMATS: tuple[Row, ...] = (
    Row("compressed-tensors", compressed_tensors.claim),
    Row("quark", quark.claim),
    Row("mxfp4", mxfp4.claim),
    Row("dense", dense.claim),
)


def open_format(checkpoint: Checkpoint) -> Format:
    """The first format that claims the checkpoint; the last row claims everything."""
    for row in FORMATS:
        opened = row.claim(checkpoint)
        if opened is not None:
            return opened
    raise AssertionError("the last format claims everything")
