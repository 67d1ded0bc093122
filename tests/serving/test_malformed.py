"""Whatever is sent, none of it is the server's failure, and none of it hangs."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import h11
import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from mutations import mutated
from serving_fixtures import running, settings

from phatgoose.serving.http.guard import Keys
from phatgoose.serving.service import Service

pytest_plugins = ["serving_fixtures"]
COUNT = int(os.environ.get("PHATGOOSE_MUTATED_REQUESTS", "10000"))
"""`make fuzz-serve` sends 100,000."""
SEED = os.environ.get("PHATGOOSE_MUTATED_SEED", "0")
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/admin/experts"),
    ("POST", "/admin/experts"),
    ("DELETE", "/admin/experts/{name}"),
    ("POST", "/admin/experts/{name}/{state}"),
    ("POST", "/admin/reload"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.fixture(scope="module")
def server(parts):
    base, pool = parts
    limits = settings(max_tokens=6, max_waiting=200, timeout_seconds=60, body_seconds=2)
    with running(Service(base, limits, pool=pool), Keys.of(admin=["the-admin-key"])) as found:
        yield found
        with found.client() as client:  # and it still works
            done = client.completions.create(model="base", prompt="the", max_tokens=2, temperature=0)
            assert done.usage.completion_tokens >= 1
        found.until(lambda: not found.service.engine.jobs)
        assert found.service.experts.ready_routers <= limits.max_routers + 1


def test_every_operation_is_tried(server):
    with server.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert sorted((m.upper(), path) for path, methods in paths.items() for m in methods) == sorted(OPERATIONS)


@pytest.mark.slow(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_description_allows_and_what_not(server, method, path, mode):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operation = schema[path][method]

    @effort(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def send(case):
        found = case.call(headers={"authorization": "Bearer the-admin-key"}, timeout=60)
        case.validate_response(found, checks=[schemathesis.checks.not_a_server_error])
        assert str(found.status_code) in operation.definition.raw["responses"] or found.status_code in (
            405,
            422,
        )

    try:
        send()
    except Exception as error:
        if "Unsatisfiable" not in type(error).__name__:  # nothing can be wrong where nothing is said
            raise


@pytest.mark.slow(8)
def test_mutated_requests(server):
    source = random.Random(f"requests-{SEED}")
    asked = [mutated(source) for _ in range(COUNT)]
    bad, clients = [], [server.http() for _ in range(4)]
    # What the client itself refuses to send, and lengths that were a lie.
    unsent = (
        httpx2.InvalidURL,
        httpx2.LocalProtocolError,
        httpx2.RemoteProtocolError,
        h11.LocalProtocolError,
        UnicodeEncodeError,
    )

    def send(one):
        client = clients[threading.get_ident() % len(clients)]
        try:
            found = client.request(one.method, one.path, content=one.body, headers=one.headers)
        except unsent:
            return None
        if found.status_code >= 500:
            bad.append((found.status_code, one, found.text[:300]))
        return found.status_code

    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(send, asked))
    for client in clients:
        client.close()
    assert not bad, bad[:5]
    assert statuses.count(200) > COUNT / 20
    assert statuses.count(400) > COUNT / 5
