import time

import pytest

from fewbits.engine import limits, machine
from fewbits.errors import UsageError


def test_the_machine_is_described_quickly() -> None:
    begin = time.perf_counter()
    found = machine.describe()
    # 150 ms of measuring; a busy machine may take several times as long.
    assert time.perf_counter() - begin < 3
    assert found["cpu"]["tier"] in found["cpu"]["tiers"]
    assert found["threads"] >= 1
    # No memory reads less than 200 MB/s, or more than 10 TB/s.
    assert 0.2 < found["limits"]["read_gb_s"] < 10_000


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
    assert limits.read_rate(1) is None


def test_a_tier_that_does_not_exist_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("FEWBITS_ISA=abacus is not a tier")

    monkeypatch.setattr("fewbits._native.tier", refuse)
    with pytest.raises(UsageError) as caught:
        machine.prepare()
    assert caught.value.code == "isa-unsupported"
