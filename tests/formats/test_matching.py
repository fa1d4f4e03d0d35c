"""Targets and ignore entries against module names: who wins, who never hit, and patterns that never end."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import integers, llama, llama_tensors, write

from fewbits.errors import CheckpointError
from fewbits.formats.compressed_tensors import matching
from fewbits.formats.compressed_tensors.matching import Patterns
from fewbits.formats.resolved import ModuleKind
from fewbits.load import inspect

GATE = "model.layers.0.mlp.gate"


@pytest.mark.parametrize(
    ("name", "kind", "pattern", "hits"),
    [
        (GATE, "router", "re:.*mlp.gate", True),
        (GATE + "_proj", "linear", "re:.*mlp.gate", True),
        (GATE + "_proj", "linear", "re:.*mlp.gate$", False),
        (GATE, "router", "re:.*mlp.gate$", True),
        (GATE, "router", "layers.0.mlp.gate", False),
        (GATE, "router", GATE, True),
        (GATE, "router", "gate", False),
        (GATE, "router", "re:mlp.gate", False),
        (GATE, "router", "Linear", True),
        ("lm_head", "head", "Linear", True),
        ("lm_head", "head", "lm_head", True),
        ("lm_head", "head", "re:.*lm_head", True),
        ("model.lm_head", "head", "lm_head", False),
        ("lm_head", "head", "ParallelLMHead", True),
        ("model.embed_tokens", "embedding", "Embedding", True),
        ("model.embed_tokens", "embedding", "Linear", False),
        ("model.layers.0.self_attn.v_proj", "linear", "re:.*v_proj", True),
        ("model.layers.0.self_attn.v_proj", "linear", "linear", False),
        ("model.layers.0.mlp.experts.3.w1", "expert", "Linear", True),
        ("model.norm", "norm", "Linear", False),
        ("model.conv", "conv", "Linear", False),
        ("model.vision_tower.q", "linear", "model.vision_tower", False),
        ("Linear", "other", "Linear", True),
        ("re:x", "linear", "re:x", False),
    ],
)
def test_one_pattern(name, kind, pattern, hits):
    patterns = Patterns([pattern], "here")
    assert patterns.match(name, kind) == (pattern if hits else None)
    assert patterns.without_match() == ([] if hits else [pattern])


@pytest.mark.parametrize(
    ("patterns", "kind", "winner"),
    [
        (["Linear", "re:.*q_proj", "model.q_proj"], "linear", "model.q_proj"),
        (["Linear", "re:.*q_proj"], "linear", "re:.*q_proj"),
        (["re:.*q_proj", "re:.*proj", "re:model"], "linear", "re:.*proj"),
        (["re:z|.*", "re:a|.*"], "linear", "re:a|.*"),
        (["ParallelLMHead", "Linear", "LMHead"], "head", "LMHead"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_precedence_whatever_the_order(patterns, kind: ModuleKind, winner, order):
    assert Patterns(patterns[::order], "here").match("model.q_proj", kind) == winner


def test_losers_count_as_hits():
    patterns = Patterns(["Linear", "re:.*q_proj", "model.q_proj", "re:nothing", "Embedding"], "here")
    patterns.match("model.q_proj", "linear")
    assert patterns.without_match() == ["Embedding", "re:nothing"]


# Plain pieces that mean the same to Python's re and to any other engine.
_PIECES = st.sampled_from(
    ["a", "b", "q_proj", r"\.", ".", ".*", "[ab]", "(?:a|b)", "a?", "b+", "$", "^", r"\d+", "x{1,2}"]
)
_NAMES = st.lists(st.sampled_from(["a", "b", ".", "q_proj", "1", "23", "x", "k"]), max_size=8).map("".join)


@given(st.lists(_PIECES, max_size=6).map("".join), _NAMES)
def test_regular_expressions_are_those_of_re_match(pattern, name):
    hits = re.match(pattern, name) is not None
    assert (Patterns([f"re:{pattern}"], "here").match(name, "linear") is not None) == hits


@given(_NAMES, _NAMES)
def test_exact_names_are_exact(pattern, name):
    assert (Patterns([pattern], "here").match(name, "other") == pattern) == (pattern == name)


OWNERS = json.loads((Path(__file__).parents[1] / "fixtures" / "matching.json").read_text())


@pytest.mark.parametrize("case", OWNERS["cases"], ids=range(len(OWNERS["cases"])))
def test_the_owners_library_finds_the_same(case):
    """tools/fixture_matching.py asked it."""
    targets, ignore = Patterns(case["targets"], "here"), Patterns(case["ignore"], "here")
    for name, class_name in OWNERS["modules"].items():
        kind: ModuleKind = "embedding" if class_name == "Embedding" else "head" if name == "lm_head" else "linear"
        first, ignored = case["found"].get(name, [None, False])
        assert targets.match(name, kind) == first, name
        assert (ignore.match(name, kind) is not None) == ignored, name


_PATTERNS = st.one_of(
    _NAMES,
    st.lists(_PIECES, max_size=4).map(lambda pieces: "re:" + "".join(pieces)),
    st.sampled_from(["Linear", "Module"]),
)


@given(st.lists(_PATTERNS, max_size=6), st.lists(_NAMES, max_size=5), st.booleans())
def test_the_rules_restated(patterns, names, linear):
    """The name itself; else the first expression in alphabetical order that matches from the start; else a class."""
    found = Patterns(patterns, "here")
    hits = set()
    for name in names:
        winner = found.match(name, "linear" if linear else "other")
        regexes = [pattern for pattern in sorted(patterns) if pattern.startswith("re:") and re.match(pattern[3:], name)]
        classes = [pattern for pattern in sorted(patterns) if linear and pattern in ("Linear", "Module")]
        candidates = [name] * (name in patterns) + regexes + classes
        assert winner == (candidates[0] if candidates else None)
        hits |= set(candidates)
    assert set(found.without_match()) == set(patterns) - hits


@pytest.mark.parametrize(
    "pattern", ["re:(", "re:*a", "re:[", "re:(?P<a>x)(?P<a", "re:" + "(" * 50_000, "re:a{99999999999999999999}"]
)
def test_what_is_no_regular_expression(pattern):
    with pytest.raises(CheckpointError) as caught:
        Patterns([pattern], "config.json, quantization_config").match("a", "linear")
    assert caught.value.code == "pattern-invalid" and len(str(caught.value)) < 400


# (a+)+$ itself does no harm: the regex package sees through it.
@pytest.mark.parametrize("pattern", ["re:(a|a)*$", "re:(a|aa)+$", "re:.*?(a|a)*$"])
def test_a_pattern_without_an_end(pattern, monkeypatch):
    monkeypatch.setattr(matching, "_TIMEOUT", 0.05)
    began = time.thread_time()
    with pytest.raises(CheckpointError, match="takes longer than") as caught:
        Patterns([pattern], "config.json").match("a" * 60 + "b", "linear")
    assert caught.value.code == "pattern-timeout" and caught.value.source == "config.json"
    assert time.thread_time() - began < 1
    assert Patterns(["re:(a+)+$"], "config.json").match("a" * 60 + "b", "linear") is None


def test_a_pattern_that_stays_below_the_limit_name_by_name(monkeypatch):
    """Some hundredths of a second each, for thousands of names: the sum has its own limit."""
    monkeypatch.setattr(matching, "_SLOW_TOGETHER", 0.3)
    patterns = Patterns(["re:(a|aa)+$"], "config.json")
    began = time.thread_time()
    with pytest.raises(CheckpointError, match="by the time of") as caught:
        for length in range(16, 40):  # half as long again with every letter
            name = "a" * length + "b"
            before = time.thread_time()
            patterns.match(name, "linear")
            if time.thread_time() - before > 0.03:
                break
        for _ in range(1000):
            patterns.match(name, "linear")
    assert caught.value.code == "pattern-timeout"
    assert time.thread_time() - began < 1


# ---- in a checkpoint ---------------------------------------------------------------------------------------------

FOUR, EIGHT = integers(64, 64, 4, 32, seed=1), integers(64, 64, 8, 32, seed=2)


def plan_of(folder, groups, stored, ignore=(), format_=None):
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": list(ignore)}
    return inspect(write(folder, llama_tensors(**stored), llama(quantization)))


def group(stored, *targets):
    return {"targets": list(targets), "weights": stored.weights}


def test_the_later_group_wins_where_one_target_stands_twice(tmp_path):
    groups = {"zero": group(FOUR, "re:.*q_proj"), "a": group(EIGHT, "re:.*q_proj")}
    plan = plan_of(tmp_path, groups, {"q_proj": EIGHT})
    [row] = [row for row in plan.rows if row.name.endswith("q_proj")]
    assert (str(row.spec), row.decided_by) == ("int8 g32 × a16", "config_groups.a, target re:.*q_proj")


def test_exact_before_regex_before_class_across_groups(tmp_path):
    names = ["model.layers.0.self_attn." + last for last in ("q_proj", "o_proj")]
    three = integers(64, 64, 3, 32, seed=3)
    groups = {"a": group(FOUR, "Linear"), "b": group(three, "re:.*[qo]_proj"), "c": group(EIGHT, names[0])}
    rest = dict.fromkeys(("k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"))
    plan = plan_of(tmp_path, groups, {"q_proj": EIGHT, "o_proj": three, **rest})
    specs = {row.name: str(row.spec) for row in plan.rows if row.name in names}
    assert specs == {names[0]: "int8 g32 × a16", names[1]: "int3 g32 × a16"}


def test_ignore_by_class_name(tmp_path):
    plan = plan_of(tmp_path, {"a": group(FOUR, "Linear")}, {}, ignore=["Linear"])
    decided = {row.decided_by for row in plan.rows if row.kind in ("linear", "head")}
    assert decided == {"ignore entry Linear"}
    assert [warning.code for warning in plan.warnings] == []


def test_patterns_without_a_match_are_reported(tmp_path):
    ignore = ["lm_head", "re:.*vision.*", "model.layers.7.mlp", "*.self_attn.*", "Embedding"]
    plan = plan_of(tmp_path, {"a": group(FOUR, "re:.*q_proj", "re:.*x_proj")}, {"q_proj": FOUR}, ignore=ignore)
    assert sorted(plan.patterns_without_match) == sorted(
        ["re:.*x_proj", "re:.*vision.*", "model.layers.7.mlp", "*.self_attn.*"]
    )
    texts = {warning.text for warning in plan.warnings if warning.code == "pattern-no-match"}
    assert len(texts) == 4
    assert any("wildcard" in text and "*.self_attn.*" in text for text in texts)
