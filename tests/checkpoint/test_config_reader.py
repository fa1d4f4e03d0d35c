"""Typed reading of config objects, and what is left unread."""

from __future__ import annotations

import pytest

from fewbits.checkpoint.config import Config, shorten
from fewbits.errors import CheckpointError, PlanError


def config(**data: object) -> Config:
    return Config(data, "config.json", "quantization_config")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, int), (3.5, float), ("x", str), (True, bool), (False, bool), ([1], list), ({"a": 1}, dict)],
)
def test_values_of_their_type(value, kind):
    assert config(key=value).get("key", kind) == value


def test_an_integer_passes_as_a_float():
    value = config(key=3).get("key", float)
    assert value == 3.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("3", int),
        (3.0, int),
        (True, int),
        (1 << 63, int),
        (True, float),
        (float("inf"), float),
        (1 << 70, float),
        (3, str),
        (0, bool),
        ("true", bool),
        ({}, list),
        ([], dict),
    ],
)
def test_values_of_another_type(value, kind):
    with pytest.raises(CheckpointError, match="key must be") as caught:
        config(key=value).get("key", kind)
    assert (caught.value.code, caught.value.source) == ("config-type", "config.json, quantization_config.key")


def test_absent_and_null_take_the_default():
    assert config().get("key", int, 7) == 7
    assert config(key=None).get("key", int, 7) == 7
    assert config(key=None).get("key", int, None) is None
    for empty in (config(), config(key=None)):
        assert "key" not in empty
        with pytest.raises(CheckpointError) as caught:
            empty.get("key", int)
        assert caught.value.code == "config-missing"


def test_expect():
    assert config(key="silu").expect("key", "silu", "gelu") == "silu"
    assert config().expect("key", "silu", "gelu") == "silu"
    assert config().expect("key", "silu", default=None) is None
    for other in ("relu", 1, ["silu"]):
        with pytest.raises(PlanError, match="fewbits knows 'silu'") as caught:
            config(key=other).expect("key", "silu")
        assert caught.value.code == "config-unsupported"
    with pytest.raises(PlanError):
        config(key=1).expect("key", True)


def test_leftovers_are_unread_keys_that_carry_a_value():
    read = config(a=1, b=None, c=[], d={}, e="", f=False, g=0, h="x", i={"j": 1})
    read.get("a", int)
    assert sorted(read.leftovers()) == ["quantization_config." + key for key in "fghi"]
    read.ignore("f", "g")
    assert sorted(read.leftovers(frozenset("h"))) == ["quantization_config.i"]


def test_leftovers_of_an_object_that_was_entered_are_its_own():
    outer = config(inner={"a": 1, "b": {"c": 2}})
    inner = outer.sub("inner")
    inner.get("a", int)
    assert list(outer.leftovers()) == ["quantization_config.inner.b"]
    assert outer.sub("inner") is inner
    inner.sub("b").get("c", int)
    assert list(outer.leftovers()) == []


def test_sub_of_nothing():
    for empty in (config(), config(key=None), config(key={})):
        assert empty.sub("key") is None
    with pytest.raises(CheckpointError):
        config(key=[1]).sub("key")


def test_a_fallback_is_asked_for_what_is_absent():
    top = Config({"a": 1, "b": 2, "text_config": {}, "deep": {"x": 1}}, "config.json")
    text = Config({"a": 10, "b": None}, "config.json", "text_config", fallback=top)
    assert (text.get("a", int), text.get("b", int), text.get("c", int, 5)) == (10, 2, 5)
    assert text.expect("b", 2) == 2
    assert "b" in text and "c" not in text
    assert text.where("a") == "config.json, text_config.a"
    assert text.where("b") == "config.json, b"
    assert text.sub("deep").get("x", int) == 1
    text.ignore("text_config")
    assert list(text.leftovers()) == []


def test_quoted_values_are_short():
    assert shorten("x" * 1000).endswith("...") and len(shorten("x" * 1000)) == 80
    assert shorten([1]) == "[1]"
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "a deeply nested value"
