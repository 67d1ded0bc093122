"""Text that comes in pieces is the text that all tokens have together, cut where it must be."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import make_tokenizer
from phatgoose.models.text.decoding import IncrementalDecoder
from phatgoose.serving.engine.text import Delta, StopStrings, merge_streams, token_offsets

BYTES = make_tokenizer()


def spaced() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a word's space belongs to it, and the first one's is not written."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(
        ["one two three two one"], trainers.BpeTrainer(special_tokens=["<pad>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


SPACED = spaced()


def pieces(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@given(st.text(max_size=40))
def test_any_text_comes_out_whole(text):
    ids = BYTES(text)["input_ids"]
    found = pieces(BYTES, ids)
    assert "".join(found) == BYTES.decode(ids, skip_special_tokens=True) == text
    assert not any("�" in piece for piece in found[:-1]) or "�" in text


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=30))
def test_any_tokens_come_out_as_they_do_together(ids):
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(SPACED) - 1), max_size=20))
def test_spaces_that_belong_to_words(ids):
    assert "".join(pieces(SPACED, ids)) == SPACED.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_once_it_is_whole():
    ids = BYTES("a😀b")["input_ids"]
    found = pieces(BYTES, ids)
    assert [p for p in found if p] == ["a", "😀", "b"]


@given(st.text("ab#", max_size=20), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_string(text, strings, data):
    stops, shown, rest = StopStrings(strings), "", text
    while rest and not stops.stopped:
        size = data.draw(st.integers(1, len(rest)))
        shown += stops.push(rest[:size])
        rest = rest[size:]
    shown += stops.flush()
    # By character: where the first stop string is complete, and of those that are then, the one that began first.
    end = next((i for i in range(1, len(text) + 1) if any(text[:i].endswith(s) for s in strings)), None)
    if end is None:
        assert shown == text
        assert not stops.stopped
    else:
        assert stops.stopped
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(s) for s in strings)
        assert not any(s in shown for s in strings)


@pytest.mark.parametrize(
    ("strings", "parts", "shown"),
    [
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["stop"], ["s", "t", "a", "sto", "p"], ["", "", "sta", "", ""]),
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_only_what_may_become_a_stop_string_is_held_back(strings, parts, shown):
    stops = StopStrings(strings)
    assert [stops.push(p) for p in parts] == shown
    assert stops.push("more") == ("" if stops.stopped else "more")


@given(st.lists(st.integers(2, len(BYTES) - 1), max_size=30))
def test_offsets_are_where_a_tokens_text_stands(ids):
    """Also behind bytes that never become a character."""
    whole = BYTES.decode(ids)
    for at, token in zip(token_offsets(BYTES, ids, whole), ids, strict=True):
        own = BYTES.decode([token])
        assert "\ufffd" in own or whole[at:].startswith(own)


class Begins:
    """A tokenizer that puts a special token before every text."""

    names = ("<s>", "a", " b", "</s>")

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(self.names[i] for i in ids if not (skip_special_tokens and i in (0, 3)))


def test_offsets_leave_out_what_the_tokenizer_puts_before_a_text():
    assert token_offsets(Begins(), [0, 1, 2], "a b") == [0, 0, 1]
    assert token_offsets(Begins(), [0, 1, 3, 2], "a</s> b") == [0, 0, 1, 5]
    assert token_offsets(Begins(), [0, 1, 2], "<s>a b") == [0, 3, 4]  # given as tokens, it is shown
    assert token_offsets(Begins(), [0, 1, 2], "A b") == [0, 0, 1]  # a tokenizer that changes its text


class Running:
    """A `TextStream` whose tokens are there as soon as they are asked for."""

    def __init__(self, tokens: int):
        self.tokens, self.token_count = tokens, 0

    async def deltas(self, deadline: float | None = None):
        for i in range(self.tokens):
            self.token_count += 1
            yield Delta(str(i), finish_reason="length" if i + 1 == self.tokens else None)


def test_one_answers_token_count_goes_with_its_deltas():
    """The usage that a stream reports with each chunk is that of the chunk."""

    async def counts(stream):
        return [stream.token_count async for _ in merge_streams([stream], None)]

    assert asyncio.run(counts(Running(6))) == [1, 2, 3, 4, 5, 6]


def test_several_answers_come_whole_each_with_its_number():
    async def parts(streams):
        return [(index, delta.text) async for index, delta in merge_streams(streams, None)]

    found = asyncio.run(parts([Running(3), Running(5)]))
    for index, tokens in enumerate((3, 5)):
        assert [text for number, text in found if number == index] == [str(i) for i in range(tokens)]
