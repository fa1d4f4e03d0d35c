"""Strict reader of config objects: typed values, and a record of the keys that nobody read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fewbits.checkpoint.strict_json import is_int
from fewbits.errors import CheckpointError, PlanError

_REQUIRED: Any = object()
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_TYPE_NAMES |= {list: "a list", dict: "an object"}

# Keys of a Hugging Face config.json that don't change what the model computes.
HARMLESS = frozenset(
    """_name_or_path _commit_hash architectures model_type auto_map torch_dtype dtype transformers_version
    use_cache initializer_range pretraining_tp attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop
    output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate torchscript
    tie_encoder_decoder is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    chunk_size_feed_forward bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix do_sample temperature top_k top_p typical_p max_length min_length num_beams
    num_beam_groups num_return_sequences repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size early_stopping diversity_penalty bad_words_ids exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens remove_invalid_values
    output_scores tf_legacy_loss use_bfloat16 pruned_heads rope_scaling_type unsloth_version unsloth_fixed
    max_window_layers use_sliding_window""".split()
)


class Config:
    """One JSON object of a checkpoint. Values are read with a type; what is never read is a leftover.

    `source` names the file, `path` the dotted place inside it. A `fallback` is asked for keys that are absent
    here (the top level behind a `text_config`).
    """

    def __init__(self, data: dict[str, Any], source: str, path: str = "", fallback: Config | None = None) -> None:
        self.data = data
        self.source = source
        self.path = path
        self.fallback = fallback
        self._read: set[str] = set()
        self._subs: dict[str, Config] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value other than null. Doesn't count as reading it."""
        if self.data.get(key) is not None:
            return True
        return self.fallback is not None and key in self.fallback

    def where(self, key: str) -> str:
        """ "config.json, quantization_config.format": for the `source` of errors."""
        if self.data.get(key) is None and self.fallback is not None and key in self.fallback:
            return self.fallback.where(key)
        return f"{self.source}, {self._dotted(key)}"

    def _dotted(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _value(self, key: str) -> Any:
        self.ignore(key)
        return self.data.get(key)

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value, of type `kind` (an integer passes as float). Absent or null: `default`.

        Raises CheckpointError: config-missing where there is no default, config-type for another type.
        """
        value = self._value(key)
        if value is None:
            if self.fallback is not None:
                return self.fallback.get(key, kind, default)
            if default is _REQUIRED:
                raise CheckpointError("config-missing", f"{key} is missing", source=self.where(key))
            return default
        if kind is float and is_int(value):
            value = float(value)
        fits = is_int(value) if kind is int else isinstance(value, kind)
        if not fits or (kind is float and not math.isfinite(value)):
            raise CheckpointError(
                "config-type",
                f"{key} must be {_TYPE_NAMES[kind]}, not {shorten(value)}",
                source=self.where(key),
            )
        return value

    def expect(self, key: str, *allowed: Any, default: Any = _REQUIRED) -> Any:
        """The value, which must be one of `allowed`: PlanError config-unsupported otherwise."""
        default = allowed[0] if default is _REQUIRED else default
        value = self._value(key)
        if value is None:
            if self.fallback is not None:
                return self.fallback.expect(key, *allowed, default=default)
            return default
        if not any(value == one and type(value) is type(one) for one in allowed):
            choices = ", ".join(repr(one) for one in allowed)
            raise PlanError(
                "config-unsupported",
                f"{key} is {shorten(value)}; fewbits knows {choices}",
                source=self.where(key),
            )
        return value

    def sub(self, key: str) -> Config | None:
        """The object under `key`, None where it is absent, null or empty. Its keys keep their own record."""
        if self.data.get(key) is None and self.fallback is not None:
            return self.fallback.sub(key)
        if key not in self._subs:
            value = self.get(key, dict, {})
            if not value:
                return None
            self._subs[key] = Config(value, self.source, self._dotted(key))
        return self._subs[key]

    def over(self, fallback: Config) -> Config:
        """This object, with another for the keys that are absent here. What is read of it counts as read of this."""
        view = Config(self.data, self.source, self.path, fallback)
        view._read, view._subs = self._read, self._subs
        return view

    def ignore(self, *keys: str) -> None:
        """Mark keys as read: known, and of no consequence here."""
        self._read.update(keys)
        if self.fallback is not None:
            self.fallback.ignore(*keys)

    def leftovers(self, harmless: frozenset[str] = frozenset()) -> Iterator[str]:
        """Dotted paths of keys that carry a value (not null, {}, [] or "") and were never read."""
        for key, value in self.data.items():
            if key in self._subs:
                yield from self._subs[key].leftovers(harmless)
            elif key not in self._read and key not in harmless and value not in (None, {}, [], ""):
                yield self._dotted(key)
        if self.fallback is not None:
            yield from self.fallback.leftovers(harmless)


def shorten(value: Any) -> str:
    """A value as an error quotes it."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else text[:77] + "..."
