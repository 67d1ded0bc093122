"""Experts come, go, and are switched off, while answers are written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import httpx2
import openai
import pytest
from filelock import FileLock
from serving_fixtures import (
    PROMPTS,
    greedy,
    random_expert,
    random_pool,
    ready_process,
    running,
    settings,
    text,
)

import server_command
from conftest import hooked, make_model, make_tokenizer, write_base
from phatgoose.experts.packed.pack import pack
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.routers import PHATGOOSE
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.pool import changes
from phatgoose.serving.service import Service

KEYS = Keys.of(admin=["the-admin-key"])
HEADERS = {"authorization": "Bearer the-admin-key"}
NEW = 24


@pytest.fixture(scope="module")
def base():
    return Base(make_model("llama"), make_tokenizer(), spec="tiny-llama-0")


@pytest.fixture(scope="module")
def pool(base, tmp_path_factory):
    return random_pool(base, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def fourth(base, tmp_path_factory):
    return random_expert(base, tmp_path_factory.mktemp("fourth"), "d", seed=9)


@pytest.fixture(scope="module")
def wanted(base, pool, fourth):
    """names of a pool → {prompt: text}."""
    found = {}
    whole = pool.add(fourth)
    for names in ("abc", "ab", "bc", "abcd", "abd", "a"):
        route(base, Pool([whole[n] for n in names]), PHATGOOSE())
        found[names] = {p: text(base, greedy(base, p, NEW)) for p in PROMPTS}
    unroute(base)
    assert len({v[PROMPTS[0]] for v in found.values()}) == len(found)
    return found


def answer(server, prompt=PROMPTS[0], model="phatgoose"):
    found = server.client().completions.create(model=model, prompt=prompt, max_tokens=NEW, temperature=0)
    return found.choices[0].text


@pytest.mark.slow(10)
@pytest.mark.parametrize("kind", ["folder", "packed", "memory"])
def test_experts_come_and_go(base, pool, fourth, wanted, tmp_path, kind):
    folder = None
    if kind != "memory":
        folder = pool.save(tmp_path / "pool")
        if kind == "packed":
            pack(folder)
        pool = Pool.load(folder)
    fourth.save(tmp_path / "d")

    def names():
        return [e["name"] for e in http.get("/admin/experts", headers=HEADERS).json()["experts"]]

    with running(Service(base, settings(), pool=pool, folder=folder), KEYS) as server, server.http() as http:
        http.headers.update(HEADERS)
        assert answer(server) == wanted["abc"][PROMPTS[0]]
        found = http.post("/admin/experts", json={"folder": str(tmp_path / "d")})
        assert found.status_code == 200, found.text
        assert found.json()["added"] == "d"
        assert names() == ["a", "b", "c", "d"]
        assert answer(server) == wanted["abcd"][PROMPTS[0]]
        assert "d" in [m.id for m in server.client().models.list()]
        assert http.post("/admin/experts/c/off").json()["experts"][2]["on"] is False
        assert answer(server) == wanted["abd"][PROMPTS[0]]
        for name in ("c", "single:c", "single:2"):
            with pytest.raises(openai.NotFoundError, match="'c' is switched off") as refused:
                answer(server, model=name)
            assert refused.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError, match="'c' is switched off"):
                server.client().models.retrieve(name)
            found = http.post("/tokenize", json={"model": name, "prompt": "a"})
            assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")
        assert http.post("/admin/experts/c/on").status_code == 200
        assert http.delete("/admin/experts/d").status_code == 200
        assert answer(server) == wanted["abc"][PROMPTS[0]]
        with pytest.raises(openai.NotFoundError):
            answer(server, model="d")
        if folder is not None:
            assert Pool.load(folder).names == ("a", "b", "c")
        server.until(lambda: len(server.service.engine.multi_router._versions) == 1)
        for name in "abc":
            assert http.delete(f"/admin/experts/{name}").status_code == 200
        assert [m.id for m in server.client().models.list()] == ["base"]
        assert (
            http.post("/admin/experts", json={"folder": str(tmp_path / "d"), "name": "z"}).status_code == 200
        )
        assert [m.id for m in server.client().models.list()] == ["phatgoose", "base", "z"]
    assert not hooked(base.model)


def test_refused_changes_change_nothing(base, pool, fourth, wanted, tmp_path):
    folder = pool.save(tmp_path / "pool")
    fourth.save(tmp_path / "d")
    other = Base(make_model("llama", seed=5), make_tokenizer(), spec="tiny-llama-5")
    random_expert(other, tmp_path, "other").save(tmp_path / "other")
    random_expert(base, tmp_path, "ungated", gated=False).save(tmp_path / "ungated")
    before = sorted(p.name for p in folder.rglob("[!.]*"))
    with running(Service(base, settings(), pool=pool, folder=folder), KEYS) as server, server.http() as http:
        http.headers.update(HEADERS)
        for body, status, says in (
            ({"folder": str(tmp_path / "missing")}, 409, "missing"),
            ({"folder": str(tmp_path / "d"), "name": "a"}, 409, "two experts are named 'a'"),
            ({"folder": str(tmp_path / "other")}, 409, "base"),
            ({"folder": str(tmp_path / "ungated")}, 409, "has no gates"),
            ({"folder": str(tmp_path / "d"), "name": "../up"}, 409, "name"),
            ({"folder": 3}, 400, "folder"),
            ({}, 400, "folder"),
        ):
            found = http.post("/admin/experts", json=body)
            assert found.status_code == status, found.text
            assert says in found.json()["error"]["message"]
        for method, path in (("DELETE", "z"), ("POST", "z/on"), ("POST", "z/off"), ("POST", "a/up")):
            assert http.request(method, f"/admin/experts/{path}").status_code == 404
        assert answer(server) == wanted["abc"][PROMPTS[0]]
    assert sorted(p.name for p in folder.rglob("[!.]*")) == before


@pytest.mark.slow(5)
def test_what_was_changed_is_there_after_a_restart(base, pool, fourth, wanted, tmp_path):
    folder = pool.save(tmp_path / "pool")
    fourth.save(tmp_path / "d")
    with running(Service(base, settings(), pool=pool, folder=folder), KEYS) as server, server.http() as http:
        http.headers.update(HEADERS)
        http.post("/admin/experts", json={"folder": str(tmp_path / "d")})
        http.post("/admin/experts/c/off")
    with (
        running(Service(base, settings(), pool=Pool.load(folder), folder=folder), KEYS) as server,
        server.http() as http,
    ):
        http.headers.update(HEADERS)
        assert [e["on"] for e in http.get("/admin/experts").json()["experts"]] == [True, True, False, True]
        assert answer(server) == wanted["abd"][PROMPTS[0]]
        shutil.rmtree(folder)
        Pool([pool["a"], pool["b"]]).save(folder)
        assert http.post("/admin/reload").status_code == 200
        assert answer(server) == wanted["ab"][PROMPTS[0]]
        (folder / "pool.json").write_text("{")
        assert http.post("/admin/reload").status_code == 409
        assert answer(server) == wanted["ab"][PROMPTS[0]]
    (folder / "serving.json").write_text('{"off": 3}')
    service = Service(base, settings(), pool=pool, folder=folder)
    with pytest.raises(Exception, match="is damaged"):
        asyncio.run(service.start())


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from conftest import make_model, make_tokenizer
from serving_fixtures import settings
from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.server import serve
from phatgoose.serving.service import Service
folder = Path({folder!r})
base = Base(make_model("llama"), make_tokenizer(), "tiny-llama-0")
serve(Service(base, settings(), pool=Pool.load(folder), folder=folder), port=0, keys=Keys.of(admin=["the-admin-key"]))
"""


@contextlib.contextmanager
def process(folder):
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent)], folder=str(folder))
    with (
        ready_process(script) as (process, port),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=HEADERS, timeout=60) as http,
    ):
        yield process, client, http


@pytest.mark.slow(10)
def test_a_server_starts_again_when_its_last_expert_was_taken_out(base, pool, tmp_path):
    write_base(base, tmp_path / "base")
    folder = Pool([pool["a"]]).save(tmp_path / "pool")
    remove_from_folder(folder, "a")
    with (
        server_command.running("serve", "--base", tmp_path / "base", "--pool", folder) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == ["base"]
        assert client.completions.create(model="base", prompt="the", max_tokens=2).usage.completion_tokens


@pytest.mark.slow(10)
def test_what_was_answered_before_a_kill_is_there_after_it(pool, fourth, wanted, tmp_path):
    """kill -9 loses nothing but the requests in flight."""
    folder = pool.save(tmp_path / "pool")
    fourth.save(tmp_path / "d")
    ask = {"model": "phatgoose", "prompt": PROMPTS[0], "temperature": 0}
    with process(folder) as (first, client, http):
        stream = client.completions.create(**ask, max_tokens=400, logit_bias={"1": -100}, stream=True)
        next(stream)
        assert http.post("/admin/experts", json={"folder": str(tmp_path / "d")}).status_code == 200
        assert http.post("/admin/experts/c/off").status_code == 200
        first.kill()
        with pytest.raises((openai.APIConnectionError, httpx2.HTTPError)):
            list(stream)
    with process(folder) as (_, client, http):
        assert [e["on"] for e in http.get("/admin/experts").json()["experts"]] == [True, True, False, True]
        found = client.completions.create(**ask, max_tokens=NEW)
        assert found.choices[0].text == wanted["abd"][PROMPTS[0]]


@pytest.mark.slow(7)
def test_servers_that_share_a_folder_follow_each_other(base, pool, fourth, wanted, tmp_path):
    folder = pool.save(tmp_path / "pool")
    fourth.save(tmp_path / "d")
    follows = Service(Base(make_model("llama"), make_tokenizer(), "tiny-llama-0"), settings(), folder=folder)
    follows.settings.__dict__["follow_seconds"] = 0.05
    leads = Service(base, settings(), pool=pool, folder=folder)
    with running(leads, KEYS) as one, running(follows, KEYS) as two, one.http() as http, two.http() as other:
        http.headers.update(HEADERS)
        other.headers.update(HEADERS)
        built = follows.experts.state.version
        assert answer(two) == wanted["abc"][PROMPTS[0]]
        assert http.post("/admin/experts/c/off").status_code == 200
        two.until(lambda: answer(two) == wanted["ab"][PROMPTS[0]])
        assert follows.experts.state.version is built  # nothing was read again but who is off
        assert http.post("/admin/experts", json={"folder": str(tmp_path / "d")}).status_code == 200
        two.until(lambda: answer(two) == wanted["abd"][PROMPTS[0]])
        # The first, which doesn't follow, begins its next change with what the other did.
        assert other.post("/admin/experts/c/on").status_code == 200
        assert answer(one) == wanted["abd"][PROMPTS[0]]
        assert http.delete("/admin/experts/d").status_code == 200
        assert answer(one) == wanted["abc"][PROMPTS[0]]
        two.until(lambda: answer(two) == wanted["abc"][PROMPTS[0]])
        (folder / "serving.json").write_text(
            "{"
        )  # what can't be read changes nothing, and is refused where it would be lost
        assert http.post("/admin/experts/a/off").status_code == 409
        assert answer(two) == wanted["abc"][PROMPTS[0]]
        (folder / "serving.json").unlink()
        assert other.post("/admin/experts/a/off").status_code == 200
        assert answer(two) == wanted["bc"][PROMPTS[0]]


@pytest.mark.slow(5)
def test_what_is_changed_while_a_server_starts_or_changes_something_is_followed(base, pool, fourth, tmp_path):
    folder = pool.save(tmp_path / "pool")
    fourth.save(tmp_path / "d")
    others = [random_expert(base, tmp_path, name, seed=9) for name in "ef"]
    read = Pool.load(folder)
    add_to_folder(folder, others[0])
    service = Service(base, settings(), pool=read, folder=folder)
    service.settings.__dict__["follow_seconds"] = 0.05
    prepare = service.experts.prepare

    async def as_another_adds(pool, off):
        state = await prepare(pool, off)
        service.experts.prepare = prepare
        await asyncio.to_thread(add_to_folder, folder, others[1])  # which no server's lock keeps waiting
        return state

    def names():
        return "".join(e["name"] for e in http.get("/admin/experts", headers=HEADERS).json()["experts"])

    with running(service, KEYS) as server, server.http() as http:
        http.headers.update(HEADERS)
        server.until(lambda: names() == "abce")
        service.experts.prepare = as_another_adds
        assert http.post("/admin/experts", json={"folder": str(tmp_path / "d")}).status_code == 200
        server.until(lambda: names() == "abcefd")


@pytest.mark.slow(4)
def test_a_folder_that_another_server_is_changing_is_waited_for(base, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "LOCK_SECONDS", 0.3)
    folder = pool.save(tmp_path / "pool")
    with running(Service(base, settings(), pool=pool, folder=folder), KEYS) as server, server.http() as http:
        http.headers.update(HEADERS)
        with FileLock(folder / changes.LOCK):
            refused = http.post("/admin/experts/a/off")
        assert refused.status_code == 409
        assert "by another server" in refused.json()["error"]["message"]
        assert http.post("/admin/experts/a/off").status_code == 200


@pytest.mark.slow(5)
def test_switching_under_load_never_mixes_two_pools(base, pool, fourth, wanted, tmp_path):
    """Every answer is one that one of the pools gives as a whole, and every request is answered."""
    fourth.save(tmp_path / "d")

    async def ask(client, prompt, found, over):
        while not over.is_set():
            made = await client.completions.create(
                model="phatgoose", prompt=prompt, max_tokens=NEW, temperature=0
            )
            found.append((prompt, made.choices[0].text))

    async def all_of_it(server):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            found, over = [], asyncio.Event()
            asking = [asyncio.ensure_future(ask(client, prompt, found, over)) for prompt in PROMPTS]
            with server.http() as http:
                http.headers.update(HEADERS)
                for method, path, body in [
                    ("POST", "experts/a/off", None), ("POST", "experts/a/on", None),
                    ("POST", "experts", {"folder": str(tmp_path / "d")}),
                    ("DELETE", "experts/d", None), ("POST", "experts/c/off", None), ("POST", "experts/c/on", None),
                ]:  # fmt: skip
                    enough = len(found) + 2 * len(PROMPTS)  # some by the experts as they are now
                    while len(found) < enough:
                        await asyncio.sleep(0.01)
                    done = await asyncio.to_thread(http.request, method, f"/admin/{path}", json=body)
                    assert done.status_code == 200, done.text
            over.set()
            await asyncio.gather(*asking)
            return found

    with running(Service(base, settings(), pool=pool), KEYS) as server:
        found = asyncio.run(all_of_it(server))
        server.until(lambda: len(server.service.engine.multi_router._versions) == 1)
    seen = set()
    for prompt, made in found:
        names = [n for n, texts in wanted.items() if texts[prompt] == made]
        assert names, json.dumps([prompt, made])
        seen |= set(names) if len(names) == 1 else set()
    assert {"abc", "bc", "abcd"} <= seen
