"""What `make` says where something is missing: one line that names it, exit code 2, nothing made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make demo` reads before it makes something, in a path with a space in it."""
    folder = tmp_path / "a checkout"
    (folder / "tools").mkdir(parents=True)
    for folder_name in ("native", "src"):
        (folder / folder_name).mkdir()
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt", "tools/check_build_tools.sh"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make_demo(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if name not in ("CXX", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "demo"],
        cwd=folder,
        env=outer | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def python_that_fails(folder: Path, question: str) -> str:
    """An interpreter like this one, but for the check that holds the text `question`."""
    script = folder.parent / "python3"
    script.write_text(f'#!/bin/sh\ncase $2 in *"{question}"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def check_refused(folder: Path, result: subprocess.CompletedProcess[str], what: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode == 2
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and what in lines[0]
    for system in ("Debian: sudo apt install", "Fedora: sudo dnf install", "macOS: "):
        assert system in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "CMakeLists.txt",
        "Makefile",
        "native",
        "pyproject.toml",
        "src",
        "tools",
    ]


@pytest.mark.parametrize(
    ("question", "what"),
    [
        ("%d.%d", "no Python runs as"),
        ("< (3, 11)", "3.11 or newer is needed"),
        ("ensurepip", "has no venv module"),
        ("Python.h", "has no header files"),
    ],
)
def test_python_lacks_something(checkout: Path, question: str, what: str) -> None:
    result = make_demo(checkout, PYTHON=python_that_fails(checkout, question))
    check_refused(checkout, result, what)


def test_no_python(checkout: Path) -> None:
    check_refused(checkout, make_demo(checkout, PYTHON="no-such-python"), "'no-such-python'")


def test_named_compiler_is_absent(checkout: Path) -> None:
    check_refused(checkout, make_demo(checkout, CXX="no-such-compiler -O2"), "'no-such-compiler -O2'")


def test_compiler_without_cxx20(checkout: Path) -> None:
    check_refused(checkout, make_demo(checkout, CXX="false"), "cannot do C++20")


def test_no_compiler(checkout: Path) -> None:
    programs = checkout.parent / "programs"
    programs.mkdir()
    for name in ("make", "sh", "find"):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    check_refused(checkout, make_demo(checkout, PATH=str(programs)), "no C++ compiler")


def test_complete_machine_passes() -> None:
    """Else the refusals above would prove nothing."""
    check = ["sh", str(ROOT / "tools/check_build_tools.sh"), sys.executable]
    result = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
