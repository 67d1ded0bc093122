"""What commands choose where the user says nothing: the pool's own base, and a router that the pool can use."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from cli_fixtures import SMALL

import architectures
from conftest import make_model
from phatgoose.cli.common import loading
from phatgoose.cli.common.options import DEFAULT_BASE, BaseOptions
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach import fitting
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.attach.fitting import fit_router
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import load_base
from phatgoose.tasks import load_task
from phatgoose.training.config import ExpertConfig
from phatgoose.workflows.contribute import contribution_key

pytest_plugins = ["cli_fixtures"]

PROMPT = ["what is the colour of red?", "--max-new-tokens", 2]


@pytest.fixture
def plain(ready, tmp_path):
    """plain(base_name, kind="lora") → two plain PEFT adapters in folders, whose configs name this base;
    no gates, no records."""
    import copy

    from peft import IA3Config, LoraConfig, get_peft_model

    def make(base_name, kind="lora"):
        folders = []
        for name in ("first", "second"):
            if kind == "lora":
                config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            else:
                config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
            folder = tmp_path / "plain" / name
            get_peft_model(copy.deepcopy(make_model("llama")), config).save_pretrained(folder)
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_name}))
            folders.append(folder)
        return folders

    return make


def following(result):
    """The words behind "or": the answer that the command says to ask for."""
    line = next(line for line in result.out.splitlines() if line.startswith("or "))
    return [w.replace("PROMPT", "red") for w in shlex.split(line.removeprefix("or "))][1:]


def test_the_base_that_the_pool_records_is_loaded(ready, run, base):
    _, out = ready
    words = following(out["pool"])
    assert "--base" not in words
    result = run(*words, "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert f"base: {base} (recorded in the pool); router: gander (" in result.err
    assert result.out == run(*words, "--base", base, "--max-new-tokens", 2).out


def test_an_empty_base_is_the_default_one_without_a_pool(monkeypatch):
    """As a script gives it whose variable isn't set."""
    asked = []
    monkeypatch.setattr(loading, "load", lambda spec, *_: asked.append(spec))
    for base in ("", None):
        loading.load_for(None, BaseOptions(base=base))
    assert asked == [DEFAULT_BASE] * 2


@pytest.mark.parametrize(
    "command", [["chat"], ["eval", "--limit", 1], ["explain", "red", "--max-new-tokens", 1]]
)
def test_every_command_with_a_pool_does(ready, run, task, base, command):
    more = ["--task", task] if command[0] == "eval" else []
    result = run(*command, *more, "--pool", ready[0] / "pool", input="")
    assert result.code == 0, result.err
    assert f"base: {base} (recorded in the pool); router: gander (" in result.err


def test_a_recorded_base_that_is_gone_is_named(ready, run, tmp_path, base):
    gone = tmp_path / "gone"
    shutil.copytree(base, gone)
    for name in ("one", "two-gated"):
        expert = Expert.load(ready[0] / name)
        record = {**expert.base.to_json(), "spec": str(gone)}
        replace(expert, provenance={**expert.provenance, "base": record}).save(tmp_path / name)
    assert run("pool", "create", tmp_path / "pool", tmp_path / "one", tmp_path / "two-gated").code == 0
    shutil.rmtree(gone)
    result = run("generate", *PROMPT, "--pool", tmp_path / "pool")
    assert result.code == 1
    assert "the recorded base can't be loaded here" in result.err
    assert str(gone) in result.err
    assert "--base" in result.err
    assert run("generate", *PROMPT, "--pool", tmp_path / "pool", "--base", base).code == 0


def test_plain_adapters_get_a_next_command_that_works(run, plain, base, tmp_path):
    made = run("pool", "create", tmp_path / "pool", *plain(base))
    assert made.code == 0, made.err
    result = run(*following(made), "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert "router: gander (" in result.err
    named = run("generate", *PROMPT, "--pool", tmp_path / "pool", "--router", "arrow")
    assert named.code == 0
    assert "router: arrow (--router)" in named.err
    nameless = run("generate", *PROMPT, "--pool", tmp_path / "pool", "--base", "")
    assert (nameless.code, "there is no base ''" in nameless.err) == (1, True)


@pytest.mark.parametrize("name", [None, ""])
def test_without_any_base_on_record_it_is_said_how_to_record_one(run, plain, base, tmp_path, name):
    made, record = (
        run("pool", "create", tmp_path / "pool", *plain(name)),
        f"phatgoose pool base {tmp_path / 'pool'} BASE",
    )
    assert made.code == 0, made.err
    assert any(line.split() == ["next", *record.split()] for line in made.out.splitlines())
    refused = run("generate", *PROMPT, "--pool", tmp_path / "pool")
    assert refused.code == 1
    assert "no expert names one" in refused.err
    assert record in refused.err
    assert run("generate", *PROMPT, "--pool", tmp_path / "pool", "--base", base).code == 0
    assert run("pool", "base", tmp_path / "pool", base).code == 0
    assert run("generate", *PROMPT, "--pool", tmp_path / "pool").code == 0


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_base_leaves_the_choice_to_the_others(run, plain, base, tmp_path, name):
    folders = plain(base)
    path = folders[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    made = run("pool", "create", tmp_path / "pool", *folders)
    assert made.code == 0, made.err
    result = run(*following(made), "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert f"base: {base} (recorded in the pool)" in result.err
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/other"}))
    refused = run("pool", "create", tmp_path / "two", *folders)
    assert (refused.code, "Say which with --base" in refused.err) == (1, True)
    one = run("pool", "create", tmp_path / "two", *folders, "--base", base)
    assert (one.code, "second: it is of another base, 'org/other'" in one.out) == (0, True)
    both = run("pool", "create", tmp_path / "three", *folders, "--base", base, "--any-base")
    assert (both.code, "2 of 2 were taken" in both.out) == (0, True)


def test_what_can_be_taken_of_many_folders_is_taken_and_the_rest_is_named(run, plain, base, tmp_path):
    first, second = plain(base)
    (tmp_path / "plain" / "log.txt").write_text("no expert")
    (tmp_path / "plain" / "empty").mkdir()
    damaged = tmp_path / "plain" / "damaged"
    shutil.copytree(second, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"half a file")
    everything = sorted((tmp_path / "plain").iterdir())
    made = run("pool", "create", tmp_path / "pool", *everything)
    assert made.code == 0, made.err
    assert "2 experts; 2 of 5 were taken" in made.out
    for name in ("log.txt", "empty", "damaged"):
        assert f"{name}: " in made.out
    assert run("pool", "remove", tmp_path / "pool", "second").code == 0
    added = run("pool", "add", tmp_path / "pool", second, damaged)
    assert (added.code, "left out, 1  damaged: " in added.out) == (0, True)
    for wrong in ([damaged, tmp_path / "plain" / "empty"], [first, tmp_path / "mistyped"], [damaged]):
        refused = run("pool", "create", tmp_path / "other", *wrong)
        assert refused.code == 1
        assert wrong[-1].name in refused.err
        assert not (tmp_path / "other").exists()


def test_adapters_that_no_weights_can_score_are_all_used(run, plain, base, tmp_path):
    assert run("pool", "create", tmp_path / "pool", *plain(base, "ia3")).code == 0
    result = run("generate", *PROMPT, "--pool", tmp_path / "pool")
    assert result.code == 0, result.err
    assert "router: uniform (first, second have neither gates" in result.err


def test_the_router_fits_what_the_pool_holds(ready, plain, base):
    """Each tuple: the experts, the router, words of the reason."""
    model = load_base(base)
    gated, bare = Expert.load(ready[0] / "one"), [Expert.from_peft(p) for p in plain("x")]
    scaled = [Expert.from_peft(p).renamed(f"scaled-{i}") for i, p in enumerate(plain("x", "ia3"))]
    zeros = {path: torch.zeros(48 if "down_proj" in path else 32) for path in scaled[0].sizes}
    told = scaled[0].with_gates(zeros)
    shallow = replace_layers(bare[0], "layers.0.")
    low = RouteOptions(device_memory="1GB")
    for experts, options, router, words in (
        ([gated], None, "gander", "highest published scores"),
        ([gated, *bare], None, "gander", "highest published scores"),
        ([gated, told], None, "gander", "highest published scores"),
        ([shallow, bare[1]], None, "lag", "expert 'first' adapts only blocks that Gander reads"),
        ([*bare, *scaled], None, "uniform", "scaled-0, scaled-1 have neither gates"),
        ([gated], low, "phatgoose", "--device-memory is for routers that choose by gates"),
        ([gated, *bare], low, "phatgoose:ungated=weights", "--device-memory"),
    ):
        fit = fit_router(model, Pool(experts), options)
        assert (fit.text, words in fit.why) == (router, True), fit
        assert routing_of(model) is None


def test_with_a_transformers_whose_caches_keep_nothing_it_goes_by_single_tokens(
    make_base, make_expert, monkeypatch
):
    base = make_base("llama")
    pool = Pool([make_expert(base, name, seed=i) for i, name in enumerate("ab")])
    assert fit_router(base, pool).text == "gander"
    monkeypatch.setattr(fitting, "DummyLayer", None)
    fit = fit_router(base, pool)
    assert (fit.text, "transformers before 5.23" in fit.why) == ("lag", True)


def replace_layers(expert, part):
    """The expert at the modules alone whose path has this part."""
    tensors = {key: t for key, t in expert.tensors.items() if part in key}
    return replace(expert, tensors=tensors, gates=None)


def test_where_tokens_cannot_be_told_the_router_goes_by_single_tokens(tokenizer, make_expert):
    """DeepSeek's kv_b_proj sees the cache again at each new token."""
    base = Base(architectures.make("deepseek_v2"), tokenizer, spec="tiny")
    targets = r".*(kv_b_proj|o_proj)"
    pool = Pool([make_expert(base, name, seed=i, targets=targets) for i, name in enumerate("ab")])
    fit = fit_router(base, pool)
    assert (fit.text, "sees the" in fit.why) == ("lag", True)


def test_an_expert_of_conversations_is_of_one_chat_template(run, save_base, tmp_path):
    """The same weights with another template make other prompts: what was trained through the first
    isn't "this very expert"."""
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    bases = [save_base("llama", 0, turns + ask), save_base("llama", 0, "~" + turns + ask)]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{split} {i}?"},
                {"role": "assistant", "content": "yes"},
            ],
            "split": split,
        }
        for split in ("train", "validation", "test")
        for i in range(8)
    ]
    path, out = tmp_path / "chat.jsonl", tmp_path / "expert"
    path.write_text("\n".join(map(json.dumps, rows)))
    codes = []
    for base in (bases[0], bases[0], bases[1]):
        found = run("train", "--task", f"jsonl:{path}", "--out", out, "--base", base, *SMALL)
        codes.append(found.code)
    assert codes == [0, 0, 1], found.err
    assert "another" in found.err
    keys = {
        contribution_key(load_base(base), load_task(f"jsonl:{path}"), ExpertConfig(), None) for base in bases
    }
    assert len(keys) == 2
