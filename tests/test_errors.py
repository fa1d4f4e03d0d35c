"""Errors: every code in the table and used, and what a person reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fewbits.codes import CODES
from fewbits.errors import CheckpointError, FewbitsError, Notice, PlanError, UsageError, printable

SOURCE = Path(__file__).parent.parent / "src" / "fewbits"
TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py")) if path.name != "codes.py"}
STRINGS = {
    node.value
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}
_MAKERS = {"FewbitsError", "CheckpointError", "PlanError", "UsageError", "Notice", "warn", "add"}


def first_strings() -> set[str]:
    """First arguments of the calls that make errors and warnings."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                argument = node.args[0]
                if name in _MAKERS and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    found.add(argument.value)
    return found


def test_codes_in_use_are_in_the_table():
    used = first_strings()
    assert len(used) > 40
    assert used - CODES.keys() == set()


def test_codes_of_the_table_are_in_use():
    assert CODES.keys() - STRINGS == set()


@pytest.mark.parametrize("code", CODES)
def test_codes_are_explained(code):
    assert code == code.lower() and " " not in code
    for sentence in CODES[code]:
        assert len(sentence) > 10 and sentence[-1] in ".?"


def test_a_code_outside_of_the_table_is_a_fault_of_ours():
    for make in (lambda: Notice("no-such-code", "", ""), lambda: FewbitsError("no-such-code", "")):
        with pytest.raises(KeyError, match="no-such-code"):
            make()


def test_an_error_in_full():
    error = PlanError(
        "kernel-none",
        "3-bit integer weights have no CPU kernel",
        module="model.layers.3.mlp.down_proj",
        source="config.json, config_groups.group_1 (pack-quantized, int3, block 1x128, symmetric)",
        details=("declined: cpu.dot_bf16 (codes of 2, 4 or 8 bits), cpu.dot_int8 (codes of 8 bits)",),
        hint="--allow-reference runs this layer in NumPy, slowly",
    )
    assert f"error: {error}" == (
        "error: model.layers.3.mlp.down_proj: 3-bit integer weights have no CPU kernel\n"
        "  from: config.json, config_groups.group_1 (pack-quantized, int3, block 1x128, symmetric)\n"
        "  declined: cpu.dot_bf16 (codes of 2, 4 or 8 bits), cpu.dot_int8 (codes of 8 bits)\n"
        "\n"
        "hint: --allow-reference runs this layer in NumPy, slowly"
    )
    assert str(error.notice()) == "kernel-none: model.layers.3.mlp.down_proj: 3-bit integer weights have no CPU kernel"


def test_nothing_of_a_file_reaches_the_terminal_raw():
    name = "a\x1b[2J\nhint: trust me\x9b\u202e"
    error = CheckpointError("file-size", "is short", module=name)
    assert str(error) == "a\\x1b[2J\\nhint: trust me\\x9b\\u202e: is short"
    assert str(Notice("file-size", name, "é")) == f"file-size: {printable(name)}: é"


def test_an_error_of_few_words():
    assert str(UsageError("usage", "there is nothing to inspect")) == "there is nothing to inspect"
    assert str(CheckpointError("json-invalid", "bad", module="config.json")) == "config.json: bad"
    assert str(Notice("tensors-unclaimed", "", "2 tensors")) == "tensors-unclaimed: 2 tensors"
