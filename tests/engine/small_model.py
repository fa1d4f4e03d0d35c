"""A small checkpoint that the real tools wrote, and a tokenizer of one character a token for it."""

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL = "w4a16-asym-g32-head-f32"  # a llama of 2 layers with native kernels for all of it
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


def character_tokenizer(size: int) -> Tokenizer:
    """Ids 0, 1, 2 are unknown, begin and end; then one printable character each, up to `size` ids."""
    vocabulary = {token: index for index, token in enumerate([UNK, BOS, EOS, *string.printable[: size - 3]])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (UNK, BOS, EOS)])
    return tokenizer
