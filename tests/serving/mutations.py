"""Requests that are nearly right: valid ones, changed at random."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

VALID = [
    (
        "POST",
        "/v1/completions",
        {"model": "phatgoose", "prompt": "the quick", "max_tokens": 3, "temperature": 0},
    ),
    (
        "POST",
        "/v1/completions",
        {"prompt": ["a", "b"], "n": 2, "stop": ["x"], "seed": 4, "stream": True, "max_tokens": 2},
    ),
    ("POST", "/v1/completions", {"prompt": [[5, 6], [7]], "logprobs": 2, "echo": True, "max_tokens": 0}),
    (
        "POST",
        "/v1/completions",
        {"model": "uniform", "prompt": "a", "logit_bias": {"5": 1.5}, "presence_penalty": 1, "max_tokens": 2},
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "a",
            "messages": [
                {"role": "system", "content": "b"},
                {"role": "user", "content": [{"type": "text", "text": "c"}]},
            ],
            "max_completion_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "phatgoose": {"experts": True},
            "top_p": 0.5,
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "c"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "POST",
        "/v1/completions",
        {
            "prompt": ["a", "b"],
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 1,
            "stop_token_ids": [5],
            "max_tokens": 3,
            "bad_words": ["the"],
            "allowed_token_ids": [5, 6, 7],
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
        },
    ),
    ("POST", "/tokenize", {"prompt": "a b", "return_token_strs": True, "add_special_tokens": False}),
    ("POST", "/tokenize", {"model": "a", "messages": [{"role": "user", "content": "c"}]}),
    ("POST", "/detokenize", {"tokens": [5, 6]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/a", None),
    ("GET", "/metrics", None),
    ("GET", "/admin/experts", None),
    ("POST", "/admin/experts", {"folder": "/nowhere", "name": "z"}),
    ("POST", "/admin/experts/nobody/off", None),
    ("DELETE", "/admin/experts/nobody", None),
]
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    1e308,
    -0.0,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x00",
    "\ud800",
    "‮é😀",
    "a" * 3000,
    "{{ 7*7 }}",
    "../..",
    [],
    [[]],
    [None],
    [0] * 700,
    {},
    {"a": {}},
    {"__class__": 1},
    "phatgoose:top_k=99999999",
    "base",
    "single:0",
    "single:99",
    "random:seed=-1",
    "arrow:",
    ":",
    "1e5",
    "99999999999999999999",
]


@dataclass
class Mutated:
    """One request as it is sent."""

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str] = field(default_factory=dict)


def mutated(source: random.Random) -> Mutated:
    """A valid request with one to four changes to its values, its bytes, or what is around them."""
    method, path, body = copy.deepcopy(source.choice(VALID))
    headers = {"content-type": "application/json", "authorization": "Bearer the-admin-key"}
    for _ in range(source.randint(1, 4)):
        if body is not None and source.random() < 0.8:
            body = _value(source, body)
        elif source.random() < 0.5:
            method = source.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
        elif source.random() < 0.5:
            path += source.choice(["/", "/x", "?a=b", "%00", "%2e%2e", "%ff", "//", "/%ed%a0%80"])
        else:
            headers[source.choice([*headers, "content-length", "x-request-id", "accept", "expect"])] = (
                source.choice(
                    [
                        "",
                        "a",
                        "application/json; charset=x",
                        "text/plain",
                        "Bearer",
                        "99999",
                        "-1",
                        "é".encode().decode("latin-1"),
                    ]
                )
            )
    data = None if body is None else json.dumps(body).encode()
    if data and source.random() < 0.3:
        data = _bytes(source, data)
    return Mutated(method, path, data, headers)


def _value(source: random.Random, value: Any) -> Any:
    """The value with something in it replaced, left out, repeated, wrapped or renamed."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(list(value))
        match source.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[
                    source.choice(
                        ["x", "", "a\ud800", "tools", "suffix", "user", "top_logprobs", "stream", "n"]
                    )
                ] = _odd(source)
            case 2:
                value[key.upper()] = value.pop(key)
            case _:
                value[key] = _value(source, value[key])
        return value
    if isinstance(value, list) and value and source.random() < 0.7:
        place = source.randrange(len(value))
        if source.random() < 0.3:
            return value * source.choice([2, 3, 90])
        value[place] = _value(source, value[place])
        return value
    return _odd(source, [value], {"a": value})


def _odd(source: random.Random, *more: Any) -> Any:
    return copy.deepcopy(source.choice([*more, *ODD]))  # since it may be changed again


def _bytes(source: random.Random, data: bytes) -> bytes:
    place = source.randrange(len(data))
    match source.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([source.randrange(256)]) + data[place + 1 :]
        case 2:
            return (
                data[:place]
                + source.choice([b"[" * 2000, b"\xff\xfe", b"\x00", b"NaN", b"1" * 5000, b'"\\ud800"'])
                + data[place:]
            )
        case 3:
            return data + data
        case _:
            return data[place:]
