"""Two replicas on a local Ray cluster, one of which is killed under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import openai
import psutil
import pytest
import yaml
from pydantic import ValidationError
from serving_fixtures import PROMPTS, greedy, random_pool, text

from conftest import make_model, make_tokenizer, write_base
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import remove_from_folder
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.routers import Gander
from phatgoose.serving.errors import ServingError

ray = pytest.importorskip("ray")
serve = pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed: pip install 'phatgoose[replicas]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    # Beside other work Ray would give up early, or kill what is small because something else is large.
    for patience in ("PROXY_READY_CHECK", "PROXY_HEALTH_CHECK"):
        monkeypatch.setenv(f"RAY_SERVE_{patience}_TIMEOUT_S", "120")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    base = Base(make_model("llama"), make_tokenizer(), spec="tiny")
    write_base(base, tmp_path / "base")
    pool = random_pool(base, tmp_path)
    pool.save(tmp_path / "pool")
    route(base, pool, Gander())
    wanted = {prompt: text(base, greedy(base, prompt)) for prompt in PROMPTS}
    unroute(base)
    port = free_port()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            built(
                "phatgoose.serving.replicas:app",
                {
                    "base": str(tmp_path / "base"),
                    "pool": str(tmp_path / "pool"),
                    "replicas": "2",
                    "settings": '{"max_running": 4, "cache_tokens": 2048}',
                },
            )
        )
        yield f"http://127.0.0.1:{port}/v1", wanted, tmp_path / "pool"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> set[int]:
    """The processes of the replicas that run: Ray gives them their actor's name."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::ServeReplica"):
                found.add(process.pid)
    return found


def built(import_path, args):
    """What Ray makes of an application's import path and arguments, in a file as on the command line."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    return build(import_attr(import_path), args)


def test_the_deployment_file_starts():
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "recipes" / "replicas.yaml").read_text()
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    deployment = built(application.import_path, application.args)._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests == 32 + 128


def test_the_documented_command_starts():
    from ray.serve.scripts import convert_args_to_dict

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("serve run phatgoose"))
    _, _, place, *given = line.split()
    more = ("cpus=0.5", 'settings={"max_running": 4}')
    deployment = built(place, convert_args_to_dict((*given, *more)))._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    assert deployment.max_ongoing_requests == 4 + 128


def test_what_is_no_setting_is_refused_by_name():
    from phatgoose.serving.replicas import app

    for wrong, says in (
        ({"pools": "y"}, "pools"),
        ({"replicas": "two"}, "replicas"),
        ({"replicas": 0}, "replicas"),
    ):
        with pytest.raises(ValueError, match=says):
            app({"base": "x", **wrong})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "valid dictionary"),
        ("5", "valid dictionary"),
        (None, "valid dict"),
    ],
)
def test_settings_that_are_no_json_object_are_refused_for_one_reason(given, why):
    from phatgoose.serving.replicas import ReplicaSettings

    with pytest.raises(ValidationError) as caught:
        ReplicaSettings(base="x", settings=given)
    (error,) = caught.value.errors()
    assert error["loc"] == ("settings",)
    assert why in error["msg"]


@pytest.mark.parametrize("gates", [True, False])
def test_a_pool_gets_the_router_that_commands_take(make_base, make_expert, tmp_path, gates):
    from phatgoose.serving.replicas import ReplicaSettings, make_service

    made = make_base("llama")
    write_base(made, tmp_path / "base")
    Pool([make_expert(made, "a", gates=gates)]).save(tmp_path / "pool")
    args = ReplicaSettings(base=str(tmp_path / "base"), pool=str(tmp_path / "pool"))
    assert make_service(args).experts.router == "gander"


def test_each_replica_serves_its_own_metrics():
    from prometheus_client import CollectorRegistry, Gauge

    from phatgoose.serving.replicas import ReplicaSettings, serve_metrics

    first, found = free_port(), []
    args = ReplicaSettings(base="x", replicas=1, metrics_port=first)
    for number in range(2):
        registry = CollectorRegistry()
        Gauge("replica", "Which.", registry=registry).set(number)
        found.append(serve_metrics(args, registry))
    assert found == [first, first + 1]
    for number, port in enumerate(found):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert f"replica {float(number)}" in answer.read().decode()
    with pytest.raises(ServingError, match="choose another metrics_port"):
        serve_metrics(args, CollectorRegistry())
    assert serve_metrics(ReplicaSettings(base="x"), CollectorRegistry()) is None


def test_without_a_key_names_of_other_places_are_refused():
    from phatgoose.serving.http.guard import Keys
    from phatgoose.serving.replicas import ReplicaSettings

    assert ReplicaSettings(base="x").allowed_hosts(Keys()) == {"localhost", "127.0.0.1", "[::1]"}
    own = ReplicaSettings(base="x", hosts="models.example, ::1")
    assert own.allowed_hosts(Keys()) == {"models.example", "[::1]"}
    assert own.allowed_hosts(Keys.of(["an-api-key"])) is None
    assert ReplicaSettings(base="x", hosts="*").allowed_hosts(Keys()) is None


@pytest.mark.slow(51)
def test_one_of_two_replicas_is_killed_under_load(cluster):
    url, wanted, folder = cluster
    assert len(replicas()) == 2
    failed: list[str] = []

    async def ask(client, prompt, times):
        found = []
        for _ in range(times):
            try:
                made = await client.completions.create(
                    model="phatgoose", prompt=prompt, max_tokens=12, temperature=0
                )
                found.append(made.choices[0].text == wanted[prompt])
            except openai.APIError as error:
                failed.append(str(error))
        return found

    async def under_load():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            asking = [asyncio.ensure_future(ask(client, prompt, 12)) for prompt in PROMPTS]
            await asyncio.sleep(0.5)
            killed = min(replicas())
            os.kill(killed, signal.SIGKILL)
            return killed, [one for found in await asyncio.gather(*asking) for one in found]

    killed, answers = asyncio.run(under_load())
    assert all(answers)
    assert len(failed) <= len(PROMPTS)  # at most what the killed one was writing
    assert len(answers) >= 11 * len(PROMPTS)

    async def until_there_are_two():
        for _ in range(600):
            now = replicas()
            if len(now) == 2 and killed not in now:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(replicas())

    asyncio.run(until_there_are_two())
    remove_from_folder(folder, "c")  # which both replicas come to know
    end = time.monotonic() + 60
    with openai.OpenAI(base_url=url, api_key="none", timeout=120) as client:
        while any("c" in [m.id for m in client.models.list()] for _ in range(12)):
            assert time.monotonic() < end
