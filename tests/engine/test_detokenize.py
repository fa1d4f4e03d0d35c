from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fewbits.engine.detokenize import Detokenizer, StopStrings, TextStream


def byte_level() -> Tokenizer:
    """One token a byte, and a few longer ones: a character of three bytes takes up to three tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "th"), ("â", "Ĥ"), ("ð", "Ł")]
    vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece's way: ▁ for a space, the first one dropped, unknown characters as <0xNN> bytes."""
    tokens = ["<unk>", "▁", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


BYTES, SPACES = byte_level(), metaspace()


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    made = Detokenizer(tokenizer.decode)
    return [*(made.feed([token]) for token in ids), made.finish()]


@given(st.text(max_size=120))
def test_pieces_are_the_text_and_break_no_character(text: str) -> None:
    pieces = stream(BYTES, BYTES.encode(text).ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=100))
def test_any_bytes_give_what_decoding_all_at_once_gives(ids: list[int]) -> None:
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids)


@given(st.lists(st.sampled_from(["▁", "▁a", "b", "é", "世", "🙂"]), max_size=90))
def test_first_space_is_dropped_once_and_bytes_are_put_together(tokens: list[str]) -> None:
    ids = []
    for token in tokens:
        known = SPACES.token_to_id(token)
        ids += [SPACES.token_to_id(f"<0x{byte:02X}>") for byte in token.encode()] if known is None else [known]
    assert "".join(stream(SPACES, ids)) == SPACES.decode(ids)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    euro = BYTES.encode("a€b").ids
    assert [len(piece) for piece in stream(BYTES, euro)] == [1, 0, 1, 1, 0]


def test_unknown_ids_are_no_text() -> None:
    assert "".join(stream(BYTES, [*BYTES.encode("ab").ids, 5000, *BYTES.encode("c").ids])) == "abc"


def test_decoding_cost_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(BYTES.decode(ids))

    made = Detokenizer(decode)
    for token in BYTES.encode("word " * 300).ids:
        made.feed([token])
    assert longest < 50


@st.composite
def texts_in_pieces(draw: st.DrawFn) -> tuple[str, list[str], list[str]]:
    text = draw(st.text("ab\n", max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return text, pieces, draw(st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))


@given(texts_in_pieces())
def test_stop_strings_cut_at_the_first_however_the_text_is_split(case: tuple[str, list[str], list[str]]) -> None:
    text, pieces, stop = case
    found = StopStrings(stop)
    out = ""
    for piece in pieces:
        out += found.feed(piece)
        if found.stopped:
            break
    else:
        out += found.finish()
    assert found.stopped == any(string in text for string in stop)
    if found.stopped:
        assert any((out + string) == text[: len(out + string)] for string in stop)
        assert not any(string in out for string in stop)
    else:
        assert out == text


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["\n\n", "END"])
    assert [stop.feed(piece) for piece in ("one\n", "two", " E", "N", "d E", "ND!")] == [
        "one",
        "\ntwo",
        " ",
        "",
        "ENd ",
        "",
    ]
    assert stop.stopped


@pytest.mark.parametrize(("search", "expected", "stopped"), [(True, "a", True), (False, "axb", False)])
def test_stop_strings_do_not_count_before_the_minimum_length(search: bool, expected: str, stopped: bool) -> None:
    made = TextStream(BYTES.decode, ["x"])
    for token in BYTES.encode("axb").ids:
        if not made.stopped:
            made.feed([token], search)
    made.finish(search)
    assert (made.text, made.stopped) == (expected, stopped)
