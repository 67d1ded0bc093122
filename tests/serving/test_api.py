"""The interface, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest
import torch
from pydantic import ValidationError
from serving_fixtures import PROMPTS, greedy, running, settings, text

from conftest import make_model, make_tokenizer
from phatgoose.models.attach.attach import route, unroute
from phatgoose.routers import PHATGOOSE, Single
from phatgoose.serving.api.errors import from_validation_errors
from phatgoose.serving.api.schema import ChatRequest, CompletionRequest
from phatgoose.serving.service import Service

pytest_plugins = ["serving_fixtures"]
MODELS = {"phatgoose": PHATGOOSE(), "base": None, "b": Single("b"), "phatgoose:top_k=1": PHATGOOSE(top_k=1)}
CHAT = "user: hello\nassistant:"


@pytest.fixture(scope="module")
def wanted(parts):
    """(model, prompt) → generate()'s greedy tokens, from before the server has the model."""
    base, pool = parts
    found = {}
    for model, router in MODELS.items():
        unroute(base) if router is None else route(base, pool, router)
        found |= {(model, prompt): greedy(base, prompt) for prompt in [*PROMPTS, CHAT]}
    unroute(base)
    return found


@pytest.fixture(scope="module")
def server(parts, wanted):
    base, pool = parts
    with running(Service(base, settings(), pool=pool)) as found:
        yield found


def test_completions_are_generates(server, client, wanted):
    for model in MODELS:
        found = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=12, temperature=0)
        tokens = wanted[model, PROMPTS[0]]
        assert found.choices[0].text == text(server.base, tokens)
        assert found.choices[0].finish_reason == ("stop" if tokens[-1] == 1 else "length")
        assert found.model == model
        read = len(server.base.tokenizer(PROMPTS[0])["input_ids"])
        usage = found.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (read, len(tokens))
        assert usage.total_tokens == read + len(tokens)


def test_many_clients_at_once_get_their_own_answers(server, wanted):
    async def ask(client, model, prompt):
        found = await client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
        return found.choices[0].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            pairs = [(m, p) for p in PROMPTS for m in MODELS]  # 32 different requests
            return pairs, await asyncio.gather(*(ask(client, *pair) for pair in pairs))

    pairs, found = asyncio.run(all_of_them())
    assert len(pairs) == 32
    assert found == [text(server.base, wanted[pair]) for pair in pairs]


def test_streams_add_up_to_the_whole(server, client, wanted):
    parts = list(
        client.completions.create(
            model="phatgoose",
            prompt=PROMPTS[0],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    tokens = wanted["phatgoose", PROMPTS[0]]
    assert "".join(p.choices[0].text for p in parts[:-1]) == text(server.base, tokens)
    assert [p.choices[0].finish_reason for p in parts[:-2]] == [None] * (len(parts) - 2)
    assert parts[-2].choices[0].finish_reason is not None
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == len(tokens)
    assert len(parts) > 3


def test_chat_goes_through_the_template(server, client, wanted):
    messages = [{"role": "user", "content": "hello"}]
    settings = {"model": "phatgoose", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    found = client.chat.completions.create(**settings)
    tokens = wanted["phatgoose", CHAT]
    assert found.choices[0].message.content == text(server.base, tokens)
    assert found.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**settings, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == text(server.base, tokens)
    assert parts[0].choices[0].delta.role == "assistant"
    rules = [{"role": "developer", "content": "be kind"}, *messages]
    asked = [rules, [{**rules[0], "role": "system"}, *messages]]
    told = [client.chat.completions.create(**settings | {"messages": m}) for m in asked]
    assert (
        len({t.choices[0].message.content for t in told}) == 1
    )  # the template knows no developer: they are the system
    pieces = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(**settings | {"messages": pieces})
    assert again.choices[0].message.content == found.choices[0].message.content


def test_without_a_model_the_pool_answers(server, wanted):
    with server.http() as http:
        found = http.post(
            "/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
        ).json()
    assert found["model"] == "phatgoose"
    assert found["choices"][0]["text"] == text(server.base, wanted["phatgoose", PROMPTS[0]])


def test_models_are_listed(client):
    names = [m.id for m in client.models.list()]
    assert names == ["phatgoose", "base", "a", "b", "c"]
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError, match="unknown model 'z'"):
        client.models.retrieve("z")


def test_stop_strings_cut_before_they_show(server, client, wanted):
    whole = text(server.base, wanted["base", PROMPTS[1]])
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    settings = {"model": "base", "prompt": PROMPTS[1], "temperature": 0, "max_tokens": 12}
    found = client.completions.create(**settings, stop=[stop, "never there"])
    assert found.choices[0].text == cut
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens <= 12
    parts = list(client.completions.create(**settings, stop=stop, stream=True))
    assert "".join(p.choices[0].text for p in parts) == cut
    never = client.completions.create(**settings, stop=["never there"])
    assert never.choices[0].text == whole


def test_n_and_seeds(client):
    settings = {"model": "phatgoose", "prompt": PROMPTS[0], "max_tokens": 10, "temperature": 1.5}
    one = [c.text for c in client.completions.create(**settings, n=3, seed=5).choices]
    assert one == [c.text for c in client.completions.create(**settings, n=3, seed=5).choices]
    assert one[:2] == [c.text for c in client.completions.create(**settings, n=2, seed=5).choices]
    assert len(set(one)) == 3
    assert one != [c.text for c in client.completions.create(**settings, n=3, seed=6).choices]
    streamed = ["", "", ""]
    for part in client.completions.create(**settings, n=3, seed=5, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.text
    assert streamed == one
    greedy_ones = client.completions.create(**settings | {"temperature": 0}, n=2).choices
    assert greedy_ones[0].text == greedy_ones[1].text


def test_several_prompts_as_text_and_as_tokens(server, client, wanted):
    asked = PROMPTS[:3]
    found = client.completions.create(model="b", prompt=asked, max_tokens=12, temperature=0, n=2)
    texts = [text(server.base, wanted["b", p]) for p in asked for _ in range(2)]
    assert [c.text for c in found.choices] == texts
    assert [c.index for c in found.choices] == list(range(6))
    ids = [server.base.tokenizer(p)["input_ids"] for p in asked]
    assert found.usage.prompt_tokens == sum(map(len, ids))
    as_ids = client.completions.create(model="b", prompt=ids, max_tokens=12, temperature=0)
    assert [c.text for c in as_ids.choices] == texts[::2]
    single = client.completions.create(model="b", prompt=ids[0], max_tokens=12, temperature=0)
    assert single.choices[0].text == texts[0]


def test_log_probabilities(server, client):
    ids = server.base.tokenizer(PROMPTS[0])["input_ids"]
    settings = {"model": "base", "temperature": 0}
    found = (
        client.completions.create(**settings, prompt=PROMPTS[0], max_tokens=4, logprobs=3).choices[0].logprobs
    )
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    chat = client.chat.completions.create(
        **settings,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.logprob == max(t.logprob for t in entry.top_logprobs)
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    echoed = client.completions.create(
        **settings, prompt=PROMPTS[0], max_tokens=1, logprobs=1, echo=True
    ).choices[0]
    assert echoed.text.startswith(PROMPTS[0])
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == len(ids) + 1
    assert "".join(echoed.logprobs.tokens[:-1]) == PROMPTS[0]
    for at, token in zip(echoed.logprobs.text_offset, echoed.logprobs.tokens, strict=True):
        assert echoed.text[at:].startswith(token) or "�" in token
    only = client.completions.create(
        **settings, prompt=PROMPTS[0], max_tokens=0, logprobs=1, echo=True
    ).choices[0]
    assert only.text == PROMPTS[0]
    assert only.logprobs.tokens == echoed.logprobs.tokens[:-1]
    assert only.logprobs.token_logprobs == pytest.approx(echoed.logprobs.token_logprobs[:-1], nan_ok=True)
    both = client.completions.create(**settings, prompt=PROMPTS[0], max_tokens=0, logprobs=1, echo=True, n=2)
    assert both.usage.completion_tokens == 0
    assert [c.logprobs.tokens for c in both.choices] == [only.logprobs.tokens] * 2
    assert both.choices[1].logprobs.token_logprobs == pytest.approx(only.logprobs.token_logprobs, nan_ok=True)
    parts = list(
        client.completions.create(**settings, prompt=PROMPTS[0], max_tokens=4, logprobs=3, stream=True)
    )
    tokens = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.tokens]
    assert tokens == found.tokens


@pytest.mark.parametrize("as_tokens", [True, False])
@pytest.mark.parametrize("prompt", ["🦢🦢 hello world", "ü\u200dé a", "the quick brown fox", "a</s>b 🦢"])
def test_offsets_are_where_tokens_begin_in_the_text(server, client, prompt, as_tokens):
    """Also of a character's second token and those behind it, and behind special tokens."""
    ids = server.base.tokenizer(prompt)["input_ids"]
    ask = {"model": "base", "prompt": ids if as_tokens else prompt, "temperature": 0, "max_tokens": 3}
    found = client.completions.create(**ask, logprobs=0, echo=True).choices[0]
    assert found.text.startswith(prompt)
    known = [server.base.tokenizer.decode(ids[:i]).rstrip("\ufffd") for i in range(len(ids) + 1)]
    assert found.logprobs.text_offset[: len(ids) + 1] == [len(text) for text in known]
    assert "".join(known)
    assert all(prompt.startswith(text) for text in known)


def test_an_echo_alone_ends_once(client):
    """Though a token was written, and shown in a piece before the last."""
    ask = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 0, "echo": True, "logit_bias": {"70": 100}}
    for logprobs in (None, 1):
        parts = [p.choices[0] for p in client.completions.create(**ask, stream=True, n=2, logprobs=logprobs)]
        for index in (0, 1):
            mine = [p for p in parts if p.index == index]
            assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + ["length"]
            assert len(mine) == 2
            assert "".join(p.text for p in mine) == PROMPTS[0]


def test_the_scores_of_an_echo_are_one_pass(server, parts, client):
    ids = server.base.tokenizer(PROMPTS[1])["input_ids"]
    found = client.completions.create(
        model="base", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    scores = found.choices[0].logprobs.token_logprobs[1:-1]
    model = make_model("llama")
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    assert scores == pytest.approx([float(wanted[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)


def test_penalties_and_bias_reach_the_draws(client):
    settings = {"model": "base", "prompt": "the", "max_tokens": 6, "temperature": 0}
    biased = client.completions.create(**settings, logit_bias={"66": 100})
    assert biased.choices[0].text == make_tokenizer().decode([66] * 6)
    varied = client.completions.create(**settings, logit_bias={"66": 100, "67": 99}, presence_penalty=2)
    assert varied.choices[0].text.startswith(make_tokenizer().decode([66, 67]))


def test_who_acted_is_returned_where_it_is_asked_for(client):
    ask = {
        "prompt": PROMPTS[0],
        "max_tokens": 5,
        "temperature": 0,
        "extra_body": {"phatgoose": {"experts": True}},
    }
    for model in ("phatgoose", "b", "base"):
        found = client.completions.create(model=model, **ask).choices[0].phatgoose["experts"]
        for phase in ("prompt", "answer"):
            shares = {one["name"]: one["share"] for one in found[phase]}
            if model == "base":
                assert shares == {}
            elif model == "b":
                assert shares == {"b": pytest.approx(1)}
            else:
                assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
                assert len(shares) == 3
                assert list(shares.values()) == sorted(shares.values(), reverse=True)
    last = list(client.completions.create(model="b", stream=True, **ask))[-1]
    assert last.choices[0].phatgoose["experts"]["answer"][0]["name"] == "b"
    plain = client.completions.create(model="b", prompt="x", max_tokens=2)
    assert not hasattr(plain.choices[0], "phatgoose")


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "z"}, 404, "unknown model 'z'"),
        ({"model": "phatgoose:top_k=0"}, 400, "top_k"),
        (
            {"model": "phatgoose:top_k=9223372036854775808"},
            400,
            "'phatgoose:top_k=9223372036854775808': top_k is '9223372036854775808', expected at most 2147483647",
        ),
        ({"model": f"soft-centroid:temperature={2**31}"}, 400, "expected at most 2147483647"),
        ({"model": "single:²"}, 404, "unknown expert '²'"),
        ({"model": f"single:{'9' * 200}"}, 404, "unknown expert"),
        ({"model": "single:99"}, 400, "there is no expert 99"),
        ({"model": "phatgoose:best=1"}, 400, "no setting 'best'"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": math.nan}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n:"),
        ({"n": 100}, 400, "100 answers are asked for"),
        ({"max_tokens": 5000}, 400, "at most 1024"),
        ({"max_tokens": 0}, 400, "with echo or prompt_logprobs only"),
        ({"prompt": [1] * 600, "max_tokens": 5}, 400, "maximum context length is 512 tokens"),
        ({"prompt": [1] * 512}, 400, "maximum context length is 512 tokens"),
        ({"prompt": ""}, 400, "no tokens"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, None]}, 400, "prompt.1: Input should be a valid integer."),
        ({"prompt": ["a", 1]}, 400, "prompt.1: Input should be a valid string."),
        ({"prompt": [[1], ["a"]]}, 400, "prompt.1.0: Input should be a valid integer."),
        ({"prompt": 5}, 400, "prompt: Input should be a valid string."),
        ({"stop": [""]}, 400, "stop.0: Value should have"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [320]}, 400, "no token 320"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "a\ud800"}, 400, "half of a character"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "token ids"),
        ({"logit_bias": {"9999": 1}}, 400, "no token 9999"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"best_of": 2}, 400, "best_of"),
        ({"suffix": "x"}, 400, "suffix isn't supported"),
        ({"tools": [{}]}, 400, "tools isn't supported"),
        ({"top_kk": 3}, 400, "unknown parameter 'top_kk'"),
        ({"a\ud800b": 3}, 400, "unicode"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"phatgoose": {"experts": 1}}, 400, "experts"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, change, status, says):
    body = {"model": "phatgoose", "prompt": "the", "max_tokens": 2} | change
    with server.http() as http:
        found = http.post(
            "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
    assert found.status_code == status, found.text
    assert says in found.json()["error"]["message"]


MANY = 50_000


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        (CompletionRequest, {"prompt": [*[1] * MANY, None]}, "prompt"),
        (CompletionRequest, {"prompt": [None] * MANY}, "prompt"),
        (CompletionRequest, {"prompt": ["a"] * MANY + [1]}, "prompt"),
        (CompletionRequest, {"prompt": [[1, None]] * MANY}, "prompt"),
        (
            CompletionRequest,
            {"prompt": "a", "user": "me"} | {f"x{i}": 1 for i in range(MANY)},
            "unknown parameter 'x0'",
        ),
        (
            CompletionRequest,
            {"prompt": "a", "logit_bias": {f"{i}": None for i in range(MANY)}},
            "logit_bias: it has 50000 entries",
        ),
        (CompletionRequest, {"prompt": "a", "stop": [None] * MANY}, "stop"),
        (ChatRequest, {"messages": [None] * 4000}, "messages"),
        (ChatRequest, {"messages": [{f"x{i}": 1 for i in range(90)}] * 4000}, "messages"),
        (ChatRequest, {"messages": [{"role": "user", "content": [None] * MANY}]}, "messages"),
    ],
)
def test_a_body_that_is_wrong_in_many_places_is_told_of_few(kind, body, says):
    """Each would be an object, made while nobody else is answered."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    found = refused.value.errors(include_url=False)
    assert len(found) <= 100
    assert says in from_validation_errors(list(found)).message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages.0.name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format isn't supported"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ],
)
def test_chats_that_cannot_be_honoured_are_refused_by_name(server, change, says):
    body = {"messages": [{"role": "user", "content": "hello"}]} | change
    with server.http() as http:
        found = http.post("/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert says in found.json()["error"]["message"]


def test_parameters_without_a_bearing_are_taken(client):
    found = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=2,
        user="me",
        store=False,
        metadata={"a": "b"},
        tools=[],
        response_format={"type": "text"},
        tool_choice="none",
        service_tier="auto",
    )
    assert found.usage.completion_tokens >= 1


def test_without_a_template_chat_is_refused(make_base):
    with running(Service(make_base("llama"), settings())) as server, server.http() as http:
        found = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
        assert found.status_code == 400
        assert "no chat template: use /v1/completions" in found.json()["error"]["message"]
        assert [m.id for m in server.client().models.list()] == ["base"]


def test_encoder_decoders_are_served(make_base, make_expert):
    from serving_fixtures import make_pool

    base = make_base("t5")
    pool = make_pool(base, make_expert)
    route(base, pool)
    tokens = greedy(base, PROMPTS[0])
    unroute(base)
    with running(Service(base, settings(), pool=pool)) as server, server.client() as client:
        ask = {"model": "phatgoose", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
        found = client.completions.create(**ask)
        assert found.choices[0].text == text(base, tokens)
        parts = list(client.completions.create(**ask, stream=True))
        assert "".join(p.choices[0].text for p in parts) == text(base, tokens)
        with pytest.raises(openai.BadRequestError, match="encoder–decoder"):
            client.completions.create(**ask, echo=True)
