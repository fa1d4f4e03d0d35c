"""The docs say what is true: generated pages are fresh, code blocks run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")]
)
BLOCK = re.compile(r"^```(python|sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(page, language, text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]
# They contain this very test, or need gigabytes of tools or hours; .ci/run proves the first two on a bare machine.
ELSEWHERE = ("make ", "python tools/", "pip install")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = generator().PAGES


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == GENERATED[name](), "run: python tools/generate_docs.py"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("page", "language", "text"), BLOCKS)
def test_code_block(page: Path, language: str, text: str) -> None:
    """Python blocks run; commands of `sh` and `console` blocks do, and print what a `console` block shows."""
    if language == "python":
        result = run([sys.executable, "-c", text])
        assert result.returncode == 0, result.stderr
        return
    lines = text.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if language == "sh" or line.startswith("$ ")]
    assert commands
    for line in commands:
        if line.startswith(ELSEWHERE):
            target = re.match(r"make ([a-z-]+)", line)
            assert target is None or f"\n{target[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            script = re.match(r"python (\S+)", line)
            assert script is None or (ROOT / script[1]).is_file()
            continue
        before, found, rest = line.partition(".venv/bin/fewbits ")
        assert found and not before, f"{page.name} runs something else: {line}"
        result = run(["/bin/sh", "-c", f'"{sys.executable}" -m fewbits {rest}'])
        assert result.returncode == 0, result.stderr
        if language == "console":
            shown = [line for line in lines if not line.startswith("$ ")]
            assert [line.rstrip() for line in result.stdout.splitlines()] == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
