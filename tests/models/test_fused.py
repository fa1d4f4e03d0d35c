"""Layers as one native call beside the same layers operation by operation, over files of every family and scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.engine.kvcache import KVCache, Part
from fewbits.kernels.batch import CacheLayer
from fewbits.kernels.cpu.ops import CpuOps
from fewbits.kernels.cpu.program import Program
from fewbits.load import Loaded, load
from fewbits.models.layer import Stack

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FOLDERS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))

# Latents that are quantized, which NumPy does; layers with a kernel of the reference.
BY_OPERATIONS = {"deepseek-v2-w8a8-dynamic"}


class Separate(CpuOps):
    def fused(self, block: Callable[..., None], widths: Sequence[int], caches: int) -> Program | None:
        return None


def logits(loaded: Loaded) -> list[np.ndarray]:
    """Of a prompt beside another and a step of both, and what taps give."""
    cache = KVCache(loaded.cache_layers, max_pages=16)
    vocab, layers = loaded.decoder.config.vocab, len(loaded.decoder.config.layers)
    first, second = [[(7 * i + start) % vocab for i in range(20)] for start in (3, 11)]
    outputs = []
    for parts in ([Part(0, first[:19], 19), Part(1, second[:5], 5)], [Part(1, second[5:8], 3), Part(0, first[19:], 1)]):
        output = loaded.decoder.forward(cache.batch(parts), cache, taps=(1, layers))
        outputs += [output.logits, *output.taps]
    return outputs


@pytest.mark.parametrize("name", FOLDERS)
def test_layers_in_one_call_give_the_same_bits(name: str) -> None:
    fused, separate = (load(FIXTURES / name, allow_reference=True, ops=ops) for ops in (None, Separate()))
    for ours, expected in zip(logits(fused), logits(separate), strict=True):
        np.testing.assert_array_equal(ours, expected)
    runs: list[Any] = [run for stack in fused.decoder._stacks.values() for *_, run in stack._parts]
    native = not any(row.kernel and row.kernel.reference for row in fused.plan.rows)
    assert all(isinstance(run, Program) for run in runs) == (native and name not in BY_OPERATIONS)


@pytest.mark.parametrize("taps", [(), (0,), (5,), (2,), (1, 3, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("pattern", ["nnnnn", "yyyyy", "ynyny", "nyynn", "yyyyn"])
def test_layers_that_are_one_call_and_others_take_turns(pattern: str, taps: tuple[int, ...]) -> None:
    """Of "y" a program is made, "n" looks into numbers; each leaves x otherwise than the one before."""
    ops = CpuOps()

    def fuses(x: Any, step: Any, cache: Any) -> None:
        ops.scale_by_sigmoid(x, ops.cut(x, 0, 1))

    def looks(x: Any, step: Any, cache: Any) -> None:
        x[:, 1] += 1.5

    layers: list[Any] = [fuses if letter == "y" else looks for letter in pattern]
    cache = KVCache([CacheLayer(1, 16, "f32")] * len(layers), max_pages=4)
    step = ops.begin(cache.batch([Part(0, [0] * 3)]))
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    expected, given = [x.copy()], x.copy()
    for layer in layers:
        layer(x, step, None)
        expected.append(x.copy())
    stack = Stack(layers, 8, ops, taps)
    assert [isinstance(run, Program) for *_, run in stack._parts] == [letter == "y" for letter, _ in groupby(pattern)]
    tapped = [np.empty_like(x) for _ in taps]
    stack(given, step, cache.layers, tapped)
    np.testing.assert_array_equal(given, expected[-1])
    for tap, state in zip(taps, tapped, strict=True):
        np.testing.assert_array_equal(state, expected[tap])
