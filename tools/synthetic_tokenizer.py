"""A byte-level BPE tokenizer of any size with random merges: it encodes any text, and its files are of real size."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPACE = "\u0120"  # how the byte-level alphabet writes a space
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 12  # letters of a token
SHORT = 700  # the first merges, which make few letters: a token and one of these seldom make too many
SPECIAL = ("<|begin|>", "<|end|>")


def begin_id(vocabulary: int) -> int:
    return vocabulary - 2


def end_id(vocabulary: int) -> int:
    return vocabulary - 1


def write_tokenizer(folder: Path, vocabulary: int, context: int) -> None:
    """`vocabulary` tokens: 256 bytes, merges, and the two special ones last. Raises ValueError for fewer than 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet) + len(SPECIAL):
        raise ValueError(f"a byte-level vocabulary has at least {len(alphabet) + len(SPECIAL)} tokens")
    tokens = {token: number for number, token in enumerate(alphabet)}
    pool = [SPACE, *LETTERS]
    merges = []
    choose = random.Random(0)
    while len(tokens) < vocabulary - len(SPECIAL):
        left, right = choose.choice(pool), choose.choice(pool[:SHORT])
        merged = left + right
        if right.startswith(SPACE) or len(merged) > LONGEST or merged in tokens:
            continue
        tokens[merged] = len(tokens)
        pool.append(merged)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
