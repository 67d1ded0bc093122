"""A server on a tiny model, in a thread of the test's process.

A file with `pytest_plugins = ["serving_fixtures"]` has `server`, one for all its tests, and clients for it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
import torch
import uvicorn
from transformers import GenerationConfig

import conftest
from conftest import TARGETS, make_model, make_tokenizer
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base
from phatgoose.serving.http.guard import Keys
from phatgoose.serving.http.server import uvicorn_config
from phatgoose.serving.service import Service
from phatgoose.serving.settings import ServeSettings

PROMPTS = [
    "the quick brown fox",
    "What is the past tense of walk? Answer:",
    "0 1 2 3 4",
    "yes no maybe",
    "true",
    "plus minus times",
    "lazy dog jumps over the quick brown fox and then some more words follow here",
    "entailment neutral",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ "
    "raise_exception('unknown role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def greedy(base: Base, prompt: str | list[int], new: int = 12) -> list[int]:
    """generate()'s own greedy tokens behind a prompt, as the model is routed now."""
    ids = base.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=1, pad_token_id=0)
    kept, base.model.generation_config = base.model.generation_config, config
    try:
        if base.is_encoder_decoder:
            config.decoder_start_token_id = 0
        found = base.model.generate(torch.tensor([ids]), generation_config=config)[0].tolist()
    finally:
        base.model.generation_config = kept
    return found[1:] if base.is_encoder_decoder else found[len(ids) :]


def text(base: Base, tokens: list[int]) -> str:
    return base.tokenizer.decode(tokens, skip_special_tokens=True)


def make_pool(base: Base, make_expert, names: str = "abc") -> Pool:
    # Strong experts, so that each model writes something else.
    return Pool([make_expert(base, n, rank=2 + i, seed=i, scale=0.3) for i, n in enumerate(names)])


def random_expert(base: Base, folder, name: str, rank: int = 3, seed: int = 0, gated: bool = True) -> Expert:
    """A random LoRA that PEFT wrote, strong, with random gates."""
    settings = {"rank": rank, "targets": TARGETS["llama"], "seed": seed, "gates": gated, "scale": 0.3}
    return conftest.random_expert(base, folder, name, **settings)


def random_pool(base: Base, folder, names: str = "abc") -> Pool:
    return Pool([random_expert(base, folder, n, rank=2 + i, seed=i) for i, n in enumerate(names)])


def settings(**changes) -> ServeSettings:
    return ServeSettings(
        **(
            {"max_running": 8, "batch_tokens": 24, "cache_tokens": 4096, "watch_every": 1, "drain_seconds": 5}
            | changes
        )
    )


class Running:
    """A server that was started: where it is, and clients for it."""

    def __init__(self, service: Service, port: int):
        self.service, self.base, self.port = service, service.base, port
        self.url, self._open = f"http://127.0.0.1:{port}", contextlib.ExitStack()

    def client(self, key: str = "nothing") -> openai.OpenAI:
        return self._open.enter_context(openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0))

    def http(self) -> httpx2.Client:
        client = httpx2.Client(base_url=self.url, timeout=60)
        self._open.callback(client.close)
        return client

    def close(self) -> None:
        self._open.close()

    def until(self, what, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it didn't come to that"
            time.sleep(0.01)


@contextlib.contextmanager
def running(service: Service, keys: Keys | None = None, hosts=None):
    server = uvicorn.Server(uvicorn_config(service, keys, hosts))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server didn't start"
            time.sleep(0.01)
        found = Running(service, server.servers[0].sockets[0].getsockname()[1])
        with contextlib.closing(found):
            yield found
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def ready_process(script: str):
    """(a process that runs a script which serves, its port) once it says that it is ready."""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        yield process, next(json.loads(line)["port"] for line in process.stderr if '"ready"' in line)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def with_template(base: Base) -> Base:
    base.tokenizer = make_tokenizer()
    base.tokenizer.chat_template = TEMPLATE
    return base


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base that chats, and a pool of three experts."""
    base = with_template(Base(make_model("llama"), make_tokenizer(), spec="tiny-llama-0"))
    return base, random_pool(base, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def server(parts):
    base, pool = parts
    with running(Service(base, settings(), pool=pool)) as found:
        yield found


@pytest.fixture
def client(server):
    """OpenAI's client."""
    with server.client() as found:
        yield found


@pytest.fixture
def http(server):
    with server.http() as found:
        yield found
