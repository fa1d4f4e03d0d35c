import os
import subprocess
import sys
import time

import pytest

from fewbits.engine import limits, machine
from fewbits.errors import UsageError


def test_the_machine_is_described_quickly() -> None:
    begin = time.perf_counter()
    found = machine.describe()
    # 300 ms of measuring; a busy machine may take several times as long.
    assert time.perf_counter() - begin < 3
    assert found["cpu"]["tier"] in found["cpu"]["tiers"]
    assert found["threads"] >= 1
    # No memory reads less than 200 MB/s, or more than 10 TB/s.
    assert 0.2 < found["limits"]["read_gb_s"] < 10_000


def test_peaks_are_ordered_as_the_instructions_are() -> None:
    """A 512-bit register holds 16 float32, 32 bfloat16 or 64 int8, and no CPU does less with more of them."""
    rates = limits.dot_rates()
    if "f32" not in rates:
        pytest.skip("no vector instructions that are measured")
    # A core does at least one 256-bit product a cycle at 1 GHz; the busiest machine leaves a tenth of that.
    assert 0.8e9 < rates["f32"]
    for slower, faster in (("f32", "bf16"), ("bf16", "int8"), ("f32", "int8")):
        if slower in rates and faster in rates:
            assert rates[faster] > 1.2 * rates[slower]


def test_a_tier_without_vector_instructions_has_no_peaks() -> None:
    code = "from fewbits.engine import limits; assert limits.dot_rates() == {}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "FEWBITS_ISA": "ref"}, check=True)


def test_free_memory_is_that_of_the_tightest_limit(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\n",
        "/sys/fs/cgroup/memory.max": "500000\n",
        "/sys/fs/cgroup/memory.current": "400000\n",
    }

    class Path:
        def __init__(self, name: str) -> None:
            self.name = name

        def read_text(self) -> str:
            if self.name not in files:
                raise FileNotFoundError(self.name)
            return files[self.name]

    monkeypatch.setattr(limits, "Path", Path)
    assert limits.available_memory() == 100_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert limits.available_memory() == 800 * 1024


def test_no_measurement_without_the_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 100 << 20)
    assert limits.ReadMeter().rate() is None


def test_a_tier_that_does_not_exist_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("FEWBITS_ISA=abacus is not a tier")

    monkeypatch.setattr("fewbits._native.tier", refuse)
    with pytest.raises(UsageError) as caught:
        machine.prepare()
    assert caught.value.code == "isa-unsupported"
