"""What the compiler made: tier code stays in tier files, and none of it can replace code that every CPU runs.

An inline function compiled with AVX-512 is a weak symbol like the same function compiled without; the linker keeps one
of them for both. The compiled objects are looked at in `build/`, where the installation leaves them.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fewbits import _native

ROOT = Path(__file__).parents[2]
TIERS = {
    "avx2": r"%ymm",
    "avx2_vnni": r"vpdpbusd .*%ymm",
    "avx512": r"%zmm",
    "avx512_vnni": r"vpdpbusd .*%zmm",
    "avx512_bf16": r"vdpbf16ps .*%zmm",
}
WIDE = re.compile(r"%[yz]mm|%k[0-7]\b")


def tier_of(path):
    """The tier in the name `<family>_<tier>.cc.o`, None for code that every CPU runs."""
    stem = path.name.removesuffix(".cc.o")
    return next((tier for tier in TIERS if stem.endswith(f"_{tier}")), None)


def objects():
    """Compiled objects of the sources that are there now; without tests, and without sanitizers' builds."""
    found = []
    for build in sorted((ROOT / "build").glob("*/native/CMakeFiles")):
        if build.parts[-3].startswith("native-"):
            continue
        for path in build.rglob("*.o"):
            folder = path.relative_to(build).parent
            own = folder.parts[0] in ("fewbits_native.dir", "_native.dir")
            source = ROOT.joinpath("native", *folder.parts[1:], path.name.removesuffix(".o"))
            if not own or source.exists():
                found.append(path)
    return found


@pytest.fixture(scope="module")
def compiled():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there are no tier files for this processor")
    found = objects()
    if not found:
        pytest.skip("build/ holds no objects: the package was built elsewhere")
    return found


def output(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def test_every_tier_of_every_family_is_there(compiled):
    names = {path.name for path in compiled}
    for family in ("gemm", "attention", "elementwise"):
        for tier in ("ref", "avx2", "avx512"):
            assert f"{family}_{tier}.cc.o" in names
    assert {"gemm_avx2_vnni.cc.o", "gemm_avx512_vnni.cc.o", "gemm_avx512_bf16.cc.o"} <= names
    assert {"rates_avx2.cc.o", "rates_avx512.cc.o"} <= names


def test_tier_files_define_no_symbol_that_another_object_could_share(compiled):
    for path in filter(tier_of, compiled):
        symbols = [line.split() for line in output("nm", "--defined-only", path).splitlines()]
        shared = [name for *_, kind, name in symbols if kind in "uvwVW"]
        assert not shared, f"{path}: {shared}"


def test_wide_registers_are_used_in_tier_files_only(compiled):
    for path in compiled:
        code = output("objdump", "-d", "--no-show-raw-insn", path)
        tier = tier_of(path)
        if tier is None:
            assert not WIDE.search(code), path
        else:
            assert re.search(TIERS[tier], code), f"{path} holds no {tier} code"
        if tier in ("avx2", "avx2_vnni"):
            assert not re.search(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])", code), f"{path} needs more than {tier}"


def test_the_module_exports_its_entry_point_and_none_of_its_own_functions():
    lines = output("nm", "--dynamic", "--defined-only", _native.__file__).splitlines()
    names = {line.split()[-1] for line in lines}
    assert "PyInit__native" in names
    assert not [name for name in names if re.match(r"_ZNK?7fewbits", name)]
