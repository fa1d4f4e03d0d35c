import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from fewbits.checkpoint import open_checkpoint
from fewbits.engine.tokenizer import Tokenizer
from fewbits.errors import CheckpointError, FewbitsError, UsageError

BOS, EOS = 1, 2


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(open_checkpoint(folder))


def ids(*characters: str) -> list[int]:
    """As the character tokenizer numbers them: three special tokens, then digits, then letters."""
    return [3 + "0123456789abcdefghijklmnopqrstuvwxyz".index(character) for character in characters]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [BOS, *ids(*"a1"), EOS]),  # tokenizer.json's own post-processor
        ({"add_bos_token": True}, [BOS, *ids(*"a1")]),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS, *ids(*"a1"), EOS]),
        ({"add_bos_token": False}, ids(*"a1")),
        ({"add_bos_token": True, "bos_token": None}, ids(*"a1")),
    ],
)
def test_special_tokens_of_a_prompt(
    text_model: Callable[..., Path], config: dict[str, object], expected: list[int]
) -> None:
    folder = text_model(**config)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    backend.save(str(folder / "tokenizer.json"))
    made = tokenizer(folder)
    assert made.encode("a1") == expected
    assert made.encode("a1", special=False) == ids(*"a1")
    assert made.decode([BOS, *ids(*"a1"), EOS, 5000]) == "a1"


def test_special_tokens_from_the_older_file(text_model: Callable[..., Path]) -> None:
    folder = text_model(bos_token=None, add_bos_token=True)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert tokenizer(folder).encode("a") == [BOS, *ids("a")]


def error(folder: Path, text: str = "a") -> FewbitsError:
    with pytest.raises(FewbitsError) as caught:
        tokenizer(folder).encode(text)
    return caught.value


def test_no_tokenizer_is_explained(text_model: Callable[..., Path]) -> None:
    folder = text_model()
    (folder / "tokenizer.json").unlink()
    assert not tokenizer(folder).available
    found = error(folder)
    assert isinstance(found, UsageError)
    assert found.code == "tokenizer-missing"
    assert "--prompt-ids" in found.hint


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', "[" * 100_000, '{"a": NaN}'])
def test_a_broken_tokenizer_is_explained(text_model: Callable[..., Path], content: str) -> None:
    folder = text_model()
    (folder / "tokenizer.json").write_text(content)
    found = error(folder)
    assert isinstance(found, CheckpointError)
    assert (found.code, found.module) == ("tokenizer-invalid", "tokenizer.json")


def test_text_that_is_no_unicode(text_model: Callable[..., Path]) -> None:
    assert error(text_model(), "caf\udce9").code == "prompt-not-text"
