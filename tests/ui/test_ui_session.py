"""What the live page is told is what the model does: the same answers, the same choices, the same switches."""

from __future__ import annotations

import base64
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from ui_tools import PROMPT

from phatgoose.analysis.prompts import encoded as page_data
from phatgoose.analysis.prompts import routed_prompt
from phatgoose.errors import BaseModelError, PhatgooseError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.text.encoding import encode_prompt
from phatgoose.models.text.generate import greedy_answer
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Arrow, Gander
from phatgoose.ui.session import Limits, Question, Session, offered_routers
from phatgoose.workflows.evidence import gathered
from report_data import unpacked

pytest_plugins = ["ui_fixtures"]


class QueuedAnswer:
    """Takes what a client would be told."""

    def __init__(self, stop_after=None):
        self.events, self.stopped, self.stop_after = [], threading.Event(), stop_after

    def send(self, event):
        self.events.append(event)
        if self.stop_after is not None and len(self.of("tokens")) == self.stop_after:
            self.stopped.set()

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


def answered(session, job=None, **question):
    job = QueuedAnswer() if job is None else job
    asked = Question(PROMPT, **{"max_new_tokens": 9, **question})
    session.check(asked)
    session.answer(asked, job)
    return job


def choices_of(job, modules):
    """All events' choices and weights: two arrays [modules, tokens, k], and the tokens' texts."""
    texts, parts = [], []
    for event in job.of("tokens"):
        shape = (modules, len(event["texts"]), event["k"])
        both = [
            np.frombuffer(base64.b64decode(event[key]), "<i2").reshape(shape)
            for key in ("choices", "weights")
        ]
        parts.append(both)
        texts += event["texts"]
    return *(np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1)), texts


def same_texts(told, page):
    """The page knows which token is the last, and shows its half character."""
    assert told[:-1] == page[:-1]
    assert told[-1] == page[-1].rstrip("\ufffd")


def expected(base, pool, router, new_tokens=9):
    """The same answer by the pieces that the report is made of."""
    ids = encode_prompt(base, PROMPT)
    route(base, pool, router)
    with trace(base, margins=False) as recorded:
        out = greedy_answer(base, ids, new_tokens)
    unroute(base)
    answer = out[0, 1 if base.is_encoder_decoder else ids.shape[1] :]
    routed = routed_prompt(recorded, base, task="", prompt="", expected="", answer="", correct=None)
    return answer, page_data(routed, "test")


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    ("router", "own"), [("phatgoose", PHATGOOSE()), ("arrow", Arrow(1)), ("gander", Gander())]
)
def test_the_events_are_the_answer_and_its_routing(make_session, pool_of, family, router, own):
    session = make_session(family)
    job = answered(session, router=router, top_k=1 if router == "arrow" else None)
    answer, page = expected(session.base, session.pool, own)
    end, turn = job.events[-1], job.events[0]
    assert end["event"] == "end"
    assert end["tokens"] == len(answer) == 9
    assert end["why"] == "length"
    assert end["answer"] == session.base.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert (turn["event"], turn["generated_from"], turn["room"]) == ("turn", page["generated_from"], 9)
    modules = list(session.locations)
    chosen, weights, texts = choices_of(job, len(modules))
    same_texts(texts, page["tokens"])
    assert len(job.of("tokens")) == 9
    assert sorted(modules) == sorted(page["modules"])
    for i, path in enumerate(page["modules"]):
        theirs = np.array(unpacked(page["choices"][i])).reshape(len(texts), page["k"])
        row = modules.index(path)
        assert (chosen[row] == theirs).all() or page["k"] > 1
        by_weight = np.array(unpacked(page["weights"][i])).reshape(theirs.shape)
        for t in range(len(texts)):  # in any order, which the page doesn't go by
            mine = dict(zip(chosen[row, t].tolist(), weights[row, t].tolist(), strict=True))
            assert mine == dict(zip(theirs[t].tolist(), by_weight[t].tolist(), strict=True))
    written = "".join(texts[turn["generated_from"] :]) + job.of("tokens")[-1]["next"]
    whole = session.base.tokenizer.decode(answer, skip_special_tokens=False)
    whole, written = whole.rstrip("\ufffd"), written.rstrip("\ufffd")
    assert whole in (written, written.removeprefix("<pad>"))  # a T5 decoder's start token is read as well


def test_experts_off_is_a_pool_without_them_and_back(make_session):
    session = make_session()
    whole = answered(session, router="phatgoose")
    without = answered(session, router="phatgoose", off=[0])
    pool = Pool([e for e in session.pool.experts if e.name != "a"])
    again = answered(session, router="phatgoose")
    alone = answered(session, router="base")
    assert routing_of(session.base) is None
    nobody = answered(session, router="phatgoose", off=[0, 1, 2])
    answer, page = expected(session.base, pool, PHATGOOSE())
    assert (
        without.events[-1]["answer"]
        == session.base.tokenizer.decode(answer, skip_special_tokens=True).strip()
    )
    chosen, _, texts = choices_of(without, len(session.locations))
    same_texts(texts, page["tokens"])
    assert set(np.unique(chosen)) <= {-2, -1, 1, 2}
    assert not set(np.unique(choices_of(nobody, len(session.locations))[0])) - {-2, -1}
    assert [e for e in again.events if e["event"] == "tokens"] == whole.of("tokens")
    assert nobody.events[-1]["answer"] == alone.events[-1]["answer"]
    assert {e["k"] for e in alone.of("tokens")} == {0}
    assert whole.events[-1]["answer"] != without.events[-1]["answer"] != alone.events[-1]["answer"]


def test_experts_off_under_gander_is_a_pool_without_them(make_session):
    session = make_session()
    found = answered(session, router="gander", off=[0])
    pool = Pool([e for e in session.pool.experts if e.name != "a"])
    answer, page = expected(session.base, pool, Gander())
    written = session.base.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert found.events[-1]["answer"] == written
    chosen, weights, texts = choices_of(found, len(session.locations))
    same_texts(texts, page["tokens"])
    for row, place in enumerate(session.locations.values()):
        if place.layer == 0:  # it is read, and the base has all of the weight
            assert set(np.unique(chosen[row])) == {-1}
            assert set(np.unique(weights[row])) == {1000}
    assert set(np.unique(chosen)) <= {-1, 1, 2}


@pytest.mark.parametrize("off", [[], [0], [0, 2]])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_evidence_under_gander_is_that_of_a_pool_of_those_that_are_on(make_session, family, off):
    session = make_session(family)
    (told,) = answered(session, router="gander", off=off).of("evidence")
    names = session.pool.names
    pool = Pool([expert for i, expert in enumerate(session.pool.experts) if i not in off])
    route(session.base, pool, Gander())
    found = gathered(session.base, Gander(), encode_prompt(session.base, PROMPT))
    assert [names[i] for i in told["experts"]] == list(found.experts)
    assert told["sums"] == pytest.approx(found.sums, abs=1e-3)
    if len(pool) == 1:
        assert told["apart"] == []
    else:
        gaps = [a - b for a, b in zip(*found.by_token[:2], strict=True)]
        widest = sorted(zip(found.tokens, gaps, strict=True), key=lambda token: -abs(token[1]))
        assert [text for text, _ in told["apart"]] == [text for text, _ in widest[:6]]
        assert [gap for _, gap in told["apart"]] == pytest.approx([gap for _, gap in widest[:6]], abs=1e-3)


def test_only_gander_tells_evidence(make_session):
    for router in ("phatgoose", "base"):
        assert answered(make_session(), router=router).of("evidence") == []


def test_top_k_and_routers_can_be_changed_from_answer_to_answer(make_session):
    session = make_session()
    seen = {}
    for router, top_k in (
        ("phatgoose", 1),
        ("phatgoose", 3),
        ("uniform", None),
        ("spectr", 2),
        ("random", 1),
        ("phatgoose", 1),
    ):
        job = answered(session, router=router, top_k=top_k)
        events = job.of("tokens")
        assert events
        if (router, top_k) in seen:
            assert events == seen[router, top_k]
        seen[router, top_k] = events
    assert {e["k"] for e in seen["phatgoose", 1]} == {1}
    assert seen["phatgoose", 3] != seen["spectr", 2]


def test_a_stopped_answer_ends_at_its_next_token(make_session):
    job = answered(make_session(), QueuedAnswer(stop_after=2))
    assert len(job.of("tokens")) == 2
    assert (job.events[-1]["why"], job.events[-1]["tokens"]) == ("stopped", 2)


def test_a_refused_router_leaves_what_was_there(make_session):
    session = make_session()
    first = answered(session)
    with pytest.raises(PhatgooseError, match="can't be switched off"):
        answered(session, router="random", off=[1])
    assert answered(session).of("tokens") == first.of("tokens")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"prompt": " \n"}, "is empty"),
        ({"prompt": "a\ud800"}, "half a character"),
        ({"router": "fhatgoose"}, "phatgoose"),
        ({"router": "single"}, "router"),
        ({"top_k": 0}, "1 to 3"),
        ({"top_k": 4}, "1 to 3"),
        ({"router": "base", "top_k": 1}, "only for routers that have one"),
        ({"off": [3]}, "0 to 2"),
        ({"off": [-1]}, "0 to 2"),
        ({"off": [1, 1]}, "each once"),
        ({"max_new_tokens": 0}, "1 to 40"),
        ({"max_new_tokens": 41}, "1 to 40"),
    ],
)
def test_what_is_refused_at_once(make_session, question, words):
    session = make_session(limits=Limits(new_tokens=40))
    with pytest.raises(PhatgooseError, match=words):
        session.check(Question(**{"prompt": PROMPT, **question}))


def test_what_is_refused_in_its_turn(make_session):
    session = make_session(limits=Limits(prompt_tokens=5))
    with pytest.raises(PhatgooseError, match="at most 5 are taken"):
        answered(session)
    session.limits = Limits(choices=500)
    with pytest.raises(PhatgooseError, match="at most 500 are taken"):
        answered(session)
    with pytest.raises(PhatgooseError, match="no chat template"):
        answered(session, chat=True)
    session.limits = Limits(prompt_tokens=5000)
    with pytest.raises(PhatgooseError, match="context 512: nothing can be added"):
        session.answer(Question("word " * 600), QueuedAnswer())
    long = Question("yes " * 200, max_new_tokens=500)
    taken = encode_prompt(session.base, long.prompt).shape[1]
    job = QueuedAnswer(stop_after=1)
    session.answer(long, job)
    assert job.events[0]["room"] == 512 - taken < 500


def test_a_pool_of_another_base_is_refused_before_anything_is_served(make_base, pool_of):
    pool = pool_of(make_base("llama", seed=1))
    with pytest.raises(BaseModelError):
        Session(make_base("llama"), pool)


def test_all_routers_but_single_are_offered_and_gander_first():
    offered = offered_routers()
    assert offered[0] == {"name": "gander", "top_k": 1}
    assert offered[-1] == {"name": "base", "top_k": None}
    names = [r["name"] for r in offered]
    assert "uniform" in names
    assert "single" not in names
    assert len(set(names)) == len(names)


def test_a_pool_without_gates_is_offered_routers_that_can_use_it(make_base, make_expert):
    base = make_base("llama")
    bare = [make_expert(base, name, seed=i, gates=False) for i, name in enumerate("ab")]
    for experts in (bare, [make_expert(base, "c", seed=2), *bare]):
        session = Session(base, Pool(experts))
        assert next(iter(session.routers)) == "gander"
        assert not {"phatgoose", "shuffled-gates"} & session.routers.keys()
        assert answered(session).events[-1]["event"] == "end"  # no router is named


def test_no_more_experts_are_offered_than_there_are(make_base, make_expert):
    base = make_base("llama")
    session = Session(base, Pool([make_expert(base, "only")]))
    assert {r["top_k"] for r in session.routers.values()} == {1, None}
    assert answered(session, top_k=session.routers["phatgoose"]["top_k"]).events[-1]["event"] == "end"


def test_modules_with_fewer_experts_are_told_as_wide_as_the_others(make_base, make_expert):
    base, encoder = make_base("t5"), r"encoder.*SelfAttention\.[qv]"
    some = [make_expert(base, name, seed=i, targets=encoder) for i, name in enumerate("yz")]
    session = Session(base, Pool([make_expert(base, "x", seed=3), *some]))
    job = answered(session, router="uniform")
    assert [e["k"] for e in job.of("tokens")] == [3] * 9
    chosen, _, _ = choices_of(job, len(session.locations))
    for path, row in zip(session.locations, chosen, strict=True):
        assert (row[:, 1:] >= 0).any() == ("encoder" in path and path.endswith((".q", ".v")))


def test_characters_of_several_tokens_are_told_when_they_are_whole(make_session):
    session = make_session()
    job = QueuedAnswer()
    session.answer(replace(Question("né → 日本"), max_new_tokens=3), job)
    _, _, texts = choices_of(job, len(session.locations))
    ids = encode_prompt(session.base, "né → 日本")
    assert "".join(texts[: ids.shape[1]]) == session.base.tokenizer.decode(ids[0])
    assert "" in texts
    assert torch.is_grad_enabled()
