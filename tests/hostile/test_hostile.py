"""Files that mean harm: each is explained, by every command, within its limits, and takes nothing over.

Every folder is read through Python once, for its code, and once by the commands, in a process of its own below
one that has imported fewbits: so that what each takes can be measured and limited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cases import Case, good
from hostile_configs import CONFIGS
from hostile_experts import EXPERTS
from hostile_files import FILES
from hostile_tensors import TENSORS
from hostile_texts import TEXTS
from limits import limited

import fewbits
from fewbits import cli
from fewbits.commands import run as run_command
from fewbits.errors import FewbitsError

MEGABYTES, SECONDS = 400, 5
# Faults of tensors' data: `verify` names the module and goes on.
DATA = ("act-order-invalid", "code-range", "logits-not-finite", "scale-invalid", "tensors-disagree", "weight-nan")
HANGS = 60  # seconds, of which a busy machine gives us few
PARTS = (FILES, CONFIGS, TENSORS, EXPERTS, TEXTS)
HOSTILE = {name: case for part in PARTS for name, case in part.items()}
assert len(HOSTILE) == sum(map(len, PARTS)), "two cases of one name"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("hostile")
    made = {}
    for number, (name, case) in enumerate(HOSTILE.items()):
        made[name] = base / str(number)
        case.build(made[name])
    return made


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    with limited(HANGS, 4 * MEGABYTES):  # what was measured below holds for a process that does nothing else
        yield


def run(folder: Path, prompt: tuple[str, ...]) -> None:
    """`fewbits run`, as far as one token, without what turns errors into exit codes."""
    line = ["run", str(folder), *prompt, "--max-tokens", "1", "--allow-reference", "--json"]
    run_command.run(cli.build_parser().parse_args(line))


def code_of(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except FewbitsError as error:
        assert len(str(error)) < 3000, "an error that nobody reads"
        return error.code
    return ""


@pytest.mark.parametrize("name", HOSTILE)
def test_its_code(name: str, folders: dict[str, Path]) -> None:
    case, folder = HOSTILE[name], folders[name]
    allowed = {"pattern-timeout"} if case.may_time_out else set()
    try:
        plan = fewbits.inspect(folder)
        errors, warnings = {error.code for error in plan.errors}, {warning.code for warning in plan.warnings}
    except FewbitsError as error:
        errors, warnings = {error.code}, set()
    assert errors == set(case.inspect) or errors <= allowed and case.may_time_out
    assert case.warning in warnings or not case.warning
    assert code_of(run, folder, case.prompt) in {case.run} | allowed


# ---- the commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def measured(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each command said of each folder, and what it took."""
    for folder in folders.values():
        sizes = [path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file()]
        assert sum(sizes) < 20_000_000, "these are small files"
    jobs = {}
    for name, folder in folders.items():
        one = [str(folder), "--json"]
        run_it = ["run", *one, *HOSTILE[name].prompt, "--max-tokens", "1", "--allow-reference"]
        jobs[name] = [["inspect", str(folder)], ["inspect", *one], run_it, ["verify", *one]]
    names = list(jobs)
    halves = [names[0::2], names[1::2]]  # two processes; which commands share one is of no consequence
    with ThreadPoolExecutor(len(halves)) as pool:
        found = pool.map(lambda half: probe([jobs[name] for name in half]), halves)
        return {
            name: one
            for half, several in zip(halves, found, strict=True)
            for name, one in zip(half, several, strict=True)
        }


def probe(jobs: list[list[list[str]]]) -> list[dict[str, Any]]:
    source = str(Path(fewbits.__file__).parents[1])
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": source, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("probe.py"))]
    wish = json.dumps(jobs)
    done = subprocess.run(command, input=wish, capture_output=True, text=True, env=environment, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    return list(map(json.loads, done.stdout.splitlines()))


def plain(text: str) -> bool:
    """Nothing that moves a terminal's cursor, rings, or turns what follows around."""
    return all(unicodedata.category(char) not in ("Cc", "Cf", "Cs") for char in text.replace("\n", ""))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", HOSTILE)
def test_every_command_explains_it_within_limits(name: str, measured: dict[str, dict[str, Any]]) -> None:
    case, found = HOSTILE[name], measured[name]
    assert found["status"] == 0, found
    for command in found["commands"]:
        assert "Traceback" not in command["stderr"] and "a fault of fewbits" not in command["stderr"], command
        assert plain(command["stderr"]), command["stderr"]
        assert command["code"] in (0, 1, 2) and command["seconds"] < SECONDS, command
    assert found["megabytes"] < MEGABYTES
    table, as_json, ran, verified = found["commands"]
    assert plain(table["stdout"]) and (table["stdout"] or table["stderr"].startswith("error: "))
    errors = {line.partition(":")[0] for line in json.loads(as_json["stdout"])["errors"]}
    for command in (ran, verified):
        assert command["stdout"] if command["code"] < 2 else "error: " in command["stderr"] and not command["stdout"]
    if not case.may_time_out:
        planned, ends = (2 if errors else 0), (2 if case.run else 0)
        assert (table["code"], as_json["code"], ran["code"]) == (planned, planned, ends)
        assert errors == set(case.inspect)
        difference = (1,) if case.run in DATA else (0, 1)
        assert verified["code"] in ((2,) if errors or case.header_only else difference)


def test_what_is_written_here_is_read(tmp_path: Path) -> None:
    """The same helper, nothing hostile: no code at all, and it runs."""
    good(tmp_path / "good")
    plan = fewbits.inspect(tmp_path / "good")
    assert (plan.errors, plan.warnings) == ([], [])
    assert code_of(run, tmp_path / "good", Case(good, (), "").prompt) == ""
