from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from encoder_fixtures import make_encoder, signed
from gander_oracle import Oracle
from phatgoose.errors import EvaluationError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route, routing_of, unroute
from phatgoose.models.text.batch import pad_id
from phatgoose.routers import PHATGOOSE, Gander, Random, Single, SoftCentroid
from phatgoose.workflows import explain as module
from phatgoose.workflows.explain import Effect, ExplainOptions, Explanation, explain, words

PROMPT = "What is the past tense of walk?"


@pytest.fixture
def pooled(make_base, make_expert):
    def make(family):
        base = make_base(family)
        some = {"llama": ["q_proj", "v_proj"], "t5": ["q", "k"]}[family]
        return base, [
            make_expert(base, "a", seed=1),
            make_expert(base, "b", seed=2, rank=3),
            make_expert(base, "c", seed=3, targets=some),
        ]

    return make


def likelihood(base, prompt, answer):
    """Token by token from plain forwards: (log-likelihood, whether each token is the likeliest)."""
    total, greedy = 0.0, True
    for i, token in enumerate(answer):
        with torch.no_grad():
            if base.is_encoder_decoder:
                logits = base.model(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:i]]])
                ).logits
            else:
                logits = base.model(input_ids=torch.tensor([[*prompt, *answer[:i]]])).logits
        scores = logits[0, -1].log_softmax(-1)
        total += float(scores[token])
        greedy &= int(scores.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_number_agrees_with_pools_made_for_it(pooled, family):
    base, experts = pooled(family)
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    found, routed = explain(base, Pool(experts), ids, prompt=PROMPT, options=ExplainOptions(6, batch_rows=3))
    assert routing_of(base) is None

    route(base, Pool(experts), PHATGOOSE())
    out = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        pad_token_id=pad_id(base.tokenizer),
    )  # fmt: skip
    answer = out[0, 1 if family == "t5" else ids.shape[1] :].tolist()
    assert found.answer == base.tokenizer.decode(answer, skip_special_tokens=True)
    assert len(found.tokens) == len(answer)
    prompt = ids[0].tolist()
    whole, greedy = likelihood(base, prompt, answer)
    assert greedy
    assert found.log_likelihood == pytest.approx(whole, rel=1e-5, abs=1e-5 * len(answer))
    unroute(base)
    alone, same = likelihood(base, prompt, answer)
    assert found.base_log_likelihood == pytest.approx(alone, rel=1e-5, abs=1e-5 * len(answer))
    assert found.base_keeps_answer == same
    assert {e.expert for e in found.effects} == {"a", "b", "c"}
    assert sum(e.share for e in found.effects) <= 1
    assert [e.change for e in found.effects] == sorted(e.change for e in found.effects)
    for i, expert in enumerate(experts):
        effect = next(e for e in found.effects if e.expert == expert.name)
        route(base, Pool([e for e in experts if e is not expert]), PHATGOOSE())
        value, same = likelihood(base, prompt, answer)
        assert effect.without == pytest.approx(value, rel=1e-5, abs=1e-5 * len(answer))
        assert effect.change == pytest.approx(value - whole, rel=1e-5, abs=2e-5 * len(answer))
        assert effect.keeps_answer == same
        route(base, Pool(experts), Single(i))
        assert effect.alone == pytest.approx(
            likelihood(base, prompt, answer)[0], rel=1e-5, abs=1e-5 * len(answer)
        )
    assert routed.answer == found.answer.strip()
    assert json.loads(json.dumps(found.to_json()))["effects"][0]["mattered"] in (True, False)


def test_most_looks_at_the_heaviest_and_counts_the_rest(pooled):
    base, experts = pooled("llama")
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    every, _ = explain(base, Pool(experts), ids, prompt=PROMPT, options=ExplainOptions(3))
    one, _ = explain(base, Pool(experts), ids, prompt=PROMPT, options=ExplainOptions(3, most=1))
    heaviest = max(every.effects, key=lambda e: e.share)
    assert [e.expert for e in one.effects] == [heaviest.expert]
    assert one.effects[0].without == pytest.approx(heaviest.without, abs=1e-5)
    assert one.left_out == 2
    assert "2 more experts acted" in words(one)[-1]


def test_few_forwards(pooled, monkeypatch):
    base, experts = pooled("llama")
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    rows = []
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda b, a, n: rows.append(n) or logits(b, a, n))
    explain(base, Pool(experts), ids, prompt=PROMPT, options=ExplainOptions(3, batch_rows=5))
    assert rows == [5, 3]


def test_refusals_leave_the_base_alone(pooled, monkeypatch):
    base, experts = pooled("llama")
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    with pytest.raises(RoutingError, match="can't be switched off"):
        explain(base, Pool(experts), ids, Random(), prompt=PROMPT)
    assert routing_of(base) is None
    monkeypatch.setattr("phatgoose.models.trace.record.greedy_answer", lambda base, ids, n: ids)
    with pytest.raises(EvaluationError, match="answered nothing"):
        explain(base, Pool(experts), ids, prompt=PROMPT)
    assert routing_of(base) is None


def test_in_words():
    def effect(name, change, keeps=True, alone=-3.0):
        return Effect(name, 0.3, -2.0 + change, change, keeps, alone)

    found = Explanation(
        "p", "a", ("a",), {}, -2.0, -5.0, False,
        (effect("x", -2.3, False), effect("y", -0.01), effect("z", 0.5, alone=-1.0)), 0,
    )  # fmt: skip
    text = words(found)
    assert text[0] == (
        "The base alone would answer differently; "
        "the experts make this answer 20.1 times likelier (-5.00 → -2.00 nats)."
    )
    assert text[1] == (
        "x mattered: without it the answer is 10.0 times less likely (-2.30 nats) and the greedy answer "
        "is another; on its own it falls short of the pool (-3.00 nats)."
    )
    assert text[2] == (
        "z mattered: without it the answer is 1.6 times likelier (+0.50 nats); "
        "on its own it does better than the pool (-1.00 nats)."
    )
    assert text[3] == "y acted, but leaving it out hardly changes the answer."
    none = Explanation("p", "a", ("a",), {}, -2.0, -2.0, True, (effect("x", 0.0),), 0)
    assert words(none)[1].startswith("No expert mattered by itself")


def test_routers_read_the_turn_of_a_chat_as_generate_gives_it(make_base, make_expert, tmp_path):
    """What is scored is what `generate --chat` would write: each token's log-likelihood under the text
    that was read."""
    base, folder = make_base("llama"), make_encoder(tmp_path / "encoder", max_tokens=60)
    pool = Pool(
        [signed(make_expert(base, n, seed=s), folder, seed=s, count=5) for s, n in enumerate("ab", 1)]
    )
    router = SoftCentroid(encoder=str(folder))
    ids = torch.tensor([base.tokenizer(f"a template around {PROMPT} and behind it")["input_ids"]])
    found, _ = explain(base, pool, ids, router, prompt=PROMPT, read=["walk"], options=ExplainOptions(5))
    route(base, pool, router)
    with prompted(base, ["walk"]), torch.no_grad():
        out = base.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            pad_token_id=pad_id(base.tokenizer), output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    unroute(base)
    answer = out.sequences[0, ids.shape[1] :]
    total = sum(float(step[0].log_softmax(-1)[t]) for step, t in zip(out.logits, answer, strict=True))
    assert len(found.tokens) == len(answer) > 1
    assert found.log_likelihood == pytest.approx(total, abs=1e-4)
    whole, _ = explain(base, pool, ids, router, prompt=PROMPT, options=ExplainOptions(5))
    assert whole.log_likelihood != pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gander_is_explained_by_pools_made_for_it_and_by_its_evidence(make_base, make_expert, family):
    base = make_base(family, layers=4)
    pool = Pool([make_expert(base, n, seed=s, rank=s) for s, n in enumerate("abcdefg", 1)])
    router = Gander(layers=2, half_life=5)
    ids = torch.tensor([base.tokenizer(PROMPT)["input_ids"]])
    oracle = Oracle(base, pool, layers=2, half_life=5)
    found, _ = explain(base, pool, ids, router, prompt=PROMPT, options=ExplainOptions(4))
    seen, sums = found.evidence, oracle.evidence(ids[0].tolist())[-1]
    assert list(seen.experts[:5]) == [pool.names[e] for e in sums.argsort(descending=True)[:5]]
    assert {e.expert for e in found.effects} <= set(seen.experts)
    for name, total, modules, tokens in zip(
        seen.experts, seen.sums, seen.by_module, seen.by_token, strict=True
    ):
        assert total == pytest.approx(float(sums[pool.names.index(name)]), abs=1e-3)
        assert sum(modules) == pytest.approx(total, abs=1e-6)
        assert sum(tokens) == pytest.approx(total, abs=1e-6)
    assert set(seen.modules) == set(oracle.paths)
    assert len(seen.tokens) == ids.shape[1]
    # The last token counts whole, and a decoder's tokens before it less and less.
    last = oracle.evidence(ids[0, :-1].tolist())[-1] * (2 ** (-1 / 5) if family == "llama" else 1)
    first = pool.names.index(seen.experts[0])
    if family == "llama":
        assert seen.by_token[0][-1] == pytest.approx(float((sums - last)[first]), abs=1e-3)

    route(base, pool, router)
    out = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
        pad_token_id=pad_id(base.tokenizer),
    )  # fmt: skip
    answer = out[0, 1 if family == "t5" else ids.shape[1] :].tolist()
    for effect in found.effects:
        route(base, Pool([e for e in pool.experts if e.name != effect.expert]), router)
        value, _ = likelihood(base, ids[0].tolist(), answer)
        assert effect.without == pytest.approx(value, rel=1e-4, abs=1e-4)
    unroute(base)
    assert json.loads(json.dumps(found.to_json()))["evidence"]["experts"] == list(seen.experts)


def test_what_a_template_puts_before_the_text_speaks_for_nobody(make_base, make_expert):
    base = make_base("llama", layers=4)
    base = dataclasses.replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    base.tokenizer.chat_template = (
        "{% for m in messages %}</s>{{ m.role }}: {{ m.content }}{% endfor %}</s>you:"
    )
    pool = Pool([make_expert(base, n, seed=s, rank=s) for s, n in enumerate("abc", 1)])
    said = [{"role": "user", "content": PROMPT}]
    ids = torch.tensor([base.tokenizer.apply_chat_template(said)["input_ids"]])
    found, routed = explain(base, pool, ids, Gander(half_life=5), prompt=PROMPT, options=ExplainOptions(2))
    cached, _ = explain(
        base, pool, ids, Gander(half_life=5), prompt=PROMPT, read=[PROMPT], options=ExplainOptions(2)
    )
    for one, other in zip(found.effects, cached.effects, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other), abs=1e-4)
    head = len(base.tokenizer("</s>user: ", add_special_tokens=False)["input_ids"])
    for row in found.evidence.by_token:
        assert row[:head] == (0.0,) * head
        assert 0.0 not in row[head:]
    acting = [cells for path, cells in zip(routed.modules, routed.choices, strict=True) if ".1." in path]
    assert {pairs[0][0] for cells in acting for pairs in cells[:head]} == {-1}
    assert -1 not in {pairs[0][0] for cells in acting for pairs in cells[head:]}
