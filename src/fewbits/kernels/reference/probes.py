"""Inputs that bring a kernel's faults to light, the same every time.

Random x hides much: what one group of columns does wrong drowns in the others, and rounding of x covers the rest. So
most rows hold numbers that bfloat16 has exactly, and some look at few columns at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_WINDOWS = 16  # rows that each look at a part of the columns


def probes(K: int) -> tuple[list[str], Array]:
    """What each row is, and the rows: float32 [M, K], an odd M."""
    random = np.random.default_rng(K)
    normal = random.standard_normal((8, K)).astype(np.float32)
    exact = normal.view(np.uint32) & np.uint32(0xFFFF0000)  # cut off to what bfloat16 holds
    short = exact.view(np.float32)
    outliers = short[3] * np.float32(2.0**-8)
    outliers[K // 3] = 256
    rows = {
        "zeros": np.zeros(K),
        "random numbers": normal[0],
        "more random numbers": normal[1],
        "random bfloat16 numbers": short[2],
        "random numbers of one sign": np.abs(short[4]),
        "huge numbers": short[5] * np.float32(2.0**64),
        "tiny numbers": short[6] * np.float32(2.0**-64),
        "numbers of all magnitudes": np.ldexp(short[7], random.integers(-20, 20, K)),
        "one outlier": outliers,
        "ones": np.ones(K),
        "a constant that bfloat16 rounds": np.full(K, 0.1),
        "alternating signs": 1 - 2 * (np.arange(K) % 2),
        "a spike in the first column": np.eye(1, K)[0],
        "a spike in the middle": -np.eye(1, K, K // 2)[0],
        "a spike in the last column": np.eye(1, K, K - 1)[0],
    }
    edges = np.linspace(0, K, min(_WINDOWS, K) + 1).astype(int).tolist()
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        row = np.zeros(K)
        row[begin:end] = random.choice([-1.0, 1.0], end - begin)
        rows[f"signs in columns {begin} to {end - 1}"] = row
    if len(rows) % 2 == 0:
        rows["zeros again"] = np.zeros(K)
    return list(rows), np.stack(list(rows.values())).astype(np.float32)
