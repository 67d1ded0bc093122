"""Neutral values, vLLM's parameters, and its routes between text and tokens; generate() with transformers' own
settings is the oracle."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from serving_fixtures import PROMPTS, running, settings
from transformers import GenerationConfig

from conftest import make_model, make_tokenizer
from phatgoose.models.base.base import Base
from phatgoose.serving.service import Service

pytest_plugins = ["serving_fixtures"]
ASK = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
CHAT = {
    "model": "base",
    "messages": [{"role": "user", "content": "the quick"}],
    "max_tokens": 6,
    "temperature": 0,
}
NEUTRAL = {
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "min_tokens": 0,
    "stop": "",
    "max_tokens": 12.0,
    "n": 1.0,
    "seed": 3.0,
    "echo": False,
    "logprobs": False,
    "stream": False,
    "stream_options": None,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "truncate_prompt_tokens": None,
    "logits_processors": [],
    "bad_words": [],
    "stop_token_ids": [],
    "allowed_token_ids": None,
    "prompt_logprobs": None,
    "include_stop_str_in_output": False,
    "tools": None,
    "spaces_between_special_tokens": True,
    "return_token_ids": False,
    "best_of": 1.0,
    "logit_bias": {},
    "priority": 0,
    "user": "me",
}


@pytest.fixture(scope="module")
def base(parts):
    return parts[0]


@pytest.fixture(scope="module")
def oracle():
    """A model of its own: the server's runs in another thread."""
    model, tokenizer = make_model("llama"), make_tokenizer()

    def generate(prompt=PROMPTS[0], new=12, **given):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        config = GenerationConfig(
            **{"do_sample": False, "max_new_tokens": new, "eos_token_id": 1, "pad_token_id": 0} | given
        )
        model.generation_config = config
        return model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()

    return generate


def asked(http, change, path="completions"):
    answer = http.post(f"/v1/{path}", json=(CHAT if path.startswith("chat") else ASK) | change)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(http, **change):
    (choice,) = asked(http, {"return_token_ids": True} | change)["choices"]
    return choice["token_ids"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_taken_and_change_nothing(http, name):
    plain = asked(http, {})["choices"]
    assert asked(http, {name: NEUTRAL[name]})["choices"] == plain
    if name != "best_of":  # which chats don't have
        value = 6.0 if name == "max_tokens" else NEUTRAL[name]
        chat = "chat/completions"
        assert asked(http, {name: value}, chat)["choices"] == asked(http, {}, chat)["choices"]


def test_neutral_values_of_chats_and_streams(http):
    plain = asked(http, {}, "chat/completions")["choices"]
    for name, value in (
        ("add_special_tokens", False),
        ("add_generation_prompt", True),
        ("chat_template_kwargs", {}),
        ("documents", None),
    ):
        assert asked(http, {name: value}, "chat/completions")["choices"] == plain
    empty = [{"role": "assistant", "content": None}, CHAT["messages"][0]]
    as_text = [{"role": "assistant", "content": ""}, CHAT["messages"][0]]
    first, second = (asked(http, {"messages": m}, "chat/completions")["choices"] for m in (empty, as_text))
    assert first == second
    for options, usage in (({"include_usage": None}, False), ({"include_usage": True}, True)):
        streamed = http.post("/v1/completions", json=ASK | {"stream": True, "stream_options": options}).text
        assert ('"total_tokens"' in streamed) == usage


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_usage_in_every_part_of_a_stream(http, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {"stream": True, "stream_options": options, "n": 2, "return_token_ids": True}
    lines = http.post(f"/v1/{path}", json=(CHAT if path.startswith("chat") else ASK) | ask).text.splitlines()
    *parts, last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    read, written = last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]
    for index in (0, 1):
        mine = [p for p in parts if p["choices"][0]["index"] == index]
        counts = [p["usage"]["completion_tokens"] for p in mine]
        assert {p["usage"]["prompt_tokens"] for p in mine} == {read}
        assert counts == sorted(counts)
        assert counts[-1] == sum(len(p["choices"][0]["token_ids"]) for p in mine)
        written -= counts[-1]
    assert written == 0


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"max_tokens": 4.5}, "max_tokens"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"top_k": -2}, "top_k"),
        ("completions", {"top_k": 2**70}, None),
        ("completions", {"min_p": 1.5}, "min_p"),
        ("completions", {"repetition_penalty": 0}, "repetition_penalty"),
        ("completions", {"min_tokens": 13}, "min_tokens"),
        ("completions", {"stop_token_ids": [320]}, "stop_token_ids"),
        ("completions", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("completions", {"allowed_token_ids": [320]}, "allowed_token_ids"),
        ("completions", {"bad_words": [""]}, "bad_words.0"),
        ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("completions", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("completions", {"skip_special_tokens": False}, "skip_special_tokens"),
        ("completions", {"add_special_tokens": False}, "add_special_tokens"),
        ("completions", {"use_beam_search": True}, "use_beam_search"),
        ("completions", {"guided_json": {}}, "guided_json"),
        ("chat/completions", {"echo": True}, "echo"),
        ("chat/completions", {"chat_template": "x"}, "chat_template"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0"),
    ],
)
def test_other_values_are_refused_by_name(http, path, change, param):
    body = (CHAT if path.startswith("chat") else ASK) | change
    found = http.post(f"/v1/{path}", json=body)
    if param is None:  # larger than any vocabulary: no bound
        assert found.status_code == 200
        return
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_parameters_are_generates(base, oracle, engine):
    plain = oracle(eos_token_id=[])
    ban = [plain[2]]
    cases = (
        ({"ignore_eos": True}, {"eos_token_id": []}),
        ({"repetition_penalty": 1.9}, {"repetition_penalty": 1.9}),
        ({"repetition_penalty": 1.9, "min_tokens": 9}, {"repetition_penalty": 1.9, "min_new_tokens": 9}),
        ({"stop_token_ids": [plain[4]]}, {"eos_token_id": [1, plain[4]]}),
        (
            {"stop_token_ids": [plain[4]], "min_tokens": 8},
            {"eos_token_id": [1, plain[4]], "min_new_tokens": 8},
        ),
        (
            {"allowed_token_ids": sorted({70, 71, 72, 90, *ban})},
            {"suppress_tokens": [i for i in range(320) if i not in {70, 71, 72, 90, *ban}]},
        ),
    )
    with (
        running(
            Service(Base(make_model("llama"), base.tokenizer, "tiny"), settings(engine=engine))
        ) as server,
        server.http() as http,
    ):
        found = [tokens(http, **ours) for ours, _ in cases]
        assert found == [oracle(**theirs) for _, theirs in cases]
        assert len({tuple(one) for one in found}) > 3
        assert tokens(http, top_k=1, temperature=1.5) == tokens(http)
        assert tokens(http, min_p=1.0, temperature=1.5) == tokens(http)
        assert plain[4] == tokens(http, stop_token_ids=[plain[4]])[-1]


def test_encoder_decoders_penalise_what_they_write(make_base):
    base = make_base("t5")
    ids = torch.tensor([base.tokenizer(PROMPTS[0])["input_ids"]])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
        repetition_penalty=1.7,
    )
    base.model.generation_config, kept = config, base.model.generation_config
    wanted = base.model.generate(ids, generation_config=config)[0, 1:].tolist()
    base.model.generation_config = kept
    with running(Service(base, settings())) as server, server.http() as http:
        assert tokens(http, repetition_penalty=1.7) == wanted
        refused = http.post("/v1/completions", json=ASK | {"prompt_logprobs": 1})
        assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_bad_words_are_banned_with_and_without_a_space(http, server):
    tokenizer = server.base.tokenizer
    ids = tokens(http, logit_bias={"261": 60})
    word = tokenizer.decode([261])
    assert word.strip() == word
    assert 261 in ids
    assert 261 not in tokens(http, logit_bias={"261": 60}, bad_words=[word])
    assert 261 not in tokens(http, logit_bias={"261": 60}, bad_words=[" " + word])


def test_stop_strings_are_looked_for_behind_min_tokens(http, server):
    ask = {"logit_bias": {"70": 100}, "stop": make_tokenizer().decode([70])}
    assert asked(http, ask)["choices"][0]["text"] == ""
    text = asked(http, ask | {"min_tokens": 5})["choices"][0]["text"]
    assert text == make_tokenizer().decode([70] * 5)


def test_the_prompts_log_probabilities_have_vllms_form(http, server, base):
    ids = base.tokenizer(PROMPTS[1])["input_ids"]
    choice = asked(http, {"prompt": PROMPTS[1], "prompt_logprobs": 2, "max_tokens": 0})["choices"][0]
    found = choice["prompt_logprobs"]
    assert found[0] is None
    assert choice["text"] == ""
    with torch.no_grad():
        wanted = torch.log_softmax(make_model("llama")(torch.tensor([ids])).logits[0].double(), -1)
    for place, (token, row) in enumerate(zip(ids[1:], found[1:], strict=True)):
        scores = wanted[place]
        assert next(iter(row)) == str(token)
        assert {int(i) for i in row} == {token, *scores.topk(2).indices.tolist()}
        for i, entry in row.items():
            assert entry["logprob"] == pytest.approx(float(scores[int(i)]), abs=1e-4)
            assert entry["rank"] == 1 + int((scores > scores[int(i)]).sum())
            assert entry["decoded_token"] == base.tokenizer.decode([int(i)])
    both = asked(
        http, {"prompt": PROMPTS[1], "prompt_logprobs": 2, "echo": True, "logprobs": 1, "max_tokens": 1}
    )
    rows = both["choices"][0]["prompt_logprobs"][1:]
    assert [list(row) for row in rows] == [list(row) for row in found[1:]]
    assert all(len(top) <= 2 for top in both["choices"][0]["logprobs"]["top_logprobs"] if top)
    chat = asked(http, {"prompt_logprobs": 0}, "chat/completions")
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat["choices"][0]


def test_token_ids_are_returned(http, server, base):
    client = server.client()
    ids = base.tokenizer(PROMPTS[0])["input_ids"]
    found = client.completions.create(**ASK, extra_body={"return_token_ids": True}).choices[0]
    assert found.prompt_token_ids == ids
    assert base.tokenizer.decode(found.token_ids, skip_special_tokens=True) == found.text
    parts = list(client.completions.create(**ASK, stream=True, extra_body={"return_token_ids": True}))
    assert parts[0].choices[0].prompt_token_ids == ids
    assert [t for p in parts for t in p.choices[0].token_ids] == found.token_ids
    chat = client.chat.completions.create(**CHAT, extra_body={"return_token_ids": True})
    wanted = base.tokenizer("user: the quick\nassistant:")["input_ids"]
    assert chat.prompt_token_ids == wanted
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens
    chunks = list(client.chat.completions.create(**CHAT, stream=True, extra_body={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == wanted
    assert [t for c in chunks for t in c.choices[0].token_ids] == chat.choices[0].token_ids


def test_text_to_tokens_and_back(http, base):
    ids = base.tokenizer(PROMPTS[0])["input_ids"]
    found = http.post("/tokenize", json={"prompt": PROMPTS[0], "return_token_strs": True}).json()
    assert found == {
        "count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": base.tokenizer.convert_ids_to_tokens(ids)
    }  # fmt: skip
    used = asked(http, {"return_token_ids": True})["choices"][0]
    assert used["prompt_token_ids"] == found["tokens"]
    chat = http.post("/tokenize", json={"messages": CHAT["messages"], "model": "a"}).json()
    assert chat["tokens"] == asked(http, {"return_token_ids": True}, "chat/completions")["prompt_token_ids"]
    neutral = {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template": None,
        "tools": [],
    }
    assert http.post("/tokenize", json={"messages": CHAT["messages"]} | neutral).json() == chat
    for change in ({"continue_final_message": True}, {"tools": [{}]}, {"add_generation_prompt": False}):
        refused = http.post("/tokenize", json={"messages": CHAT["messages"]} | change)
        assert refused.status_code == 400
        (name,) = change
        assert refused.json()["error"]["message"].startswith(f"{name} isn't supported: ")
    bare = http.post("/tokenize", json={"prompt": "the </s>", "add_special_tokens": False}).json()["tokens"]
    assert bare == base.tokenizer("the </s>", add_special_tokens=False)["input_ids"]
    assert http.post("/detokenize", json={"tokens": bare}).json() == {"prompt": base.tokenizer.decode(bare)}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for path, body, status in (
        ("tokenize", {}, 400), ("tokenize", {"prompt": "a", "messages": CHAT["messages"]}, 400),
        ("tokenize", {"prompt": "a" * 10**6}, 400),
        ("tokenize", {"prompt": "a", "model": "z"}, 404), ("detokenize", {"tokens": [320]}, 400),
        ("detokenize", {"tokens": [-1]}, 400),
        ("detokenize", {}, 400),
    ):  # fmt: skip
        assert http.post(f"/{path}", json=body).status_code == status


def test_where_every_token_is_ruled_out_it_is_said(server):
    with pytest.raises(openai.BadRequestError, match="rule out every token"):
        server.client().completions.create(**ASK, extra_body={"allowed_token_ids": [1], "min_tokens": 3})
