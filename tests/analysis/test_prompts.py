from __future__ import annotations

import dataclasses

import pytest
import torch

from phatgoose.analysis.prompts import (
    UNSEEN,
    RoutedPrompt,
    Span,
    answer_spans,
    encoded,
    routed_prompt,
    token_texts,
)
from phatgoose.errors import EvaluationError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.models.trace.record import trace
from phatgoose.models.trace.result import Trace
from phatgoose.routers import PHATGOOSE, Uniform
from report_data import unpacked

TEXTS = ["yes", "What is the past tense of walk 😀 ü?"]
FACTS = {"task": "t", "prompt": "p", "expected": "e", "answer": "a", "correct": True}


@pytest.fixture
def routed(make_base, make_expert):
    """A routed tiny base with three experts, one of which adapts attention only."""

    def make(family, router=None):
        base = make_base(family)
        one = {"llama": ["q_proj"], "t5": ["q"]}[family]
        pool = Pool(
            [
                make_expert(base, "a", seed=1),
                make_expert(base, "b", seed=2, rank=3),
                make_expert(base, "c", seed=3, targets=one),
            ]
        )
        route(base, pool, router or PHATGOOSE(top_k=2))
        return base

    return make


def whole_choices(base, **inputs):
    """{module: [(expert, weight), …] per token} of a single forward of one sequence, without a cache."""
    with torch.no_grad(), trace(base) as t:
        base.model(**inputs, use_cache=False)
    return {
        c.path: [
            list(zip(e, w, strict=True)) for e, w in zip(c.experts.tolist(), c.weights.tolist(), strict=True)
        ]
        for c in t.choices
    }


def same(pairs, expected):
    return {e for e, _ in pairs} == {e for e, _ in expected} and all(
        abs(w - dict(expected)[e]) < 2e-3 for e, w in pairs
    )


@pytest.mark.parametrize("row", [0, 1])
def test_a_generation_is_put_together_from_its_calls(routed, row):
    base = routed("llama")
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad(), trace(base) as t:
        out = base.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    p = routed_prompt(t, base, row=row, **FACTS)

    prompt = base.tokenizer(TEXTS[row])["input_ids"]
    read = [*prompt, *out[row, batch["input_ids"].shape[1] : -1].tolist()]  # the last token is never read
    assert p.generated_from == len(prompt)
    assert len(p.tokens) == len(read)
    assert "".join(p.tokens[: p.generated_from]) == TEXTS[row]
    assert p.experts == ("a", "b", "c")
    expected = whole_choices(base, input_ids=torch.tensor([read]))
    assert set(p.modules) == set(expected)
    assert all(
        same(pairs, expected[path][i])
        for path, cells in zip(p.modules, p.choices, strict=True)
        for i, pairs in enumerate(cells)
    )
    assert all(a[1] >= b[1] for cells in p.choices for a, b in cells)  # best first


def test_an_encoder_decoder_shows_both_its_streams(routed):
    base = routed("t5")
    batch = base.tokenizer(TEXTS[1:], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad(), trace(base) as t:
        out = base.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    p = routed_prompt(t, base, **FACTS)
    n, written = batch["input_ids"].shape[1], out[:, :-1]
    assert p.generated_from == n
    assert len(p.tokens) == n + written.shape[1]
    expected = whole_choices(base, **batch, decoder_input_ids=written)
    for path, cells in zip(p.modules, p.choices, strict=True):
        of_encoder = path.startswith("encoder") or path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        mine, others = (cells[:n], cells[n:]) if of_encoder else (cells[n:], cells[:n])
        assert all(pairs == () for pairs in others)
        assert all(same(a, b) for a, b in zip(mine, expected[path], strict=True))
    data = encoded(p, "p")
    assert UNSEEN in unpacked(data["choices"][p.modules.index("encoder.block.0.layer.0.SelfAttention.q")])


def test_refusals_of_a_trace_that_isnt_one_sequence(routed):
    base = routed("llama")
    with pytest.raises(RoutingError, match=r"no tokens of row 0"):
        routed_prompt(Trace(("a",)), base, **FACTS)
    with torch.no_grad(), trace(base) as t:
        for text in ("yes no", "true"):
            base.model(**base.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    with pytest.raises(RoutingError, match="several sequences"):
        routed_prompt(t, base, **FACTS)
    embeddings = base.model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with torch.no_grad(), trace(base) as t:
        base.model(inputs_embeds=embeddings)
    with pytest.raises(RoutingError, match="no token ids"):
        routed_prompt(t, base, **FACTS)
    with torch.no_grad(), trace(base) as t:
        base.model(input_ids=torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 2]]))
    with pytest.raises(RoutingError, match=r"positions \[0, 2\]"):
        routed_prompt(t, base, **FACTS)


def test_token_texts_join_to_the_whole(tokenizer):
    for text in ("the quick brown fox", "  two\n\nlines ", "ü😀é", ""):
        ids = tokenizer(text)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text
    cut = tokenizer("😀")["input_ids"][:-1]
    assert len(cut) > 1  # a character of several tokens
    assert "".join(token_texts(tokenizer, cut)) == tokenizer.decode(cut)


def small(**changes) -> RoutedPrompt:
    cells = (((0, 0.75), (1, 0.25)), (), ((-1, 1.0),))
    p = RoutedPrompt(
        "t", "p", "e", "a", False, ("x", "y", "z"), 2, ("a", "b"), ("m.0.q", "m.1.q"), (cells, cells)
    )
    return dataclasses.replace(p, **changes)


def test_encoded_is_flat_and_says_who_acted():
    data = encoded(small(), "p")
    assert data["k"] == 2
    assert [unpacked(c) for c in data["choices"]] == [[0, 1, -2, -2, -1, -2]] * 2
    assert [unpacked(w) for w in data["weights"]] == [[750, 250, 0, 0, 1000, 0]] * 2
    assert data["sites"] == [[0, "q"], [1, "q"]]


def test_uniform_routing_has_all_experts_as_choices(routed):
    base = routed("llama", Uniform())
    with torch.no_grad(), trace(base) as t:
        base.model(input_ids=torch.tensor([[5, 6, 7]]))
    data = encoded(routed_prompt(t, base, **FACTS), "p")
    assert data["k"] >= 3
    assert data["generated_from"] == 3
    sizes = {len(unpacked(c)) for c in data["choices"]}
    assert sizes == {3 * data["k"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generated_from": 4}, "generated_from is 4, there are 3 tokens"),
        ({"modules": ("m.0.q",)}, "1 modules and choices of 2"),
        ({"tokens": ("x", "y")}, r"m\.0\.q: 2 tokens and choices at 3"),
        ({"experts": ("a",)}, r"m\.0\.q: expert 1 with weight 0\.25; there are 1 experts"),
        ({"choices": (((((0, float("nan")),),) * 3),) * 2}, "weight nan"),
    ],
)
def test_a_prompt_whose_parts_dont_fit_is_refused(changes, message):
    with pytest.raises(EvaluationError, match=r"prompts\[1\].*" + message):
        encoded(small(**changes), "prompts[1]")


def test_written_names_who_decided_each_part():
    a, b, none = ((0, 0.75), (1, 0.25)), ((1, 0.6), (0, 0.4)), ((-1, 1.0),)
    cells = (none, a, a, b, none)
    p = small(tokens=("p", "q", "x", "y", "z"), generated_from=2, choices=(cells, cells))
    assert answer_spans(p) == [Span("xy", "a", 0.75), Span("z", "b", 0.6), Span("…", "no expert", 1.0)]
    head = ((), b, b, b, b)  # only a prompt's last token comes to it
    p = small(tokens=("p", "q", "x", "y", "z"), generated_from=2, choices=(cells, head))
    assert [x.text for x in answer_spans(p)] == ["xy", "z", "…"]
    p = small(tokens=("p", "q"), generated_from=2, choices=(((), b),))
    assert answer_spans(p) == [Span("…", "b", 0.6)]
    read, unread = (a, a, (), ()), ((), (), b, a)
    p = small(tokens=("p", "q", "<s>", "x"), generated_from=2, choices=(read, unread))
    assert answer_spans(p) == [Span("x", "b", 0.6), Span("…", "a", 0.75)]


def test_beams_and_samples_are_refused(routed):
    base = routed("llama")
    with torch.no_grad(), trace(base) as t:
        base.model.generate(
            torch.tensor([[5, 6, 7]]),
            num_beams=3,
            max_new_tokens=6,
            min_new_tokens=6,
            attention_mask=torch.ones(1, 3),
        )
    with pytest.raises(RoutingError, match="num_beams=1"):
        routed_prompt(t, base, **FACTS)
    for settings in ({"histogram": True}, {"sample": 0.5}):
        with torch.no_grad(), trace(base, **settings) as t:
            base.model(input_ids=torch.tensor([[5, 6, 7]]))
        with pytest.raises(RoutingError, match="doesn't hold every token"):
            routed_prompt(t, base, **FACTS)
