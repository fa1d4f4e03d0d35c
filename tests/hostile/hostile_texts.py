"""Files beside the weights: tokenizers, chat templates, generation_config.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cases import Build, Case, but, good, odd, seen, with_text

PROMPT = ("--prompt", "a b")
CHAT = ("--chat", "--prompt", "a b")

WORDS: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "c"},
}


def words(**changes: Any) -> Build:
    """The good folder with a tokenizer of three words, changed."""
    return with_text("tokenizer.json", WORDS | changes)


def told(build: Build, code: str, prompt: tuple[str, ...] = PROMPT) -> Case:
    """`inspect` reads none of these files."""
    return Case(build, (), code, prompt=prompt)


def both(name: str, content: Any) -> Build:
    """A sound tokenizer, and another file."""

    def build(folder: Path) -> None:
        words()(folder)
        with_text(name, content)(folder / "other")
        (folder / "other" / name).rename(folder / name)
        for path in (folder / "other").iterdir():
            path.unlink()
        (folder / "other").rmdir()

    return build


def enlarged(name: str) -> Build:
    """A sound tokenizer, and 8 GB of this file, which take no room on the disk."""

    def build(folder: Path) -> None:
        words()(folder)
        (folder / name).touch()
        os.truncate(folder / name, 8 << 30)

    return build


def template(text: str) -> Build:
    return both("chat_template.jinja", text)


SPLIT = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}

TEXTS: dict[str, Case] = {
    "a tokenizer of three words": Case(words(), (), "", prompt=PROMPT),
    "no tokenizer": told(good, "tokenizer-missing"),
    "a tokenizer that isn't JSON": told(with_text("tokenizer.json", "{"), "tokenizer-invalid"),
    "a tokenizer that is a list": told(with_text("tokenizer.json", "[]"), "tokenizer-invalid"),
    "a tokenizer that is empty": told(with_text("tokenizer.json", ""), "tokenizer-invalid"),
    "a tokenizer of deep JSON": told(with_text("tokenizer.json", '{"model":' * 100_000), "tokenizer-invalid"),
    "a tokenizer that is no text": told(with_text("tokenizer.json", b"\xff\xfe{}"), "tokenizer-invalid"),
    "a tokenizer that is a folder": told(but(lambda folder: (folder / "tokenizer.json").mkdir()), "tokenizer-missing"),
    "a tokenizer without a model": told(words(model=None), "tokenizer-invalid"),
    "a tokenizer of no one": told(words(model={"type": "Oracle"}), "tokenizer-invalid"),
    "a tokenizer with ids of 2^63": told(words(model=WORDS["model"] | {"vocab": {"a": 1 << 63}}), "tokenizer-invalid"),
    "a tokenizer with negative ids": told(words(model=WORDS["model"] | {"vocab": {"a": -1}}), "tokenizer-invalid"),
    "a tokenizer of more words than the model": told(
        words(model=WORDS["model"] | {"vocab": {"a": 0, "b": 40}}), "vocabulary-mismatch"
    ),
    "a tokenizer whose expression isn't closed": told(
        words(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(a"}}), "tokenizer-invalid"
    ),
    "a tokenizer whose normalizer is damaged": told(
        words(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "tokenizer-invalid"
    ),
    "a tokenizer whose expression has no end": told(
        words(pre_tokenizer=SPLIT), "tokenizer-invalid", ("--prompt", "a" * 60 + "b")
    ),
    "a tokenizer that adds a word it hasn't": told(
        words(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer-invalid",
    ),
    "a tokenizer that writes too much": Case(
        words(decoder={"type": "Replace", "pattern": {"String": "a"}, "content": "ab" * 1000}), (), "", prompt=PROMPT
    ),
    "a tokenizer whose decoder strips more than there is": Case(
        words(decoder={"type": "Strip", "content": "a", "start": 1 << 40, "stop": 1 << 40}), (), "", prompt=PROMPT
    ),
    "a tokenizer that makes nothing of the prompt": told(
        words(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}), "prompt-empty"
    ),
    "a tokenizer of 8 GB": told(enlarged("tokenizer.json"), "tokenizer-invalid"),
    "tokenizer_config.json that is a list": told(both("tokenizer_config.json", "[]"), "json-invalid"),
    "tokenizer_config.json that is deep": told(both("tokenizer_config.json", '{"a":' * 100_000), "json-invalid"),
    "tokenizer_config.json that is a pipe": told(
        lambda folder: (words()(folder), os.mkfifo(folder / "tokenizer_config.json")), "file-unreadable"
    ),
    "tokenizer_config.json of odd types": Case(
        both("tokenizer_config.json", {"bos_token": [1], "eos_token": {"content": {}}, "add_bos_token": "yes"}),
        (),
        "",
        prompt=PROMPT,
    ),
    "special_tokens_map.json that is text": told(
        lambda folder: (
            both("tokenizer_config.json", {"add_bos_token": True})(folder),
            (folder / "special_tokens_map.json").write_text('"x"'),
        ),
        "json-invalid",
    ),
    "tokenizer_config.json of 8 GB": told(enlarged("tokenizer_config.json"), "json-invalid"),
    # Chat templates
    "a chat template of 8 GB": told(enlarged("chat_template.jinja"), "chat-template-invalid", CHAT),
    "a chat template of 5 MB in tokenizer_config.json": told(
        both("tokenizer_config.json", {"chat_template": "a" * 5_000_000}), "chat-template-invalid", CHAT
    ),
    "no chat template": told(words(), "chat-template-missing", CHAT),
    "a chat template without an end": told(
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "chat-template-invalid",
        CHAT,
    ),
    "a chat template of 10 GB": told(template("{{ 'x' * 10 ** 10 }}"), "chat-template-invalid", CHAT),
    "a chat template that writes forever": told(
        template("{% for i in range(99999) %}{% for j in range(99) %}x{% endfor %}{% endfor %}"),
        "chat-template-invalid",
        CHAT,
    ),
    "a chat template that asks for files": told(
        template("{% include '/etc/hostname' %}"), "chat-template-invalid", CHAT
    ),
    "a chat template that asks for Python": told(
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat-template-invalid", CHAT
    ),
    "a chat template that calls itself": told(
        template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "chat-template-invalid", CHAT
    ),
    "a chat template of a hundred thousand brackets": told(
        template("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}"), "chat-template-invalid", CHAT
    ),
    "a chat template that isn't closed": told(template("{% for m in messages %}"), "chat-template-invalid", CHAT),
    "a chat template that moves the cursor": told(
        template("{{ raise_exception('\x1b[2J\x1b]0;owned\x07') }}"), "chat-template-refused", CHAT
    ),
    "a chat template that is no text": told(both("chat_template.jinja", b"\xff\xfe"), "chat-template-invalid", CHAT),
    "a chat template that is a number": told(
        both("tokenizer_config.json", {"chat_template": 7}), "chat-template-missing", CHAT
    ),
    "chat templates of numbers": told(
        both("tokenizer_config.json", {"chat_template": [7, {"name": "default", "template": 7}]}),
        "chat-template-missing",
        CHAT,
    ),
    # generation_config.json
    "an end that is text": Case(with_text("generation_config.json", {"eos_token_id": "</s>"}), (), "config-type"),
    "ends of everything": odd(
        with_text("generation_config.json", {"eos_token_id": [None, "x", {}, -1, 1 << 62, True]})
    ),
    "a temperature that is text": Case(with_text("generation_config.json", {"temperature": "hot"}), (), "config-type"),
    "a temperature of 10^400": seen(with_text("generation_config.json", {"temperature": 10**400}), "json-invalid"),
    "sampling by the thousands": Case(
        with_text("generation_config.json", {"do_sample": True, "top_p": -5, "top_k": -(1 << 62)}),
        (),
        "sampling-range",
        prompt=("--prompt-ids", "1,2", "--sampling", "model"),
    ),
}
