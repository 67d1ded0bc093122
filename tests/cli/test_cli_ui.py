"""`phatgoose ui`: the command serves its page, and refuses by name."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request

import pytest

from phatgoose.extras import install
from server_command import running

pytest_plugins = ["cli_fixtures"]


@pytest.mark.slow(20)
def test_the_command_serves_the_page_and_answers(ready, base):
    folder, _ = ready
    with running("ui", "--pool", folder / "pool", "--base", base, last="ended") as address:
        with urllib.request.urlopen(address, timeout=60) as page:
            assert "live" in page.read().decode()
        question = json.dumps({"prompt": "what is the colour of red?", "max_new_tokens": 2}).encode()
        request = urllib.request.Request(f"{address}answer", question, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read().splitlines()[-1])["event"] == "end"


def test_it_refuses(run, ready, base, monkeypatch):
    folder, _ = ready
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("ui", "--pool", folder / "pool", "--base", base, "--port", port)
    assert result.code == 1
    assert f"port {port}" in result.err
    assert run("ui", "--pool", folder / "nowhere", "--port", 0).code == 1
    assert run("ui", "--base", base).code == 2
    for name in [name for name in sys.modules if name.startswith("phatgoose.ui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    said = run("ui", "--pool", folder / "pool", "--port", 0).err
    assert "FastAPI" in said
    assert install("serve") in said
