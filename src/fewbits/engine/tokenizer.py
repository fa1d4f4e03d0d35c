"""Text to token ids and back: tokenizer.json through the `tokenizers` library.

What is added to a prompt is what transformers adds: by `add_bos_token` and `add_eos_token` of
tokenizer_config.json where one of them is given, else by tokenizer.json's own post-processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fewbits.checkpoint import Checkpoint
from fewbits.errors import CheckpointError, FewbitsError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_LIMIT = 256_000_000  # bytes; those of vocabularies of 256,000 words have some 35 MB
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@contextmanager
def _explained() -> Iterator[None]:
    """The library raises bare Exceptions, and panics, which derive from BaseException and have no importable name."""
    try:
        yield
    except FewbitsError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = f"the tokenizers library can't use it: {error}"
        raise CheckpointError("tokenizer-invalid", text, module="tokenizer.json") from error


class Tokenizer:
    """The tokenizer of a checkpoint's folder. Files are read when first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def available(self) -> bool:
        """Whether the folder has a tokenizer.json at all."""
        return (self.checkpoint.folder / "tokenizer.json").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, empty where there is none."""
        return self.checkpoint.json("tokenizer_config.json") or {}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and so on, as templates name them, for those the checkpoint has."""
        older = self.checkpoint.json("special_tokens_map.json") or {}
        found = {}
        for name in _SPECIAL_TOKENS:
            value = self.config.get(name) or older.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
        return found

    @cached_property
    def _backend(self) -> Backend:
        from tokenizers import Tokenizer as Backend

        if not self.available:
            raise UsageError(
                "tokenizer-missing",
                "the checkpoint has no tokenizer.json",
                source=str(self.checkpoint.folder),
                hint="--prompt-ids takes token ids and needs no tokenizer",
            )
        data = self.checkpoint.file("tokenizer.json", _LIMIT, "tokenizer-invalid")
        with _explained():
            return Backend.from_buffer(data)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, with the tokens that the checkpoint adds to a prompt unless `special` is False.

        Raises UsageError for text that isn't valid Unicode (a command line in another encoding).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("prompt-not-text", f"the prompt isn't valid UTF-8: {error.reason}") from None
        adds = {end: self.config.get(f"add_{end}_token") for end in ("bos", "eos")}
        by_config = special and any(isinstance(value, bool) for value in adds.values())
        with _explained():
            ids: list[int] = self._backend.encode(text, add_special_tokens=special and not by_config).ids
        if by_config:
            ids = self._special(adds["bos"], "bos_token") + ids + self._special(adds["eos"], "eos_token")
        return ids

    def _special(self, wanted: Any, name: str) -> list[int]:
        token = self.special_tokens.get(name)
        found = self._backend.token_to_id(token) if wanted is True and token is not None else None
        return [] if found is None else [found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids that the tokenizer doesn't know are left out."""
        with _explained():
            return self._backend.decode(list(ids), skip_special_tokens=True)
