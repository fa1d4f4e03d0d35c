"""Rotary embedding: what a layer rotates by, and the tables of cosines and sines over positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles are position x inv_freq[i]; cosine and sine are multiplied by `factor`.

    2 x len(inv_freq) channels of a head, from channel `begin` on, are rotated; the rest pass through. Pairs are (i, i +
    half), or (2i, 2i + 1) when `interleaved`, from there on.
    """

    inv_freq: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False
    begin: int = 0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


class RopeTable:
    """Cosines and sines of one `Rope` for positions from 0 on; rows are computed when first asked for."""

    def __init__(self, rope: Rope) -> None:
        # transformers multiplies float32 positions and frequencies; models are trained on those angles.
        self._inv_freq = np.array(rope.inv_freq, np.float32)
        self._factor = rope.factor
        self._cos = np.empty((0, len(rope.inv_freq)), np.float32)
        self._sin = np.empty((0, len(rope.inv_freq)), np.float32)

    def rows(self, positions: NDArray[Any], highest: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """(cos, sin), float32 [T, rotary_dim / 2], at int64 positions [T]; `highest` is the largest."""
        cos, sin = self.upto(highest)
        return cos[positions], sin[positions]

    def upto(self, highest: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """(cos, sin), float32 [P, rotary_dim / 2] of positions 0 to P - 1; P is more than `highest`."""
        if highest >= len(self._cos):
            self._grow(highest + 1)
        return self._cos, self._sin

    def _grow(self, needed: int) -> None:
        begin, end = len(self._cos), max(needed, 2 * len(self._cos), 512)
        angles = np.arange(begin, end, dtype=np.float32)[:, np.newaxis] * self._inv_freq
        wide = angles.astype(np.float64)
        cos, sin = np.cos(wide) * self._factor, np.sin(wide) * self._factor
        self._cos = np.concatenate((self._cos, cos.astype(np.float32)))
        self._sin = np.concatenate((self._sin, sin.astype(np.float32)))
