"""Where a conversation's text begins, against its rendered text."""

import copy

import pytest
import torch

from conftest import make_tokenizer
from phatgoose.models.text.markup import markup_of
from phatgoose.routers.markup import BEGUN, START, Markup

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<s>[INST] {{ m.content }} [/INST]{% endfor %}"
)


@pytest.fixture(scope="module")
def made():
    tokenizer = make_tokenizer()
    marks = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer.add_special_tokens(marks)
    return tokenizer


@pytest.fixture
def chatting(made):
    def make(template):
        tokenizer = copy.deepcopy(made)
        tokenizer.chat_template = template
        return tokenizer

    return make


def before_text(tokenizer, ids):
    """What is left out of the beginning, as text."""
    counts, _ = markup_of(tokenizer).read(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), torch.tensor([START])
    )
    count = int((~counts).sum())
    assert counts[0].tolist() == [False] * count + [True] * (len(ids) - count)
    return tokenizer.decode(ids[:count])


def rendered(tokenizer, *said):
    roles = ("user", "assistant") if len(said) != 2 else ("system", "user")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    "text", ["Is water wet?", "user", "user\nuser", "assistant", "You are a helpful user"]
)
def test_a_conversation_begins_with_what_is_said(chatting, text):
    tokenizer = chatting(CHATML)
    head = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
    assert before_text(tokenizer, rendered(tokenizer, text)) == head
    assert before_text(tokenizer, rendered(tokenizer, text, "no", text)) == head
    assert before_text(tokenizer, rendered(tokenizer, "Be brief.", text)) == "<|im_start|>system\n"


def test_without_special_tokens_all_counts(chatting, made):
    assert before_text(made, made("user\nIs water wet?")["input_ids"]) == ""
    assert before_text(made, made("<s>user\nIs water wet?")["input_ids"]) == "<s>"
    tokenizer = chatting(CHATML)
    assert before_text(tokenizer, tokenizer("user\nIs water wet?")["input_ids"]) == ""


def test_a_template_that_refuses_system_turns_is_known_by_the_others(chatting):
    tokenizer = chatting(NO_SYSTEM)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Is"}])["input_ids"]
    assert before_text(tokenizer, ids).rstrip() == "<s>[INST]"


def test_token_by_token_and_behind_padding_it_is_the_same():
    markup = Markup({7, 8}, [[7, 1, 2], [7, 3], [8]])
    rows = [[7, 1, 2, 2, 7, 3], [8, 9, 7, 1, 2, 2], [7, 7, 1, 8, 7, 3], [7, 1, 1, 2, 7, 3]]
    wanted = [3, 1, 6, 2]
    ids, real = torch.tensor(rows), torch.ones(4, 6, dtype=torch.bool)
    whole, states = markup.read(ids, real, torch.full((4,), START))
    assert (~whole).sum(1).tolist() == wanted
    known, found = torch.full((4,), START), []
    alone = known
    for t in range(6):
        padded = torch.stack([torch.zeros(4, dtype=torch.long), ids[:, t]], 1)
        some = torch.tensor([[False, True]] * 4)
        counts, after = markup.read(padded, some, known)
        assert not counts[:, 0].any()
        found.append(counts[:, 1])
        known = after[:, -1]
        assert torch.equal(known, states[:, t])
        counts, after = markup.read(ids[:, t : t + 1], real[:, t : t + 1], alone)
        assert torch.equal(counts[:, 0], whole[:, t])
        alone = after[:, 0]
        assert torch.equal(alone, known)
        _, after = markup.read(ids[:, t : t + 1], ~real[:, t : t + 1], alone)
        assert torch.equal(after[:, 0], alone)
    assert torch.equal(torch.stack(found, 1), whole)
    assert known.tolist() == [BEGUN, BEGUN, int(states[2, -1]), BEGUN]
