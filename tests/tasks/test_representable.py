"""What a tokenizer can't write, by rule: unknown tokens in answers, choices that become equal, unknown prompts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phatgoose.records import Example, Task
from phatgoose.tasks.representable import loss


@pytest.fixture(scope="module")
def words():
    vocabulary = {w: i for i, w in enumerate(["<unk>", "</s>", "red", "blue", "which", "colour", "{"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def task(*rows):
    return Task("t", (), (), tuple(rows))


def test_plain_rows_lose_nothing(words, tokenizer):
    rows = task(Example("which colour", ("red",), ("red", "blue")), Example("which", ("blue",)))
    for one in (words, tokenizer):
        assert loss(one, rows).answers == loss(one, rows).prompt == 0
        assert not loss(one, rows).too_much


def test_unknown_answers_and_prompts_are_counted(words):
    rows = task(
        Example("which colour", ("🟥",), ("🟥", "blue")),
        Example("which colour", ("red",), ("red", "blue")),
        Example("which farbe", ("red",)),
    )
    found = loss(words, rows)
    assert found.answers == pytest.approx(1 / 3)
    assert found.prompt == pytest.approx(1 / 6)
    assert found.too_much
    assert "33% of its rows" in str(found)


def test_choices_that_become_the_same_tokens_are_lost(words):
    found = loss(words, task(Example("which", ("red",), ("red", "red "[:3] + "\t"))))
    assert found.answers == 1


def test_bytes_lose_nothing(tokenizer):
    rows = task(Example("🎬 фильм {", ("🟥",), ("🟥", "синий")))
    assert not loss(tokenizer, rows).too_much
