"""Which sentence encoder a server loads when a client asks for a router that reads text."""

from __future__ import annotations

import asyncio
import threading

import pytest
from serving_fixtures import PROMPTS, greedy, running, settings, text

from encoder_fixtures import make_encoder, signed
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base import sentence_encoder as encoders
from phatgoose.routers import Retrieval
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.service import Service

ASK = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
HEADERS = {"authorization": "Bearer the-admin-key"}


@pytest.fixture
def base(make_base):
    return make_base("llama")


@pytest.fixture
def folder(tmp_path):
    return make_encoder(tmp_path / "my encoders" / "tiny", max_tokens=60)


@pytest.fixture
def pool(base, make_expert, folder):
    return Pool([signed(make_expert(base, f"e{i}", seed=i, scale=0.4), folder, seed=i) for i in range(3)])


def named(pool, name):
    """The pool with another name for the encoder, as an author may write it."""
    for expert in pool.experts:
        expert.signature.encoder = name
    return pool


@pytest.mark.slow(13)
@pytest.mark.parametrize("router", ["retrieval", "centroid", "soft-centroid"])
@pytest.mark.parametrize("hub", [True, False])
def test_an_encoder_that_an_author_names_is_neither_fetched_nor_opened(
    base, pool, folder, monkeypatch, router, hub
):
    pool = named(pool, "somebody/encoder" if hub else str(folder))
    monkeypatch.setattr(encoders, "load_encoder", lambda *_: pytest.fail("it was loaded"))
    with running(Service(base, settings(), pool=pool)) as server, server.http() as http:
        refused = http.post("/v1/completions", json=ASK | {"model": router})
    assert refused.status_code == 400
    said = refused.json()["error"]
    assert "a server loads none that experts name" in said["message"]
    assert said["param"] == "model"
    assert not any(word in said["message"] for word in (str(folder), "my encoders", "somebody"))


def test_a_default_router_names_no_encoder_of_an_author_either(base, pool):
    service = Service(base, settings(), pool=named(pool, "somebody/encoder"), router="retrieval")
    with pytest.raises(RoutingError, match="choose one with --encoder"):
        asyncio.run(service.start())


@pytest.mark.slow(8)
@pytest.mark.parametrize("by_router", [True, False])
def test_the_encoder_that_the_operator_names_is_used(base, pool, folder, by_router):
    pool = named(pool, "somebody/encoder")
    route(base, pool, Retrieval(str(folder)))
    wanted = text(base, greedy(base, PROMPTS[0], 8))
    unroute(base)
    chosen = {"router": f"retrieval:encoder={folder}"} if by_router else {}
    limits = settings() if by_router else settings(encoder=str(folder))
    with running(Service(base, limits, pool=pool, **chosen)) as server, server.client() as client:
        assert client.completions.create(model="retrieval", **ASK).choices[0].text == wanted
        if by_router:
            assert client.completions.create(model="phatgoose", **ASK).choices[0].text == wanted


@pytest.mark.slow(3)
def test_another_encoder_than_the_experts_is_refused_before_it_is_loaded(base, pool, tmp_path, monkeypatch):
    other = make_encoder(tmp_path / "my encoders" / "other", seed=5, max_tokens=60)
    monkeypatch.setattr(encoders.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with (
        running(Service(base, settings(encoder=str(other)), pool=pool)) as server,
        server.http() as http,
    ):
        said = http.post("/v1/completions", json=ASK | {"model": "retrieval"}).json()["error"]["message"]
    assert "is another encoder" in said
    assert "my encoders" not in said


@pytest.mark.slow(2)
def test_experts_are_switched_while_an_encoder_is_waited_for(base, pool, folder, monkeypatch):
    asked, go_on = threading.Event(), threading.Event()
    load = encoders.load_encoder

    def slowly(*given):
        asked.set()
        assert go_on.wait(60)
        return load(*given)

    monkeypatch.setattr(encoders, "load_encoder", slowly)
    service = Service(base, settings(encoder=str(folder)), pool=pool)
    found = []
    with running(service, Keys.of(admin=["the-admin-key"])) as server, server.http() as http:

        def ask():
            with server.http() as own:
                found.append(own.post("/v1/completions", json=ASK | {"model": "retrieval"}).status_code)

        waiting = threading.Thread(target=ask)
        waiting.start()
        try:
            assert asked.wait(30)
            assert http.post("/admin/experts/e1/off", headers=HEADERS, timeout=20).status_code == 200
            other = http.post("/v1/completions", json=ASK | {"model": "phatgoose:top_k=1"}, timeout=20)
            assert other.status_code == 200
            assert not found
        finally:
            go_on.set()
            waiting.join()
    assert found == [200]
    assert not service.experts.binding
