import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fewbits.checkpoint import open_checkpoint
from fewbits.engine import chat
from fewbits.engine.tokenizer import Tokenizer
from fewbits.errors import CheckpointError, FewbitsError, UsageError

MESSAGES = [
    {"role": "system", "content": "be <brief>"},
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more"},
]
CHATML = """{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>{{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""


@pytest.fixture
def render(text_model: Callable[..., Path]) -> Callable[..., str]:
    """Renders a template that stands in chat_template.jinja."""
    folder = text_model()

    def rendered(template: str) -> str:
        (folder / "chat_template.jinja").write_text(template)
        return chat.render(Tokenizer(open_checkpoint(folder)), MESSAGES)

    return rendered


def test_a_usual_template(render: Callable[..., str]) -> None:
    # trim_blocks and lstrip_blocks: a block's own line leaves nothing behind.
    expected = "<s><|system|>be <brief></s>\n<|user|>hé</s>\n<|assistant|>ok</s>\n<|user|>more</s>\n<|assistant|>\n"
    assert render(CHATML) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "be <brief>"}'),
        ("{{ ['é'] | tojson(indent=1) }}", '[\n "é"\n]'),
        (
            "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }} {% endfor %}",
            "system user ",
        ),
        ("a{% generation %}b{{ messages[2].content }}{% endgeneration %}c", "abokc"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "4"),
    ],
)
def test_what_templates_use(render: Callable[..., str], template: str, expected: str) -> None:
    assert render(template) == expected


def test_a_template_that_refuses_says_why(render: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.code == "chat-template-refused"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "line 1"),
        ("{{ messages.nothing.at_all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/hostname' %}", "TypeError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{% for i in range(99999) %}{% for j in range(99) %}x{% endfor %}{% endfor %}", "characters"),
        ("{{ 'x' * 10 ** 10 }}", "MB"),
        ("{{ 'x' | center(10 ** 10) }}", "MB"),
        (
            "{% set ns = namespace(x='x' * 1000) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "MB",
        ),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    ],
)
def test_hostile_templates_end_soon_and_are_explained(render: Callable[..., str], template: str, says: str) -> None:
    begin = time.process_time(), os.times().children_user
    with pytest.raises(CheckpointError) as caught:
        render(template)
    assert (caught.value.code, caught.value.module) == ("chat-template-invalid", "chat_template.jinja")
    assert says in caught.value.what
    assert time.process_time() - begin[0] + os.times().children_user - begin[1] < 5


def test_modules_of_the_current_folder_are_not_imported(
    render: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2", "json", "markupsafe"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    assert render("fine") == "fine"


def test_where_the_template_stands(text_model: Callable[..., Path]) -> None:
    folder = text_model(chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert chat.template_of(Tokenizer(open_checkpoint(folder)))[0] == "d"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "c"}))
    assert chat.template_of(Tokenizer(open_checkpoint(folder))) == ("c", "tokenizer_config.json, chat_template")
    (folder / "chat_template.jinja").write_text("own file")
    assert chat.template_of(Tokenizer(open_checkpoint(folder))) == ("own file", "chat_template.jinja")


@pytest.mark.parametrize("config", [{}, {"chat_template": [{"name": "rag", "template": "r"}]}, {"chat_template": 3}])
def test_no_template_is_explained(text_model: Callable[..., Path], config: dict[str, object]) -> None:
    with pytest.raises(FewbitsError) as caught:
        chat.render(Tokenizer(open_checkpoint(text_model(**config))), MESSAGES)
    assert caught.value.code == "chat-template-missing"
