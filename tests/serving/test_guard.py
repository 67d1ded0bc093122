"""Keys, sizes, names, and what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import httpx2
import openai
import pytest
import uvicorn
from serving_fixtures import ready_process, running, settings

from phatgoose.serving.errors import ServingError
from phatgoose.serving.http.app import make_app
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.server import LOCAL_NAMES, check_host, host_names, is_local, read_keys, serve
from phatgoose.serving.logs import JsonFormatter, log
from phatgoose.serving.service import Service

ASK = {"prompt": "the", "max_tokens": 2}


@pytest.fixture
def base(make_base):
    return make_base("llama")


@pytest.fixture
def server(base):
    with running(Service(base, settings())) as found:
        yield found


def test_keys(base):
    keys = Keys.of(["one-api-key", "another-key"], ["the-admin-key"])
    with running(Service(base, settings()), keys) as server, server.http() as http:
        for key in ("one-api-key", "another-key"):
            assert server.client(key).completions.create(model="base", **ASK).usage.completion_tokens >= 1
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            server.client("wrong").completions.create(model="base", **ASK)
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert http.get(path).status_code == 401
        for given in (
            "",
            "Bearer",
            "Basic one-api-key",
            "one-api-key",
            "Bearer the-admin-key",
            "Bearer ö",
        ):
            assert http.get("/v1/models", headers=[(b"authorization", given.encode())]).status_code == 401, (
                given
            )
        assert http.get("/v1/models", headers={"authorization": "bearer one-api-key"}).status_code == 200
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 200
        assert http.get("/admin/experts", headers={"authorization": "Bearer one-api-key"}).status_code == 401
        assert (
            http.get("/admin/experts", headers={"authorization": "Bearer the-admin-key"}).status_code == 200
        )


def test_without_an_admin_key_nothing_can_be_changed(base):
    with running(Service(base, settings())) as server, server.http() as http:
        for method, path in (
            ("GET", "experts"),
            ("POST", "experts"),
            ("DELETE", "experts/a"),
            ("POST", "reload"),
        ):
            found = http.request(method, f"/admin/{path}")
            assert found.status_code == 403
            assert "without an admin key" in found.json()["error"]["message"]


def test_a_server_below_a_path_of_its_own_keeps_its_admin_key(base):
    keys = Keys.of(["one-api-key"], ["the-admin-key"])

    def status(path, key, root):
        found = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            found.append(message.get("status"))

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "root_path": root,
            "query_string": b"",
            "http_version": "1.1",
            "headers": [(b"authorization", f"Bearer {key}".encode())],
        }
        asyncio.run(make_app(Service(base, settings()), keys)(scope, receive, send))
        return found[0]

    for root in ("", "/below", "/a", "/admin"):
        assert status(f"{root}/admin/experts", "the-admin-key", root) == 200
        assert status(f"{root}/admin/experts", "one-api-key", root) == 401
        assert status(f"{root}/v1/models", "one-api-key", root) == 200
    assert status("/admin/experts", "one-api-key", "/a") == 401


def test_keys_come_from_files_or_the_environment(tmp_path, monkeypatch):
    api, admin = tmp_path / "api", tmp_path / "admin"
    api.write_text("first-key\n\n second-key \n")
    admin.write_text("admin-key\n")
    assert read_keys(api, admin) == Keys.of(["first-key", "second-key"], ["admin-key"])
    assert read_keys(None, None) == Keys()
    monkeypatch.setenv("PHATGOOSE_API_KEY", "from-outside")
    assert read_keys(None, admin) == Keys.of(["from-outside"], ["admin-key"])
    api.write_text("short\n")
    with pytest.raises(ServingError, match="shorter than 8"):
        read_keys(api, None)
    api.write_text("\n")
    with pytest.raises(ServingError, match="holds no key"):
        read_keys(api, None)
    with pytest.raises(ServingError, match="no keys can be read"):
        read_keys(tmp_path / "missing", None)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.8.8.8", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_other_machines_need_a_key(host, local):
    assert is_local(host) == local
    check_host(host, Keys.of(["some-api-key"]))
    if not local:
        with pytest.raises(ServingError, match="there is no key"):
            check_host(host, Keys.of(admin=["some-admin-key"]))


def test_names_of_other_places_are_refused_where_there_is_no_key(base):
    names = host_names(*LOCAL_NAMES, "127.0.0.2")
    with running(Service(base, settings()), hosts=names) as server, server.http() as http:
        for host in ("localhost", "127.0.0.1:99", "LOCALHOST", "[::1]:8000", "[::1]", "127.0.0.2:8000"):
            assert http.get("/ready", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "", "[::1].evil"):
            assert http.get("/ready", headers={"host": host}).status_code in (400, 403), host


def test_a_server_answers_where_it_was_told_to_listen(base):
    """Also at another of this machine's own addresses."""
    said, told, ended = [], threading.Event(), []
    service = Service(base, settings())

    def ready(address):
        said.append(address)
        told.set()

    def run():
        with mock.patch.object(uvicorn.Server, "run", held):
            serve(service, "127.0.0.2", 0, ready=ready)

    def held(server):
        ended.append(server)
        asyncio.run(server.serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert told.wait(30)
        assert httpx2.get(f"{said[0]}/ready").status_code == 200
        assert httpx2.get(f"{said[0]}/ready", headers={"host": "evil.example"}).status_code == 403
    finally:
        ended[0].should_exit = True
        thread.join()


@pytest.mark.slow(21)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health"])
@pytest.mark.parametrize("end", ["%0A", "%0a%0A", "%00", "%7F", "%0D"])
def test_paths_with_control_characters_lead_nowhere(server, path, end):
    with server.http() as http:
        for method in ("GET", "POST"):
            assert http.request(method, path + end, json=ASK).status_code == 404


@pytest.mark.slow(7)
def test_a_head_that_is_never_finished_is_not_waited_for(base):
    with running(Service(base, settings(body_seconds=1))) as server:
        whole = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
        for begin in (b"", b"GET /ready HT", whole, whole + whole[:9]):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
                began = time.monotonic()
                slow.sendall(begin)
                answered = b""
                with contextlib.suppress(ConnectionError):
                    while got := slow.recv(1000):
                        answered += got
                        if begin == whole and answered.endswith(
                            b"}"
                        ):  # one byte after the other doesn't prolong it
                            slow.sendall(b"G")
                            time.sleep(0.6)
                            slow.sendall(b"E")
                            begin = b"begun"
                assert answered.count(b" 200 ") == (begin.startswith(whole) or begin == b"begun")
                assert time.monotonic() - began < 10
        # What takes long behind its head isn't cut off.
        with server.client() as client:
            ask = {"model": "base", "prompt": "the", "max_tokens": 480, "logit_bias": {"1": -100}}
            times = 0
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                assert client.completions.create(**ask).usage.completion_tokens == 480
                times += 1
            assert times


def test_large_slow_and_strange_bodies(base):
    with (
        running(Service(base, settings(max_body_bytes=1000, body_seconds=1))) as server,
        server.http() as http,
    ):
        large = {"prompt": "a" * 2000}
        assert http.post("/v1/completions", json=large).status_code == 413
        parts = (b'{"prompt": "' + b"a" * 100 for _ in range(50))
        assert (
            http.post(
                "/v1/completions", content=parts, headers={"content-type": "application/json"}
            ).status_code
            == 413
        )
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            found = http.post("/v1/completions", content=json.dumps(ASK), headers={"content-type": kind})
            assert found.status_code == 415
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        found = http.post("/v1/completions", content=gzip.compress(json.dumps(ASK).encode()), headers=packed)
        assert (found.status_code, "compressed" in found.text) == (415, True)
        for body in (b"", b"{", b"[" * 900, b"\xff", b"nul", b'{"prompt": "a"}}', b'"a"', b"3", b"[]"):
            found = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert found.status_code == 400, body
            assert found.json()["error"]["type"] == "invalid_request_error"
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(1000)
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
        assert http.post("/v1/completions", json=ASK).status_code == 200


def test_the_log_has_no_prompts(base):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with running(Service(base, settings())) as server, server.http() as http:
            asked = http.post(
                "/v1/completions",
                json={"prompt": "secret words", "max_tokens": 3},
                headers={"x-request-id": "abc-1"},
            )
            assert asked.headers["x-request-id"] == "abc-1"
            http.post("/v1/completions", json={"prompt": 7, "secret": "secret"})
            http.get("/secret/path")
            other = http.get("/ready", headers={"x-request-id": "not fit for a log\t{}"}).headers[
                "x-request-id"
            ]
            assert len(other) == 32
            server.service.check_capacity = None  # so that the server fails
            assert http.post("/v1/completions", json={"prompt": "secret"}).status_code == 500
    finally:
        log.removeHandler(handler)
    assert "secret" not in written.getvalue()
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    first = lines[0]
    assert first["event"] == "request"
    assert first["id"] == "abc-1"
    assert first["path"] == "/v1/completions"
    assert (first["status"], first["kind"], first["answers"]) == (200, "base", 1)
    assert first["answer_tokens"] >= 1
    assert {line["path"] for line in lines if "path" in line} == {"/v1/completions", "other", "/ready"}
    failed = next(line for line in lines if line["event"] == "failed")
    assert failed["error"] == "TypeError"
    assert any("completions.py" in place for place in failed["at"])


def test_errors_of_libraries_are_logged_without_what_they_say():
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    library = logging.Logger("library")
    library.addHandler(handler)
    try:
        raise RuntimeError("secret words")
    except RuntimeError as error:
        library.error(f"Error in generation loop: {error}", exc_info=True)
    line = json.loads(written.getvalue())
    assert line["event"] == "Error in generation loop: RuntimeError"
    assert line["error"] == "RuntimeError"
    assert "secret" not in written.getvalue()


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
from conftest import make_model, make_tokenizer
from serving_fixtures import settings
from phatgoose.models.base.base import Base
from phatgoose.serving.http.server import serve
from phatgoose.serving.service import Service
serve(Service(Base(make_model("llama"), make_tokenizer(), "tiny"), settings(drain_seconds={drain})), port=0)
"""


FAILING = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from conftest import make_model, make_tokenizer
from serving_fixtures import settings
from phatgoose.errors import PhatgooseError
from phatgoose.models.base.base import Base
from phatgoose.serving.http.server import serve
from phatgoose.serving.service import Service
try:
    folder = {folder!r} and Path({folder!r})
    serve(Service(Base(make_model("llama"), make_tokenizer(), "tiny"), settings(), folder=folder), port={port})
except PhatgooseError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow(7)
@pytest.mark.parametrize("fault", ["pool", "port"])
def test_a_server_that_cannot_start_says_why(tmp_path, fault):
    here = os.path.dirname(__file__)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if fault == "port" else 0
        folder = str(tmp_path / "no-pool") if fault == "pool" else ""
        script = FAILING.format(paths=[here, os.path.dirname(here)], folder=folder, port=port)
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    expected = {"pool": "PoolError", "port": "ServingError the server couldn't start on 127.0.0.1"}[fault]
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(expected)
    assert "Traceback" not in ended.stderr


@contextlib.contextmanager
def server_process(drain):
    """A server as a process of its own, and a client of it."""
    here = os.path.dirname(__file__)
    script = SCRIPT.format(paths=[here, os.path.dirname(here)], drain=drain)
    with ready_process(script) as (process, port):
        yield process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@pytest.mark.slow(3)
def test_sigterm_lets_what_was_begun_finish():
    with server_process(drain=60) as (process, client):
        ask = {
            "model": "base",
            "prompt": "the",
            "max_tokens": 300,
            "temperature": 0,
            "logit_bias": {"1": -100},
        }
        stream = client.completions.create(**ask, stream=True)
        next(stream)
        process.terminate()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=60) in (0, -15)
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**ask)
        events = [json.loads(line)["event"] for line in process.stderr]
        assert "ending" in events
        assert events[-1] == "request"


@pytest.mark.slow(4)
def test_sigterm_ends_what_takes_too_long():
    with server_process(drain=1) as (process, client):
        streams = [
            client.completions.create(
                model="base", prompt="the", max_tokens=400, n=8, logit_bias={"1": -100}, stream=True
            )
            for _ in range(6)
        ]
        next(streams[0])
        began = time.monotonic()
        process.terminate()
        assert process.wait(timeout=60) in (0, -15)
        assert time.monotonic() - began < 40
