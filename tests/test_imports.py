"""The import graph: one way through the layers, nothing heavy, no thread and no signal handler."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fewbits

SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = SOURCE / "fewbits"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Each layer may import itself and what stands above it, but no other part of its own line.
LAYERS = (
    ("codes",),
    ("errors",),
    ("spec",),
    ("qweight",),
    ("checkpoint",),
    ("formats", "kernels"),
    ("plan", "nn", "workers"),
    ("models",),
    ("load", "hub"),
    ("draft_plan",),
    ("load_drafter",),
    ("engine",),
    ("server", "report", "verify", "bench"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> set[str]:
    """Modules that this one imports, those inside functions and for type checkers too."""
    found = set()
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


INNER = [module for module in MODULES if "." in module]


def test_every_part_has_a_layer():
    parts = {part_of(module) for module in INNER}
    assert parts <= LEVEL.keys() | {"_native"}, "a new part belongs into LAYERS"


@pytest.mark.parametrize("module", INNER)
def test_imports_go_one_way(module):
    own = part_of(module)
    for imported in imports(module):
        if not imported.startswith("fewbits.") or imported == "fewbits._native":
            continue
        other = part_of(imported)
        if other != own:
            assert LEVEL[other] < LEVEL[own], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [module for module in INNER if part_of(module) in ("nn", "models")])
def test_models_know_no_arrays_and_no_formats(module):
    imported = imports(module)
    roots = {name.partition(".")[0] for name in imported}
    assert not roots & {"numpy", "ml_dtypes", "torch"}
    assert not {name for name in imported if name.startswith(("fewbits.formats", "fewbits.qweight", "fewbits._native"))}
    # Of the kernels only what every back end shares.
    allowed = {"fewbits.kernels", "fewbits.kernels.batch", "fewbits.kernels.ops", "fewbits.kernels.rope"}
    assert {name for name in imported if name.startswith("fewbits.kernels")} <= allowed


@pytest.mark.parametrize("module", [module for module in INNER if part_of(module) == "kernels"])
def test_kernels_know_no_formats_and_no_files(module):
    parts = {part_of(name) for name in imports(module) if name.startswith("fewbits.") and name != "fewbits._native"}
    assert parts <= {"kernels", "errors", "codes", "spec", "qweight"}


def test_only_headers_the_kernels_and_the_machine_call_native_code():
    callers = {part_of(module) for module in INNER if "fewbits._native" in imports(module)}
    assert callers <= {"checkpoint", "kernels", "engine", "commands"}


HEAVY = ("tokenizers", "jinja2", "rich", "huggingface_hub", "torch", "transformers", "safetensors")

PROBE = """
import json, os, signal, sys, threading
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
import fewbits
fewbits.inspect
fewbits.load_linear
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
print(json.dumps({
    "modules": sorted(sys.modules),
    "threads": threading.active_count(),
    "tasks": tasks,
    "signals": all(signal.getsignal(number) == handler for number, handler in before.items()),
    "affinity": mask is None or os.sched_getaffinity(0) == mask,
}))
"""


def probe(code: str) -> dict[str, object]:
    environment = {"PYTHONPATH": str(SOURCE), "PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if PACKAGE != Path(fewbits.__file__).parent:
        del environment["PYTHONPATH"]  # the installed package is under test
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_importing_fewbits_is_quiet():
    found = probe(PROBE)
    loaded = {str(name).partition(".")[0] for name in found["modules"]}
    assert loaded & {*HEAVY} == set()
    assert (found["threads"], found["tasks"]) == (1, 1), "a thread was started"
    assert found["signals"] and found["affinity"]


def test_the_package_itself_loads_nothing():
    code = "import json, sys, fewbits; print(json.dumps({'modules': sorted(sys.modules)}))"
    loaded = {str(name).partition(".")[0] for name in probe(code)["modules"]}
    assert not loaded & {*HEAVY, "numpy", "ml_dtypes"}


HELP = """
import contextlib, io, json, sys
from fewbits.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main(["--help"])
assert "usage: fewbits" in shown.getvalue()
print(json.dumps({"modules": sorted(sys.modules)}))
"""


def test_help_loads_nothing():
    loaded = {str(name).partition(".")[0] for name in probe(HELP)["modules"]}
    assert not loaded & {*HEAVY, "numpy", "ml_dtypes", "orjson", "regex"}
