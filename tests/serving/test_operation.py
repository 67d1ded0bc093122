"""Limits, metrics, clients that leave, and engines that die."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest
from serving_fixtures import PROMPTS, make_pool, running, settings

from phatgoose.errors import PhatgooseError, RoutingError
from phatgoose.models.batched.version import PoolVersion
from phatgoose.routers import PHATGOOSE, Uniform
from phatgoose.serving.engine.batched import BatchEngine
from phatgoose.serving.http import completions as answers
from phatgoose.serving.http.app import make_app
from phatgoose.serving.pool.versions import ExpertState, ServedExperts
from phatgoose.serving.requests import Prompts
from phatgoose.serving.service import Service
from phatgoose.serving.settings import ServeSettings

LONG = {"model": "base", "prompt": "the", "max_tokens": 400, "temperature": 0, "logit_bias": {"1": -100}}


def value(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))


def begun(server, body, cut=0) -> socket.socket:
    """A connection on which a request was sent, but for its last `cut` bytes."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + data[: len(data) - cut])
    return connection


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_more_than_can_wait_are_turned_away(make_base, engine):
    limits = settings(engine=engine, max_running=2, max_waiting=2)
    with running(Service(make_base("llama"), limits)) as server, server.client() as client:
        streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]
        with pytest.raises(openai.RateLimitError, match="busy") as refused:
            client.completions.create(**LONG)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        with server.http() as http:
            metrics = http.get("/metrics").text
        assert value(metrics, "phatgoose_running") + value(metrics, "phatgoose_waiting") == 4
        assert value(metrics, "phatgoose_running") in (1, 2)  # a batch begins with who is there
        for stream in streams:
            stream.close()
        server.until(lambda: not server.service.engine.jobs)
        assert client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2


@pytest.mark.parametrize("engine", ["continuous", "batches"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(make_base, engine, stream):
    with running(Service(make_base("llama"), settings(engine=engine, max_running=1))) as server:
        with begun(server, {**LONG, "stream": stream}) as gone:
            server.until(lambda: server.service.engine.running == 1)
            if stream:
                assert gone.recv(1000)
        server.until(lambda: not server.service.engine.jobs)
        with server.client() as client:
            assert client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
        with server.http() as http:
            metrics = http.get("/metrics").text
            assert value(metrics, "phatgoose_left_total") == 1
            assert value(metrics, 'phatgoose_tokens_total{kind="base",phase="answer"}') >= stream


@pytest.mark.parametrize("engine", ["continuous", "batches"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_leaves_the_queue(make_base, engine, stream):
    with (
        running(Service(make_base("llama"), settings(engine=engine, max_running=1))) as server,
        server.client() as client,
    ):
        first = client.completions.create(**LONG, stream=True)
        next(first)
        with begun(server, {**LONG, "stream": stream}):
            server.until(lambda: len(server.service.engine.jobs) == 2)
            assert server.service.engine.waiting == 1
        server.until(lambda: server.service.engine.waiting == 0)
        assert server.service.engine.running == 1
        first.close()
        server.until(lambda: not server.service.engine.jobs)


@pytest.mark.slow(3)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompts_are_read_ends_that(make_base, monkeypatch, stream):
    read = []

    def slowly(self, text):
        read.append(text)
        time.sleep(0.05)
        return [5]

    monkeypatch.setattr(Prompts, "_encode", slowly)
    with running(Service(make_base("llama"), settings())) as server, server.http() as http:
        with begun(server, {**LONG, "prompt": ["the"] * 60, "stream": stream}):
            server.until(lambda: len(read) > 1)
        server.until(lambda: value(http.get("/metrics").text, "phatgoose_left_total") == 1)
        known = len(read)
        time.sleep(0.3)
        assert len(read) <= known + 1 < 60
        assert not server.service.engine.jobs
        # More than are answered are not read at all.
        read.clear()
        refused = http.post("/v1/completions", json={**LONG, "prompt": ["the"] * 65})
        assert refused.status_code == 400
        assert "65 answers are asked for" in refused.json()["error"]["message"]
        assert not read


@pytest.mark.slow(3)
def test_bodies_of_more_requests_than_there_are_places_for_are_not_read(make_base):
    limits = settings(max_running=1, max_waiting=2, body_seconds=3)
    with running(Service(make_base("llama"), limits)) as server, server.http() as http:
        slow = [begun(server, LONG, cut=1) for _ in range(3)]
        server.until(lambda: http.post("/v1/completions", json=LONG).status_code == 429)
        assert http.get("/v1/models").status_code == 200
        for one in slow:
            assert b" 408 " in one.recv(1000)
            one.close()
        assert http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_its_stream_lets_go_of_the_pool(make_base, make_expert, monkeypatch):
    monkeypatch.setattr(answers, "UNREAD_SECONDS", 0.1)
    base = make_base("llama")
    service = Service(base, settings(timeout_seconds=1), pool=make_pool(base, make_expert))
    body = json.dumps({**LONG, "model": "phatgoose", "max_tokens": 5, "stream": True}).encode()
    came = iter([{"type": "http.request", "body": body}])
    sent = []

    async def receive():
        return next(came, None) or await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # nobody reads

    async def all_of_it():
        await service.start()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        try:
            await asyncio.wait_for(make_app(service)(scope, receive, send), 30)
            assert service.experts.pins == 0
            assert not service.engine.jobs
        finally:
            await service.stop()

    asyncio.run(all_of_it())
    assert sent == ["http.response.start", "http.response.body"]
    assert value(service.metrics.text().decode(), "phatgoose_left_total") == 1


def test_what_takes_too_long_is_broken_off(make_base):
    with (
        running(Service(make_base("llama"), settings(timeout_seconds=1))) as server,
        server.client() as client,
    ):
        server.service.settings.__dict__["timeout_seconds"] = 0.05
        with pytest.raises(openai.InternalServerError, match="in time") as refused:
            client.completions.create(**LONG)
        assert refused.value.status_code == 504
        with pytest.raises(openai.APIError, match="in time"):
            list(client.completions.create(**LONG, stream=True, n=2))
        server.until(lambda: not server.service.engine.jobs)


def test_metrics_count_what_was_done(make_base, make_expert):
    base = make_base("llama")
    pool = make_pool(base, make_expert)
    with (
        running(Service(base, settings(), pool=pool)) as server,
        server.client() as client,
        server.http() as http,
    ):
        read = wrote = 0
        for model in ("phatgoose", "b", "base"):
            for prompt in PROMPTS[:2]:
                found = client.completions.create(model=model, prompt=prompt, max_tokens=5)
                read, wrote = read + found.usage.prompt_tokens, wrote + found.usage.completion_tokens
        http.get("/nothing")
        metrics = http.get("/metrics").text
        assert value(metrics, 'phatgoose_tokens_total{kind="pool",phase="prompt"}') == read / 3
        assert value(metrics, 'phatgoose_tokens_total{kind="') == read + wrote
        assert value(metrics, 'phatgoose_requests_total{path="/v1/completions",status="200"}') == 6
        assert value(metrics, 'phatgoose_requests_total{path="other",status="404"}') == 1
        assert value(metrics, "phatgoose_first_token_seconds_count") == 6
        assert value(metrics, "phatgoose_answer_seconds_count") == 6
        assert value(metrics, "phatgoose_running") == value(metrics, "phatgoose_waiting") == 0
        assert value(metrics, "phatgoose_up") == 1
        assert value(metrics, "phatgoose_passes") > 10
        weights, choices = (
            value(metrics, "phatgoose_expert_weight_total"),
            value(metrics, "phatgoose_choices_total"),
        )
        assert weights == pytest.approx(
            choices, rel=1e-3
        )  # every expert has every module, so the weights add up to 1
        assert value(metrics, 'phatgoose_expert_weight_total{expert="b"}') > choices / 2


def test_health_and_readiness(make_base):
    service = Service(make_base("llama"), settings())
    assert service.unready_reason == "the server is starting"
    with running(service) as server, server.http() as http:
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 200
        service.draining = True
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        assert http.post("/v1/completions", json=LONG).status_code == 503
        service.draining = False


@pytest.mark.parametrize("engine", ["continuous", "batches"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_is_seen(make_base, engine):
    service = Service(make_base("llama"), settings(engine=engine))
    with running(service) as server, server.client() as client, server.http() as http:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)

        def die(*_):
            raise SystemExit("dead") if engine == "batches" else RuntimeError("dead")

        service.engine.count_pass = die
        with pytest.raises(openai.APIError):
            list(stream)
        server.until(lambda: service.engine.failure is not None)
        found = http.get("/health")
        assert found.status_code == 503
        assert "died" in found.json()["status"]
        assert http.get("/ready").status_code == 503
        with pytest.raises(openai.InternalServerError, match="died"):
            client.completions.create(**LONG)
        assert value(http.get("/metrics").text, "phatgoose_up") == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_those_who_wait_when_an_engine_dies_are_told(make_base):
    """Also where its thread has begun to die and hasn't said so."""
    service = Service(make_base("llama"), settings(max_running=2))
    with running(service) as server, ThreadPoolExecutor(6) as threads:
        status = service.engine.manager.background_thread_status
        record = status.record_fatal_error
        status.record_fatal_error = lambda error: (time.sleep(0.3), record(error))

        def ask(_):
            with server.http() as http:
                return http.post("/v1/completions", json=LONG).status_code

        asked = [threads.submit(ask, i) for i in range(6)]
        server.until(lambda: len(service.engine.jobs) == 6 and service.engine.running == 2)

        def die(*_):
            raise RuntimeError("dead")

        service.engine.count_pass = die
        assert [one.result(timeout=20) for one in asked] == [500] * 6
        assert not service.engine.jobs
        assert service.engine.reserved_pages == 0
        assert not service.engine.manager.output_router.result_handlers


def test_others_go_on_while_a_long_prompt_is_read(make_base):
    """A pass has room for 24 tokens; a prompt of 400 takes many, and a stream gets a token in each."""
    with running(Service(make_base("llama"), settings())) as server, server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        came = []
        done = threading.Event()

        def follow():
            for _ in stream:
                came.append(time.monotonic())
                if done.is_set():
                    return

        follower = threading.Thread(target=follow)
        follower.start()
        began = time.monotonic()
        client.completions.create(model="base", prompt=[5] * 400, max_tokens=1)
        ended = time.monotonic()
        done.set()
        follower.join()
        stream.close()
        assert sum(began < at < ended for at in came) > 5


def test_settings_are_checked():
    for bad in ({"max_running": 0}, {"timeout_seconds": 0.0}, {"cache_tokens": 0}):
        with pytest.raises(PhatgooseError, match="expected at least 1"):
            ServeSettings(**bad)


def test_nothing_is_kept_of_finished_requests(make_base, make_expert):
    base = make_base("llama")
    pool = make_pool(base, make_expert)

    async def many(server):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(
                *(
                    client.completions.create(model=m, prompt="the", max_tokens=3)
                    for m in ("phatgoose", "a", "base") * 20
                )
            )

    with running(Service(base, settings(), pool=pool)) as server:
        asyncio.run(many(server))
        engine = server.service.engine
        server.until(lambda: not engine.jobs)
        assert engine.reserved_pages == 0
        assert engine.waiting == 0
        assert not engine.manager.output_router.result_handlers
        assert engine.manager.output_router.output_queue.empty()
        assert server.service.experts.pins == 0
        assert server.service.experts.ready_routers == 1


def test_a_router_that_was_just_bound_is_kept(make_base, make_expert, monkeypatch):
    """Others are used while it is bound. A router that fails to be bound is tried again."""
    base = make_base("llama")
    version, go, bind = (
        PoolVersion(base, make_pool(base, make_expert)),
        threading.Event(),
        ServedExperts._bind,
    )
    bound, fail = [], []

    def slowly(self, of, router, off):
        bound.append(router)
        if fail:
            raise RoutingError(fail.pop())
        assert router != PHATGOOSE(top_k=3) or go.wait(20)
        return bind(self, of, router, off)

    monkeypatch.setattr(ServedExperts, "_bind", slowly)

    async def ask():
        experts = ServedExperts(BatchEngine(base, settings(max_routers=1)))
        route = partial(experts.route, ExpertState(version))
        for one in ("phatgoose", "phatgoose:top_k=1"):
            await route(one)
        slow = asyncio.ensure_future(route("phatgoose:top_k=3"))
        while PHATGOOSE(top_k=3) not in bound:
            await asyncio.sleep(0.01)
        await route("phatgoose:top_k=1")
        assert (experts.ready_routers, experts.binding, experts.pins) == (2, 1, 1)
        go.set()
        assert await slow is await route("phatgoose:top_k=3")
        fail.append("no memory")
        with pytest.raises(RoutingError, match="no memory"):
            await route("uniform")
        assert (experts.binding, experts.pins) == (0, 0)
        await route("uniform")

    asyncio.run(ask())
    assert bound == [PHATGOOSE(), PHATGOOSE(top_k=1), PHATGOOSE(top_k=3), Uniform(), Uniform()]
