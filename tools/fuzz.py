"""Fuzzing by hand, guided by coverage: the mutations and checks of tests/fuzz under libFuzzer, for hours if wanted.

In an environment of its own that has what fewbits needs, on Python 3.11 or 3.12, from the root of the checkout:

    pip install atheris && pip install .
    python tools/fuzz.py build/fuzz -max_total_time=600

`build/fuzz` keeps the inputs that reached new code; every option of libFuzzer goes behind it. What fails is written to
crash-<hash>, and `python tools/fuzz.py crash-<hash>` runs it again; --show prints what its folder holds. A finding
becomes a row of tests/hostile before the fault is mended. `FUZZ_KINDS=config,words,data,file,made` chooses what is
changed, FUZZ_NATIVE=1 runs the model with the native kernels instead of the reference.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

with atheris.instrument_imports(include=["fewbits"]):
    import check

    from fewbits.kernels.cpu.ops import CpuOps

import mutate  # noqa: E402
from limits import limited  # noqa: E402

MEGABYTES, SECONDS = 400, 60
KINDS = os.environ.get("FUZZ_KINDS", "config,words,data,file,made").split(",")
NATIVE = os.environ.get("FUZZ_NATIVE") == "1"
SHOW = "--show" in sys.argv


class Consumed:
    """Choices that libFuzzer's bytes make; 0, the plainest, once there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = atheris.FuzzedDataProvider(data)

    def below(self, count: int) -> int:
        return int(self._data.ConsumeIntInRange(0, count - 1))


def folder_of(data: bytes) -> mutate.Folder:
    choices = Consumed(data)
    kind = mutate.pick(choices, KINDS)
    if kind == "made":
        return mutate.made_up(choices)
    return mutate.mutated(choices, [kind] if choices.below(2) else [one for one in KINDS if one != "made"])


def one(data: bytes) -> None:
    made = folder_of(data)
    if SHOW:
        print(made.config, {name: (array.dtype, array.shape) for name, array in made.tensors.items()}, made.flips)
    with limited(SECONDS, MEGABYTES):
        check.run(made.write(FOLDER), CpuOps() if NATIVE else None)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        FOLDER = Path(temporary)
        atheris.Setup([argument for argument in sys.argv if argument != "--show"], one)
        atheris.Fuzz()
