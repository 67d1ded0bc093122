"""What goes over the wire: connections, lines of streams, what refusals name and what they keep to themselves."""

from __future__ import annotations

import json
import shutil
import socket
import time

import httpx2
import pytest
import requests
from serving_fixtures import random_pool, running, settings

from phatgoose.models.base.load import load_base
from phatgoose.serving.errors import hide_paths
from phatgoose.serving.http.completions import _event
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.service import Service

pytest_plugins = ["serving_fixtures"]
HEADERS = {"authorization": "Bearer the-admin-key"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(parts):
    base, pool = parts
    with running(Service(base, settings(max_body_bytes=3000, body_seconds=1), pool=pool)) as found:
        yield found


def answered(server, sent, seconds=20):
    """What comes back, and whether the server has closed the connection: a byte every so often doesn't keep it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(sent)
        got, end = b"", time.monotonic() + 5
        connection.settimeout(0.2)
        while time.monotonic() < end:
            try:
                more = connection.recv(65536)
            except TimeoutError:
                try:
                    connection.sendall(b"a")
                except ConnectionError:
                    return got, True
                continue
            except ConnectionError:
                return got, True
            if not more:
                return got, True
            got += more
    return got, False


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (HEAD + JSON + b"Content-Length: 5000\r\n\r\n{", 413),
        (HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b"a" * 4096, 413),
        (HEAD + JSON + b"Content-Length: 100\r\n\r\n{", 408),
        (HEAD + b"Content-Type: text/plain\r\nContent-Length: 100\r\n\r\n{", 415),
        (HEAD + JSON + b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD.replace(b"v1/completions", b"admin/experts") + JSON + b"Content-Length: 100\r\n\r\n{", 403),
    ],
)
def test_a_refused_request_does_not_keep_its_connection(server, sent, status):
    got, closed = answered(server, sent)
    assert got.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in got.lower()
    assert closed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON + b"Content-Type: text/plain\r\n", 415),
        (JSON + b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\n", 415),
        (JSON + b"Content-Encoding: gzip\r\nContent-Encoding: identity\r\n", 200),
        (JSON + b"Content-Encoding:\r\n", 200),
        (JSON + b"X-Request-Id: first\r\nX-Request-Id: last\r\n", 200),
    ],
)
def test_the_last_of_a_repeated_header_counts(server, headers, status):
    body = b'{"prompt": "the", "max_tokens": 1}'
    sent = HEAD + headers + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    got, _ = answered(server, sent)
    assert got.startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"x-request-id: last\r\n" in got) == (b"last" in headers)


def test_a_request_that_was_read_keeps_its_connection(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for body, status in ((b'{"prompt": 5}', 400), (b'{"prompt": "the", "max_tokens": 1}', 200)):
            connection.sendall(HEAD + JSON + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            got = connection.recv(65536)
            assert got.startswith(f"HTTP/1.1 {status} ".encode())
            assert b"connection: close" not in got.lower()


def test_probes_take_head(server):
    with server.http() as http:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/base"):
            found = http.head(path)
            assert (found.status_code, found.content) == (200, b"")
        assert http.head("/v1/models/nothing").status_code == 404


def test_every_name_that_answers_is_a_model(server):
    with server.http() as http:
        for name in (
            "phatgoose",
            "base",
            "tiny-llama-0",
            "a",
            "single:a",
            "phatgoose:top_k=1",
            "uniform",
            "arrow",
        ):
            found = http.get(f"/v1/models/{name}")
            assert (found.status_code, found.json().get("id")) == (200, name)
            asked = http.post("/v1/completions", json={"model": name, "prompt": "the", "max_tokens": 1})
            assert asked.status_code == 200
        refused = {
            "z": 404,
            "single:z": 404,
            "phatgoose:top_k=0": 400,
            "phatgoose:best=1": 400,
            "retrieval": 400,
            "retrieval:encoder=/etc": 400,
        }
        for name, status in refused.items():
            found = http.get(f"/v1/models/{name}")
            asked = http.post("/v1/completions", json={"model": name, "prompt": "the"})
            assert found.status_code == asked.status_code == status
            assert found.json() == asked.json()
            error = found.json()["error"]
            assert error["message"]
            assert error["code"] == ("model_not_found" if status == 404 else None)


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029"])
def test_lines_of_a_stream_end_where_every_client_thinks_they_do(server, end):
    event = _event({"text": f"a{end}b"})
    assert event.splitlines() == [event[:-2], ""]
    assert json.loads(event.removeprefix("data: ")) == {"text": f"a{end}b"}
    # An echo brings the character through the server, a stream through clients that read lines.
    ask = {"prompt": f"a{end}b", "max_tokens": 0, "echo": True, "stream": True}
    url = f"{server.url}/v1/completions"
    with httpx2.Client() as http, http.stream("POST", url, json=ask) as one:
        assert one.headers["x-accel-buffering"] == "no"
        lines = [line for line in one.iter_lines() if line]
    with requests.post(url, json=ask, stream=True, timeout=20) as two:
        others = [line.decode() for line in two.iter_lines() if line]
    for found in (lines, others):
        assert all(line.startswith("data: ") for line in found)
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in found[:-1]]
        assert "".join(texts) == f"a{end}b"


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"tools": [{}]}, "tools"),
        ("completions", {"max_tokens": 5000}, "max_tokens"),
        ("completions", {"nothing": 1}, "nothing"),
        ("completions", {"model": "z"}, "model"),
        ("completions", {"prompt": [1] * 600}, "prompt"),
        ("completions", {"n": 100}, "n"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"max_completion_tokens": 5000}, "max_completion_tokens"),
    ],
)
def test_refusals_name_the_parameter(server, path, change, param):
    chat = {"messages": [{"role": "user", "content": "the"}]}
    body = (chat if path.startswith("chat") else {"prompt": "the"}) | change
    with server.http() as http:
        found = http.post(f"/v1/{path}", json=body)
    assert found.status_code in (400, 404)
    assert found.json()["error"]["param"] == param


def test_more_answers_than_there_are_places_are_refused_for_good(make_base):
    limits = settings(max_running=1, max_waiting=2)
    with running(Service(make_base("llama"), limits)) as server, server.http() as http:
        for n, status in ((3, 200), (4, 400)):
            found = http.post("/v1/completions", json={"prompt": "the", "max_tokens": 1, "n": n})
            assert found.status_code == status
        assert "at most 3 are given" in found.json()["error"]["message"]


def test_a_folder_that_is_away_is_not_made_anew(make_base, tmp_path):
    base = make_base("llama")
    pool = random_pool(base, tmp_path)
    folder = pool.save(tmp_path / "pools" / "mine")
    random_expert = pool["a"].save(tmp_path / "d")
    with (
        running(
            Service(base, settings(), pool=pool, folder=folder), Keys.of(admin=["the-admin-key"])
        ) as server,
        server.http() as http,
    ):
        http.headers.update(HEADERS)
        shutil.move(folder, tmp_path / "away")
        for method, path, body in (
            ("POST", "experts/a/off", None), ("POST", "experts/a/on", None), ("DELETE", "experts/a", None),
            ("POST", "experts", {"folder": str(random_expert), "name": "d"}), ("POST", "reload", None),
        ):  # fmt: skip
            found = http.request(method, f"/admin/{path}", json=body)
            assert found.status_code == 409, path
            assert str(tmp_path) not in found.text
            assert not folder.exists()
        shutil.move(tmp_path / "away", folder)
        assert http.post("/admin/experts/a/off").status_code == 200


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("'/srv/my pool/a' is damaged", "'a' is damaged"),
        ("~/pool isn't there, nor C:\\pools\\b", "pool isn't there, nor b"),
        (r"'<s>\n\nhi' against '</s> \nhi', org/name", r"'<s>\n\nhi' against '</s> \nhi', org/name"),
    ],
)
def test_paths_are_hidden_and_nothing_else(text, told):
    assert hide_paths(text) == told


def test_no_message_says_where_the_server_keeps_its_files(make_base, tmp_path):
    made = make_base("llama")
    made.model.save_pretrained(tmp_path / "my models" / "tiny")
    made.tokenizer.save_pretrained(tmp_path / "my models" / "tiny")
    base = load_base(str(tmp_path / "my models" / "tiny"))
    pool = random_pool(base, tmp_path)
    keys = Keys.of(admin=["the-admin-key"])
    with running(Service(base, settings(), pool=pool), keys) as server, server.http() as http:
        assert http.get("/v1/models/tiny").status_code == 200
        chat = {"messages": [{"role": "user", "content": "the"}]}
        found = [
            http.post("/v1/chat/completions", json=chat),
            http.post("/v1/completions", json={"prompt": "the", "model": "z"}),
            http.post("/v1/completions", json={"prompt": "the", "model": "retrieval"}),
            http.get("/v1/models"),
            http.post(
                "/admin/experts", json={"folder": str(tmp_path / "my models" / "none")}, headers=HEADERS
            ),
        ]
    assert [one.status_code for one in found] == [400, 404, 400, 200, 409]
    assert not any("my models" in one.text for one in found)


def test_a_path_with_a_slash_too_many_is_unknown_not_a_redirect(server):
    """A redirect would name the host and scheme that the client wrote."""
    got, _ = answered(server, b"GET /health/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b" 404 " in got.partition(b"\r\n")[0]
    assert b"evil.example" not in got
