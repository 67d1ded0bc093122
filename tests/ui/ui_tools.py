"""A server of the live page in a thread, and questions to it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from phatgoose.ui.app import listen, make_app, server

PROMPT = "What is the past tense of walk?\nAnswer:"


@contextmanager
def serving(session):
    """The address of a server of this session, in a thread."""
    running = server(make_app(session))
    with listen(0) as socket:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def ask(address, path="/answer", body=None, headers=(), **question):
    """(status, headers, lines or the error) of one question."""
    data = json.dumps({"prompt": PROMPT, **question}).encode() if body is None else body
    own = {"Content-Type": "application/json", **dict(headers)}
    request = urllib.request.Request(address + path, data, own)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, [json.loads(line) for line in response]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.loads(error.read())["error"]
