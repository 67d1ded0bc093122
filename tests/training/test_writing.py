"""What a base writes, and which texts become rows."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import TrainingError
from phatgoose.models.base.base import end_tokens
from phatgoose.records import Example
from phatgoose.training.config import WritingConfig
from phatgoose.training.generated import (
    _first_token,
    _repeats_itself,
    _split_in_half,
    usable_rows,
    write_batch,
)

CONFIG = WritingConfig(rows=8, rows_per_batch=5, max_new_tokens=7)


def test_every_text_has_one_fate():
    ok = "one two three four"
    circle = "a b c " * 12
    batches = [
        [(ok, False), ("", False), ("word", False)],
        [(ok, True), (circle, True), ("five six seven", True)],
    ]
    rows, counts = usable_rows(batches, ())
    assert rows == [Example("one two", ("three four",)), Example("five six", ("seven",))]
    assert counts == {
        "written": 6,
        "usable": 2,
        "cut_off": 1,
        "empty": 1,
        "too_short": 1,
        "circular": 1,
        "repeated": 1,
    }
    prompted, counts = usable_rows(batches[:1], ("p", "q"))
    assert prompted == [Example("p", (ok,)), Example("p", ("word",))]  # the empty one was q's
    assert (counts["usable"], counts["empty"], counts["too_short"]) == (2, 1, 0)
    both, counts = usable_rows([[(ok, False)] * 4], ("p", "q"))
    assert [row.input for row in both] == ["p", "q"]
    assert counts["repeated"] == 2


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("one two three four", ("one two", "three four")),
        ("ab cd", ("ab", "cd")),
        ("a longerword", ("a", "longerword")),
        ("word", ("", "")),
        ("", ("", "")),
        ("two\nlines", ("", "")),
        ("a \n b  c", ("", "")),  # no space that stands alone: joining by one space would change the text
        ("first line\nsecond", ("first", "line\nsecond")),
    ],
)
def test_halves_join_to_the_text(text, halves):
    assert _split_in_half(text) == halves
    assert not halves[0] or " ".join(halves) == text


def test_a_text_that_repeats_itself_is_recognised():
    assert _repeats_itself(("no no no " * 5).split())
    assert _repeats_itself(("x y z w " * 5).split())
    assert not _repeats_itself(["a", "b", "c", "a", "b", "c"])  # short: four runs
    assert not _repeats_itself(
        ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "on", "the", "rug"]
    )


def test_batches_depend_on_seed_and_number_only(make_base):
    base = make_base("llama")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one = write_batch(base, CONFIG, (), 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    write_batch(base, CONFIG, (), 5)
    assert write_batch(base, CONFIG, (), 0) == one
    assert write_batch(base, CONFIG, (), 1) != one
    assert write_batch(base, WritingConfig(rows_per_batch=5, max_new_tokens=7, seed=1), (), 0) != one
    assert len(one) == 5


def test_sampling_is_the_models_own_distribution(make_base):
    """First tokens against the softmax of the logits after the first token, whatever the checkpoint's settings say."""
    base = make_base("llama")
    base.model.generation_config.top_k = 1
    base.model.generation_config.repetition_penalty = 3.0
    base.model.generation_config.do_sample = False
    start = torch.tensor([[_first_token(base)]])
    for temperature in (1.0, 0.5):
        config = WritingConfig(rows_per_batch=2000, max_new_tokens=1, temperature=temperature)
        texts = [text for text, _ in write_batch(base, config, (), 0)]
        with torch.no_grad():
            expected = (base.model(start).logits[0, -1] / temperature).softmax(-1)
        found = {t: texts.count(t) / 2000 for t in set(texts) if t}
        by_text: dict[str, float] = {}
        for token, share in enumerate(expected.tolist()):
            text = (
                ""
                if token in end_tokens(base.model, base.tokenizer.eos_token_id)
                else base.tokenizer.decode([token], skip_special_tokens=True).strip()
            )
            by_text[text] = by_text.get(text, 0) + share
        likely = sorted(by_text, key=by_text.get, reverse=True)[:5]
        for text in filter(None, likely):
            assert found.get(text, 0) == pytest.approx(by_text[text], abs=0.05)
    assert base.model.generation_config.top_k == 1


def test_texts_end_at_the_end_token_and_say_if_cut(make_base):
    base = make_base("llama")
    with torch.no_grad():
        base.model.lm_head.weight.mul_(0)  # every token alike: about 1 in 320 is an end
    texts = write_batch(base, WritingConfig(rows_per_batch=64, max_new_tokens=90), (), 0)
    cut = [c for _, c in texts]
    assert any(cut)
    assert not all(cut)
    assert all("</s>" not in text for text, _ in texts)


def test_prompts_are_used_in_turn_and_padded(make_base):
    base = make_base("llama")
    prompts = ("yes", "the quick brown fox", "no")
    config = WritingConfig(rows_per_batch=3, max_new_tokens=3, temperature=1e-4)  # as good as greedy
    together = write_batch(base, config, prompts, 0)
    for prompt, (text, _) in zip(prompts, together, strict=True):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        alone = base.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)[
            0, ids.shape[1] :
        ]
        end = [i for i, t in enumerate(alone.tolist()) if t == 1][:1]
        assert (
            text == base.tokenizer.decode(alone[: end[0] if end else None], skip_special_tokens=True).strip()
        )


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"seed": -1}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(TrainingError, match=f"WritingConfig.{next(iter(wrong))} = "):
        WritingConfig(**wrong)
