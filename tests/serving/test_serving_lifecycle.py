"""When a server says that it is ready, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import httpx2
import openai
import pytest
from serving_fixtures import make_pool, settings
from test_guard import server_process
from transformers.generation.continuous_batching import continuous_api

from phatgoose.serving.engine.batched import BatchEngine
from phatgoose.serving.errors import ServingError
from phatgoose.serving.service import Service

LONG = {"model": "base", "prompt": "the", "max_tokens": 480, "logit_bias": {"1": -100}}


@pytest.mark.slow(3)
@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_a_server_is_ready_when_it_has_written_an_answer(make_base, make_expert, engine):
    base = make_base("llama")
    service = Service(base, settings(engine=engine), pool=make_pool(base, make_expert))
    submitted = []
    submit = service.engine.submit
    service.engine.submit = lambda job: (submitted.append((job, service.started)), submit(job))

    async def all_of_it():
        await service.start()
        try:
            (job, started), *others = submitted
            assert not others
            assert not started
            assert len(job.output) == 1
            assert job.route is not None
            assert not service.engine.jobs
            if engine == "continuous":
                assert service.engine.manager.batch_processor is not None  # which has the cache
        finally:
            await service.stop()

    asyncio.run(all_of_it())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_a_server_that_cannot_answer_does_not_start(make_base, monkeypatch, engine):
    def fail(*_, **__):
        raise RuntimeError("can't allocate memory")

    service = Service(make_base("llama"), settings(engine=engine))
    monkeypatch.setattr(continuous_api, "PagedAttentionCache", fail)
    monkeypatch.setattr(BatchEngine, "_run_batch", fail)
    with pytest.raises(ServingError, match="can't answer anything: RuntimeError: can't allocate memory"):
        asyncio.run(service.start())
    assert service.start_error is not None
    assert not service.started


def test_a_cache_that_memory_cannot_hold_is_refused_by_name(make_base):
    with pytest.raises(
        ServingError, match=r"a cache of 1000000000000 tokens needs .* GB .* lower cache_tokens"
    ):
        Service(make_base("llama"), settings(cache_tokens=10**12))


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from conftest import make_model, make_tokenizer
from serving_fixtures import settings
from phatgoose.models.base.base import Base
from phatgoose.serving.engine import continuous
from phatgoose.serving.http.server import serve
from phatgoose.serving.service import Service
made = continuous.ContinuousEngine._make_manager
continuous.ContinuousEngine._make_manager = lambda self: broken(made(self))
def broken(manager):
    def fail():
        raise MemoryError("no room")
    manager._create_batch_processor = fail
    return manager
serve(Service(Base(make_model("llama"), make_tokenizer(), "tiny"), settings()), port=0)
"""


@pytest.mark.slow(9)
def test_a_process_that_cannot_answer_ends(tmp_path):
    here = os.path.dirname(__file__)
    script = SCRIPT.format(paths=[here, os.path.dirname(here)])
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "can't answer anything: MemoryError: no room" in ended.stderr
    assert '"ready"' not in ended.stderr


@pytest.mark.slow(6)
def test_while_it_ends_a_server_still_says_that_it_is_not_ready():
    with server_process(drain=60) as (process, client):
        address = str(client.base_url).removesuffix("/v1/")
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        process.terminate()
        seen, end = set(), time.monotonic() + 20
        while 503 not in seen and time.monotonic() < end:
            seen.add(httpx2.get(f"{address}/ready").status_code)  # each on a connection of its own
        assert 503 in seen
        with httpx2.Client(base_url=address) as http:
            refused = http.post("/v1/completions", json=LONG)
            assert (refused.status_code, http.get("/health").status_code) == (503, 200)
            assert "server is ending" in refused.json()["error"]["message"]
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=30) in (0, -15)


@pytest.mark.slow(21)
@pytest.mark.parametrize("again", [False, True])
def test_what_is_not_finished_in_time_is_told_that_the_server_ends(again):
    with server_process(drain=60 if again else 1) as (process, client):
        streams = [client.completions.create(**LONG, n=8, stream=True) for _ in range(6)]
        for stream in streams:
            next(stream)
        began = time.monotonic()
        process.terminate()
        if again:  # which ends it at once
            time.sleep(0.5)
            process.terminate()
        told = []
        for stream in streams:
            try:
                told.append([choice.finish_reason for part in stream for choice in part.choices][-1])
            except openai.APIError as error:
                told.append(str(error))
        assert set(told) <= {"length", "the server ends."}
        assert told[-1] == "the server ends."
        assert process.wait(timeout=30) in (0, -15)
        assert time.monotonic() - began < 20
        lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
        requests = [line for line in lines if line["event"] == "request"]
        assert len(requests) == len(streams)
        assert not any(line.get("left") for line in requests)
