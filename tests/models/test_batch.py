"""Against plain transformers: one row at a time, unpadded, labels the length of the input."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from phatgoose.errors import TaskError
from phatgoose.models.text.batch import collate, length_batches, pad_id, target_logits, target_loss
from phatgoose.models.text.encoding import Encoded, encode_answers
from phatgoose.records import Example

FAMILIES = ("llama", "qwen", "gpt2", "t5")
PAIRS = [
    ("What is the past tense of walk?\nAnswer:", "walked"),
    ("yes or no\nAnswer:", "a much longer answer than the prompt is, by far, over the lazy dog"),
    ("x", "7"),
    ("the quick brown fox jumps over " * 9 + "\nAnswer:", "maybe true"),
]


@pytest.fixture
def special(tokenizer):
    """special("<s> $A </s>") → the tokenizer with these added to every text; <s> is token 2."""

    def make(template):
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"bos_token": "<s>"})
        ids = [(t, made.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
        made._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
        return made

    return make


def encode_choices(tokenizer, prompt, choices, seq2seq=False, max_length=512):
    base = SimpleNamespace(tokenizer=tokenizer, is_encoder_decoder=seq2seq)
    return encode_answers(base, Example(prompt, tuple(choices)), choices, max_length)


def encode(tokenizer, pairs, seq2seq=False, max_length=512):
    return [encode_choices(tokenizer, p, [a], seq2seq, max_length)[0] for p, a in pairs]


def test_decoder_only_ids(tokenizer):
    (e,) = encode(tokenizer, [("walk?\nAnswer:", "walked")])
    assert tokenizer.decode(e.prompt_ids) == "walk?\nAnswer:"
    assert tokenizer.decode(e.target_ids) == " walked</s>"
    assert list(e.prompt_ids + e.target_ids[:-1]) == tokenizer("walk?\nAnswer: walked")["input_ids"]
    assert (e.truncated, e.length) == (False, len(e.prompt_ids) + len(e.target_ids))


def test_where_the_tokenizer_joins_prompt_and_answer(tokenizer):
    """A prompt whose last token changes once text follows it: "Answer:" + " " here, by a merge across the border."""
    joined = copy.deepcopy(tokenizer)
    real = joined._encode_plus

    def merged(text, *args, **kwargs):
        out = real(text, *args, **kwargs)
        if text.endswith("Q a"):
            out["input_ids"] = [299, *out["input_ids"][-1:]]
        return out

    joined._encode_plus = merged
    (e,) = encode(joined, [("Q", "a")])
    assert list(e.prompt_ids) == tokenizer("Q")["input_ids"]
    assert list(e.target_ids) == [*tokenizer(" a")["input_ids"], 1]


def test_special_tokens_only_where_the_tokenizer_puts_them(special):
    both = special("<s> $A </s>")
    begin, end = both.bos_token_id, both.eos_token_id
    (e,) = encode(both, PAIRS[:1])
    assert e.prompt_ids[0] == begin
    assert end not in e.prompt_ids
    assert e.target_ids.count(end) == 1
    assert e.target_ids[-1] == end
    assert begin not in e.target_ids
    (plain,) = encode(special("$A"), PAIRS[:1])
    assert e.prompt_ids[1:] == plain.prompt_ids
    assert e.target_ids == plain.target_ids


def test_a_prompt_rendered_by_a_template_keeps_its_tokens(special):
    """Its own BOS token isn't doubled, and behind its last line break the answer follows without a space."""
    for template, prompt in (("<s> $A", "<s>walk?\nAnswer:\n"), ("$A", "walk?\nAnswer:\n")):
        made = special(template)
        (e,) = encode(made, [(prompt, "walked")])
        assert list(e.prompt_ids) == made(prompt, add_special_tokens=False)["input_ids"]
        whole = made(prompt + "walked", add_special_tokens=False)["input_ids"]
        assert list(e.prompt_ids + e.target_ids) == [*whole, made.eos_token_id]


def test_an_end_token_written_in_the_prompt_stays(tokenizer):
    (e,) = encode(tokenizer, [("one</s>", "two")])
    assert e.prompt_ids[-1] == tokenizer.eos_token_id


def test_encoder_decoder_ids(special):
    t5 = special("$A </s>")
    (e,) = encode(t5, [("walk?", "walked")], seq2seq=True)
    assert list(e.prompt_ids) == t5("walk?")["input_ids"]
    assert e.prompt_ids[-1] == 1
    assert t5.decode(e.target_ids) == "walked</s>"


def test_targets_in_the_language_of_targets(special, monkeypatch):
    """As NLLB's (a language before, the end after) and mBART's (the end, then a language):
    both are told apart by text_target."""
    made = special("$A </s>")
    kind = type("Translating", (type(made),), {})
    made.__class__ = kind
    source = made._tokenizer.post_processor
    ids = [(t, made.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    kind._switch_to_input_mode = lambda self: setattr(self._tokenizer, "post_processor", source)
    bare = made("walked", add_special_tokens=False)["input_ids"]
    for template, wanted in (("<s> $A </s>", [ids[0][1], *bare, 1]), ("$A </s> <s>", [*bare, 1])):
        target = TemplateProcessing(single=template, special_tokens=ids)
        kind._switch_to_target_mode = lambda self, to=target: setattr(self._tokenizer, "post_processor", to)
        (e,) = encode(made, [("walk?", "walked")], seq2seq=True)
        assert list(e.prompt_ids) == [*made("walk?", add_special_tokens=False)["input_ids"], 1]
        assert list(e.target_ids) == wanted


def test_choices_share_one_prompt_even_when_cut(tokenizer):
    choices = ["a", "a rather long choice of several words"]
    whole = encode_choices(tokenizer, PAIRS[3][0], choices)
    cut = encode_choices(tokenizer, PAIRS[3][0], choices, max_length=40)
    assert len({e.prompt_ids for e in whole}) == len({e.prompt_ids for e in cut}) == 1
    assert [e.target_ids for e in whole] == [e.target_ids for e in cut]
    assert max(e.length for e in cut) == 40
    assert cut[0].prompt_ids == whole[0].prompt_ids[-len(cut[0].prompt_ids) :]
    assert cut[0].cut == len(whole[0].prompt_ids) - len(cut[0].prompt_ids)
    assert cut[0].truncated
    assert not whole[0].truncated


def test_a_cut_keeps_the_begin_token_and_the_encoders_end(special):
    llama, t5 = special("<s> $A"), special("$A </s>")
    (e,) = encode(llama, PAIRS[3:], max_length=20)
    (w,) = encode(llama, PAIRS[3:])
    assert e.length == 20
    assert e.prompt_ids[0] == llama.bos_token_id
    assert e.prompt_ids[1:] == w.prompt_ids[-len(e.prompt_ids) + 1 :]
    (e,) = encode(t5, PAIRS[3:], seq2seq=True, max_length=20)
    assert (len(e.prompt_ids), e.prompt_ids[-1]) == (20, 1)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_refusals(tokenizer, seq2seq):
    size = len(tokenizer(" walked" if not seq2seq else "walked")["input_ids"]) + 1
    fits = size if seq2seq else size + 1
    assert encode(tokenizer, PAIRS[:1], seq2seq, max_length=fits)[0].truncated
    with pytest.raises(TaskError, match=f"an answer of {size} tokens leaves no room"):
        encode(tokenizer, PAIRS[:1], seq2seq, max_length=fits - 1)
    with pytest.raises(TaskError, match="prompt '' has no tokens"):
        encode(tokenizer, [("", "x")], seq2seq)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        encode(endless, PAIRS[:1], seq2seq)


def test_collate_by_hand():
    rows = [Encoded((5, 6, 7), (8, 1)), Encoded((9,), (4, 3, 1))]
    b = collate(rows, 0, is_encoder_decoder=False)
    assert b["input_ids"].tolist() == [[5, 6, 7, 8, 1], [0, 9, 4, 3, 1]]
    assert b["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert b["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert b["labels"].tolist() == [[-100, 8, 1], [4, 3, 1]]
    b = collate(rows, 0, is_encoder_decoder=True)
    assert b["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert b["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert b["labels"].tolist() == [[8, 1, -100], [4, 3, 1]]
    assert all(t.dtype == torch.int64 for t in b.values())


def row_loss(base, e):
    """(sum of negative log-likelihoods, number of target tokens) of one unpadded row, by transformers' own loss."""
    prompt, target = list(e.prompt_ids), list(e.target_ids)
    if base.is_encoder_decoder:
        out = base.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target]))
    else:
        labels = torch.tensor([[-100] * len(prompt) + target])
        out = base.model(input_ids=torch.tensor([prompt + target]), labels=labels)
    return out.loss.float() * len(target), len(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_padded_batch_is_that_of_its_rows(make_base, family, dtype):
    base = make_base(family, dtype=dtype)
    encoded = encode(base.tokenizer, PAIRS, base.is_encoder_decoder)
    batch = collate(encoded, pad_id(base.tokenizer), is_encoder_decoder=base.is_encoder_decoder)
    with torch.no_grad():
        logits = target_logits(base.model, batch)
        loss = target_loss(logits, batch["labels"]) / int((batch["labels"] != -100).sum())
        parts = [row_loss(base, e) for e in encoded]
    assert logits.shape[:2] == batch["labels"].shape
    assert loss.dtype == torch.float32
    expected = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_targets_logits_are_computed(make_base, family):
    base = make_base(family)
    seen = []
    base.model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    batch = collate(encode(base.tokenizer, PAIRS), 0, is_encoder_decoder=False)
    target_logits(base.model, batch)
    assert seen == [batch["labels"].shape[1] + 1]


class Plain(GPT2LMHeadModel):
    """A model whose forward knows neither logits_to_keep nor position_ids."""

    def forward(self, input_ids, attention_mask=None):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)


def test_a_model_without_the_arguments_gives_the_same_logits(make_base):
    base = make_base("gpt2")
    plain = Plain(base.model.config).eval()
    plain.load_state_dict(base.model.state_dict())
    batch = collate(encode(base.tokenizer, PAIRS), 0, is_encoder_decoder=False)
    torch.testing.assert_close(target_logits(plain, batch), target_logits(base.model, batch))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_wrapped_models(make_base, family):
    base = make_base(family)
    batch = collate(
        encode(base.tokenizer, PAIRS, base.is_encoder_decoder), 0, is_encoder_decoder=base.is_encoder_decoder
    )
    expected = target_logits(base.model, batch)
    torch.testing.assert_close(target_logits(torch.nn.DataParallel(base.model), batch), expected)
    modules = ["q_proj"] if family == "llama" else ["q"]
    seen = []
    base.model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    peft = get_peft_model(base.model, LoraConfig(r=2, target_modules=modules))
    torch.testing.assert_close(target_logits(peft, batch), expected)
    assert seen == [batch["labels"].shape[1] + (family == "llama")]


def test_loss_by_hand():
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    picked = torch.stack([logits[0, 1], logits[0, 2], logits[1, 2]]).float()
    expected = cross_entropy(picked, torch.tensor([1, 2, 4]))
    torch.testing.assert_close(target_loss(logits, labels) / 3, expected)


@given(st.lists(st.integers(0, 60)), st.integers(1, 7), st.none() | st.integers(1, 150))
def test_length_batches(lengths, max_rows, max_tokens):
    batches = list(length_batches(lengths, max_rows, max_tokens))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    order = [lengths[i] for b in batches for i in b]
    assert order == sorted(lengths, reverse=True)
    for b in batches:
        assert 1 <= len(b) <= max_rows
        assert max_tokens is None or len(b) == 1 or len(b) * lengths[b[0]] <= max_tokens


def test_length_batches_refuse_nonsense():
    with pytest.raises(ValueError, match="at least 1"):
        list(length_batches([1], 0))
