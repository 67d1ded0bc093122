"""No client keeps the others waiting: long prompts, and answers with many log-probabilities."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_fixtures import running, settings, with_template

from phatgoose.serving import requests
from phatgoose.serving.http import completions as answers
from phatgoose.serving.requests import LONG, Prompts
from phatgoose.serving.service import Service

WORD = "a" * 1_500_000


@pytest.fixture
def base(make_base):
    return with_template(make_base("llama"))


@pytest.mark.slow(9)
@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/completions", {"prompt": WORD}),
        ("/v1/completions", {"prompt": ["the", WORD]}),
        ("/v1/completions", {"prompt": "-" * 1_500_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORD}]}),
    ],
)
def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(base, monkeypatch, path, ask):
    read = []
    for name in ("_encode", "_encode_chat"):
        monkeypatch.setattr(Prompts, name, lambda self, given: read.append(given) or [5])
    with running(Service(base, settings())) as server, server.http() as http:
        refused = http.post(path, json=ask)
        assert refused.status_code == 400
        said = refused.json()["error"]
        assert said["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 512 tokens" in said["message"]
        assert said["param"] in ("prompt", "messages")
        assert all(len(text) < 10 for text in read)


def test_the_bound_on_a_texts_length_refuses_nothing_that_fits(base):
    prompts = Prompts(base, 100)
    longest, letters = prompts.longest_token
    tokens = [t for t in base.tokenizer.get_vocab() if t not in base.tokenizer.all_special_tokens]
    assert longest >= max(map(len, tokens))
    word = max(tokens, key=len)
    for text in (word * 100, "a" * 100 * letters, "é" * 50):
        prompts.check_length(text, "prompt")


def test_an_encoder_decoders_prompt_is_bounded(make_base):
    with running(Service(make_base("t5"), settings(max_prompt_tokens=40))) as server, server.http() as http:
        for prompt, status in (([5] * 40, 200), ([5] * 41, 400), ("a b " * 200, 400), (WORD, 400)):
            found = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
            assert found.status_code == status
            if status == 400:
                assert "maximum context length is 40 tokens" in found.json()["error"]["message"]


@pytest.mark.slow(4)
def test_short_prompts_do_not_wait_for_long_ones(base, monkeypatch):
    begun, go_on, encode = threading.Event(), threading.Event(), Prompts._encode

    def slowly(self, text):
        if len(text) >= LONG:
            begun.set()
            assert self.tokenizer is not base.tokenizer  # which the others' thread uses meanwhile
            assert go_on.wait(60)
        return encode(self, text)

    monkeypatch.setattr(Prompts, "_encode", slowly)
    monkeypatch.setattr(Prompts, "check_length", lambda *_: None)
    with (
        running(Service(base, settings())) as server,
        server.http() as http,
        ThreadPoolExecutor(3) as threads,
    ):

        def ask(prompt):
            with server.http() as own:
                return own.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}).status_code

        long = [threads.submit(ask, "the " * LONG) for _ in range(3)]
        try:
            assert begun.wait(30)
            assert http.post("/v1/completions", json={"prompt": "the", "max_tokens": 2}).status_code == 200
            assert not any(one.done() for one in long)
        finally:
            go_on.set()
        assert [one.result() for one in long] == [400] * 3


@pytest.mark.slow(8)
@pytest.mark.parametrize("stream", [True, False])
def test_others_are_answered_while_many_log_probabilities_are_written(base, monkeypatch, stream):
    """The event loop writes few of them itself."""
    monkeypatch.setattr(answers, "MAX_ON_LOOP", 50)
    threads = set()

    def noted(make):
        def called(*given, **more):
            threads.add(threading.current_thread().name)
            return make(*given, **more)

        return called

    for name in ("_whole_body", "_chunk"):
        monkeypatch.setattr(answers, name, noted(getattr(answers, name)))
    with running(Service(base, settings())) as server, server.http() as http:
        loop = next(t.name for t in threading.enumerate() if t.name.startswith("Thread-"))
        ask = {
            "prompt": [[5] * 100, [6] * 90],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 5,
            "stream": stream,
        }
        found = http.post("/v1/completions", json=ask)
        assert found.status_code == 200
        assert any(name.startswith("phatgoose-once") for name in threads)
        if not stream:
            assert loop not in threads
            rows = [c["logprobs"] for c in found.json()["choices"]]
            assert [len(row["tokens"]) for row in rows] == [100, 90]
            assert found.json()["usage"]["prompt_tokens"] == 190


@pytest.mark.slow(4)
def test_more_log_probabilities_than_a_response_may_have_are_refused(base, monkeypatch):
    monkeypatch.setattr(requests, "MAX_REPORTED", 1000)
    with running(Service(base, settings())) as server, server.http() as http:
        many = {"prompt": [[5] * 100] * 2, "max_tokens": 0, "echo": True, "logprobs": 5}
        found = http.post("/v1/completions", json=many).json()["error"]
        assert found["param"] == "logprobs"
        assert "at most 1000 are reported" in found["message"]
        assert http.post("/v1/completions", json=many | {"prompt": [5] * 100}).status_code == 200
        chat = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 200, "logprobs": True}
        refused = http.post("/v1/chat/completions", json=chat | {"top_logprobs": 10})
        assert refused.status_code == 400
        assert http.post("/v1/chat/completions", json=chat | {"top_logprobs": 2}).status_code == 200


def test_a_prompt_without_characters_is_placed_in_time(base):
    """Bytes that never make a character were decoded again with every token that followed."""
    unfinished = next(i for i in range(len(base.tokenizer)) if base.tokenizer.decode([i]) == "\ufffd")
    with running(Service(base, settings())) as server, server.http() as http:
        for token in (unfinished, base.tokenizer.eos_token_id):
            ask = {"prompt": [token] * 500, "max_tokens": 0, "echo": True, "logprobs": 0}
            began = time.monotonic()
            found = http.post("/v1/completions", json=ask).json()["choices"][0]
            assert time.monotonic() - began < 10
            assert len(found["logprobs"]["text_offset"]) == 500
            assert found["logprobs"]["text_offset"][-1] <= len(found["text"])
