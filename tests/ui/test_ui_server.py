"""The server over HTTP: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import copy
import http.client
import json
import re
import socket
import time
from dataclasses import replace

import pytest
from ui_tools import PROMPT, ask, serving

from phatgoose.errors import PhatgooseError
from phatgoose.experts.pool import Pool
from phatgoose.tasks.splits import CHAT
from phatgoose.ui import session as session_module
from phatgoose.ui.app import listen
from phatgoose.ui.session import Limits

pytest_plugins = ["ui_fixtures"]


def raw(address, method="GET", path="/", headers=(), body=b""):
    """One request as it is given: (status, headers, body)."""
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def test_the_page_and_an_answer(make_session, served):
    address = served(make_session())
    status, headers, body = raw(address, headers=[("Host", "localhost")])
    assert status == 200
    assert "<title>" in body.decode()
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers
    assert "server" not in headers
    status, headers, events = ask(address, max_new_tokens=4)
    assert status == 200
    assert headers["Content-Type"] == "application/x-ndjson"
    kinds = [event["event"] for event in events if event["event"] != "waiting"]
    assert kinds == ["turn", "evidence", *["tokens"] * 4, "end"]
    again = ask(address, max_new_tokens=4)[2]
    written, repeated = ([e["texts"] for e in found if e["event"] == "tokens"] for found in (events, again))
    assert written == repeated
    for path in ("/docs", "/openapi.json", "/answer", "/../etc/passwd"):
        assert raw(address, path=path, headers=[("Host", "localhost")])[0] in (404, 405)


@pytest.mark.parametrize(("style", "checked"), [(CHAT, True), ("as is", False)])
def test_the_page_starts_with_the_form_that_the_experts_were_trained_on(make_session, served, style, checked):
    session = make_session()
    session.base.tokenizer = copy.deepcopy(session.base.tokenizer)
    session.base.tokenizer.chat_template = "{{ messages[0].content }}"
    record = {"task": {"source": {"prompt_style": style}}}
    session.pool = Pool([replace(e, provenance={**e.provenance, **record}) for e in session.pool.experts])
    page = raw(served(session), headers=[("Host", "localhost")])[2].decode()
    assert 'id="chat"' in page
    assert ('id="chat" checked' in page) == checked
    assert ("trained on: turns of a chat" if checked else "trained on: plain prompts") in page


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["127.0.0.1:{port}"], 200),
        (["localhost:{port}"], 200),
        (["LOCALHOST"], 200),
        (["localhost:9"], 200),  # a tunnel's other end
        (["[::1]:80"], 200),
        (["evil.example"], 421),
        (["localhost.evil.example"], 421),
        (["127.0.0.1.evil.example:{port}"], 421),
        (["localhost:{port}@evil.example"], 421),
        (["0.0.0.0:{port}"], 421),
        ([""], 421),
    ],
)
def test_only_our_own_name_is_answered_to(make_session, served, hosts, status):
    address = served(make_session())
    port = address.rpartition(":")[2]
    for method in ("GET", "POST"):
        headers = [("Host", host.format(port=port)) for host in hosts]
        body = b""
        if method == "POST":
            body = json.dumps({"prompt": PROMPT, "max_new_tokens": 1}).encode()
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        found = raw(address, method, "/" if method == "GET" else "/answer", headers, body)
        assert found[0] == status, (method, found)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://{here}"}, 200),
        ({"Origin": "http://{here}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "https://{here}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_other_sites_can_not_ask(make_session, served, headers, status):
    address = served(make_session())
    here = address.removeprefix("http://")
    found = ask(address, headers={k: v.format(here=here) for k, v in headers.items()}, max_new_tokens=1)
    assert found[0] == status, found
    if status != 200:
        assert isinstance(found[2], str)
        assert "Access-Control-Allow-Origin" not in found[1]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b'"x"', 422),
        (b"{}", 422),
        (b"\xff\xfe", (400, 422)),
        (b"[" * 100_000, (400, 422)),
        (b'{"prompt": "a", "more": 1}', 422),
        (b'{"prompt": 1}', 422),
        (b'{"prompt": "a\\ud800"}', 422),
        (b'{"prompt": "a", "off": ["0"]}', 422),
        (b'{"prompt": "a", "off": [9]}', 422),
        (b'{"prompt": "a", "off": [true]}', 422),
        (b'{"prompt": "a", "top_k": 1e400}', 422),
        (b'{"prompt": "a", "top_k": NaN}', 422),
        (b'{"prompt": "a", "max_new_tokens": 99999999999999999999999}', 422),
        (b'{"prompt": "a", "router": "phatgoose:top_k=9"}', 422),
        (b'{"prompt": "' + b"a" * 2**18 + b'"}', 413),
    ],
)
def test_what_is_no_question_is_refused_with_a_reason(make_session, served, body, status):
    found = ask(served(make_session()), body=body)
    assert found[0] in (status if isinstance(status, tuple) else (status,)), found
    assert found[2]


def test_a_body_of_unknown_length_is_not_read(make_session, served):
    address = served(make_session())
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
    for length in (
        [],
        [("Content-Length", "10")],
    ):  # in chunks it is as long as it likes, whatever is said beside
        assert raw(address, "POST", "/answer", headers + length, b"0\r\n\r\n")[0] == 411


@pytest.fixture
def slow(monkeypatch):
    """Answers that take their time, and how many tokens were written."""
    told, counted = session_module._send, []

    def slowly(job, event):
        counted.append(1)
        time.sleep(0.02)
        return told(job, event)

    monkeypatch.setattr(session_module, "_send", slowly)
    return counted


def begin(address, new_tokens):
    """A connection on which an answer has begun."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 60)
    body = json.dumps({"prompt": PROMPT, "max_new_tokens": new_tokens}).encode()
    head = (
        "POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_stops_its_answer(make_session, served, slow):
    address = served(make_session())
    connection = begin(address, 400)
    assert b"200 OK" in connection.recv(100)
    while len(slow) < 3:
        time.sleep(0.01)
    connection.close()
    assert ask(address, max_new_tokens=1)[0] == 200
    assert len(slow) < 200


def test_too_many_are_sent_away_and_those_who_leave_make_room(make_session, served, slow):
    address = served(make_session(limits=Limits(waiting=1)))
    first = begin(address, 450)
    assert b"200 OK" in first.recv(100)
    waiting = begin(address, 1)
    assert b"200 OK" in waiting.recv(100)
    status, headers, reason = ask(address)
    assert (status, headers["Retry-After"]) == (429, "5")
    assert "try again" in reason
    waiting.close()
    status = 429
    while status == 429 and len(slow) < 400:
        later = begin(address, 1)
        status = int(later.recv(100).split()[1])
        if status == 429:
            later.close()
            time.sleep(0.05)
    assert status == 200
    first.close()
    later.close()


def test_it_ends_while_somebody_waits(make_session, slow):
    with serving(make_session()) as address:
        connection = begin(address, 450)
        assert b"200 OK" in connection.recv(100)
    # That has ended the server, and fails if it takes long.
    connection.close()
    assert len(slow) < 400


def test_prompts_are_not_logged(make_session, served, capfd):
    ask(served(make_session()), prompt="very private words", max_new_tokens=1)
    captured = capfd.readouterr()
    assert not re.search("private", captured.out + captured.err)


def test_a_taken_port_is_refused_by_number():
    with listen(0) as taken, pytest.raises(PhatgooseError, match=r"port \d+.*--port"):
        listen(taken.getsockname()[1])


def test_only_this_machine_is_listened_to():
    with listen(0) as own:
        assert own.getsockname()[0] == "127.0.0.1"
