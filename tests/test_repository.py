"""What is committed must mean the same on every machine: no path of one, no registry's host."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The brackets keep this file from finding itself.
FOLDERS = r"(^|[^[:alnum:]_.*-])/([r]oot|[w]ork|[t]mp|[h]ome/[a-z]|[U]sers)/"
HOSTS = r"[p]ypi\.org|[p]ythonhosted|[n]pmjs\.(org|com)|[d]ebian\.org"
# Text of others: what the example was trained on, and what was learnt from it.
DATA = [":!examples/*.txt", ":!examples/*tokenizer.json", ":!tests/fixtures/*tokenizer.json"]


def test_no_place_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    grep = ["git", "grep", "-nIE", f"{FOLDERS}|{HOSTS}", "--", ".", *DATA]
    found = subprocess.run(grep, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1, found.stdout + found.stderr
