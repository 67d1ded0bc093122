"""A folder of twenty mixed adapters, as somebody has it: one command makes a pool of it, and the next serves it."""

from __future__ import annotations

import json
import shutil

import httpx2
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import make_model
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.workflows.collect import by_reason
from server_command import running

pytest_plugins = ["cli_fixtures"]

QV = ("q_proj", "v_proj")
WEIGHTS = "adapter_model.safetensors"
TAKEN = {
    **{f"rank-{r}": LoraConfig(r=r, target_modules=[*QV]) for r in (1, 2, 4, 8)},
    "values": LoraConfig(r=4, target_modules=["v_proj"]),
    "attention": LoraConfig(r=4, target_modules=[*QV, "k_proj", "o_proj"]),
    "down": LoraConfig(r=2, target_modules=["down_proj"]),
    "patterns": LoraConfig(
        r=2, target_modules=[*QV], rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 3}
    ),
    "rslora": LoraConfig(r=4, target_modules=[*QV], use_rslora=True),
    "rslora-mlp": LoraConfig(r=2, target_modules=["up_proj", "down_proj"], use_rslora=True),
    "head": LoraConfig(r=2, target_modules=[*QV], modules_to_save=["lm_head"]),
    "dora": LoraConfig(r=2, target_modules=[*QV], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
"""What can be taken: thirteen."""
LEFT = {
    "pickle": "it has its weights in adapter_model.bin, a pickle",
    "broken": "adapter_model.safetensors is not a whole safetensors file",
    "stranger": "it is of another base, 'org/other'",
    "wider": "it has an update 32 → 64 at",
    "trained-head": "it brings its own lm_head.weight",
    "notes": "adapter_config.json does not exist",
    "log.txt": "it is not a folder",
}
"""What can't, and why: seven."""


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_model("llama", 0, 6).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """The folder, as PEFT writes what is in it."""
    folder = tmp_path_factory.mktemp("work") / "adapters"

    def put(name, config, seed, named=base):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "ia3_" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder / name)
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(named)}))
        return folder / name

    for seed, (name, config) in enumerate(TAKEN.items()):
        put(name, config, seed)
    plain = LoraConfig(r=2, target_modules=[*QV])
    pickled = put("pickle", plain, 20)
    torch.save(load_file(pickled / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    (put("broken", plain, 21) / WEIGHTS).write_bytes(b"half a file")
    put("stranger", plain, 22, named="org/other")
    wider = put("wider", plain, 23) / WEIGHTS
    save_file(
        {k: torch.cat([t, t]) if "lora_B" in k else t for k, t in load_file(wider).items()},
        wider,
        {"format": "pt"},
    )
    trained = put("trained-head", TAKEN["head"], 24) / WEIGHTS
    save_file({k: t + ("lm_head" in k) for k, t in load_file(trained).items()}, trained, {"format": "pt"})
    (folder / "notes").mkdir()
    (folder / "log.txt").write_text("step 1")
    return folder


@pytest.fixture
def made(run, adapters, tmp_path):
    """(the pool's folder, how its command ended)."""
    assert len([*adapters.iterdir()]) == 20
    return tmp_path / "mypool", run("pool", "create", tmp_path / "mypool", *sorted(adapters.iterdir()))


def asked(pool, prompt="the quick brown fox"):
    """What the served pool answers, and its models."""
    with running("serve", "--pool", pool) as address, httpx2.Client(base_url=address, timeout=60) as client:
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        body = {"model": "phatgoose", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], models


def test_what_goes_together_is_a_pool_and_the_rest_is_said(made, base):
    pool, result = made
    assert result.code == 0, result.err
    assert "13 experts; 13 of 20 were taken" in result.out
    for name, why in LEFT.items():
        assert f"{name}: {why}" in result.out
    assert "left out, 7" in result.out
    assert "11 LoRA of rank 1, 2, 4, 8" in result.out
    assert f"{base}; its fingerprint is recorded" in result.out
    assert f"phatgoose serve --pool {pool}" in result.out
    assert len(result.err.splitlines()) <= 2  # warnings by kind, and none of what the summary says
    loaded = Pool.load(pool)
    assert sorted(loaded.names) == sorted(TAKEN)
    assert loaded.base is not None
    assert loaded.base_spec == str(base)
    assert "samples" in read_manifest(pool)["base"]


@pytest.mark.slow(20)
def test_from_the_folder_to_an_answer_over_http(run, made):
    pool, _ = made
    text, models = asked(pool)
    assert set(TAKEN) <= {*models}
    said = run("generate", "the quick brown fox", "--pool", pool, "--max-new-tokens", 4)
    assert said.out.strip() == text.strip()
    assert "router: uniform (dora, ia3 have neither gates" in said.err
    assert run("pool", "remove", pool, "dora", "ia3").code == 0
    said = run("generate", "the quick brown fox", "--pool", pool, "--max-new-tokens", 4)
    assert "router: gander (of the routers that need no data" in said.err
    assert asked(pool)[0].strip() == said.out.strip()


def test_a_base_that_is_not_here_is_recorded_by_its_name_and_checked_when_it_is_used_first(
    run, made, base, adapters, tmp_path
):
    """The adapters name a folder of another machine; later it is there."""
    there = tmp_path / "elsewhere"
    for name in ("rank-1", "rank-2", "trained-head"):
        (tmp_path / "here" / name).mkdir(parents=True)
        for file in (adapters / name).iterdir():
            (tmp_path / "here" / name / file.name).write_bytes(file.read_bytes())
        path = tmp_path / "here" / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(there)}))
    pool = tmp_path / "pool"
    result = run("pool", "create", pool, *sorted((tmp_path / "here").iterdir()))
    assert result.code == 0, result.err
    assert read_manifest(pool)["base"] == {"spec": str(there)}
    assert "by its name alone" in result.out
    gone = run("generate", "red", "--pool", pool)
    assert gone.code == 1
    assert "is a folder of another machine, or was moved" in gone.err
    assert f"phatgoose pool base {pool} BASE" in gone.err
    there.symlink_to(base)
    refused = run(
        "generate", "red", "--pool", pool
    )  # the third's own head, which nobody could compare before
    assert refused.code == 1
    assert "'trained-head' brings its own lm_head.weight" in refused.err
    assert f"phatgoose pool remove {pool} NAME" in refused.err
    assert run("pool", "remove", pool, "trained-head").code == 0
    first = run("generate", "red", "--pool", pool, "--max-new-tokens", 2)
    assert first.code == 0, first.err
    assert "fingerprint is recorded" in first.err
    assert Pool.load(pool).base is not None
    assert "is recorded in" not in run("generate", "red", "--pool", pool, "--max-new-tokens", 2).err
    assert run("pool", "base", pool, base).code == 0
    assert Pool.load(pool).base_spec == str(base)


def test_names_that_are_the_same_everywhere_are_told_apart(run, adapters, tmp_path):
    for name in ("rank-1", "rank-2"):
        target = tmp_path / name / "final"
        target.mkdir(parents=True)
        for file in (adapters / name).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    result = run("pool", "create", tmp_path / "pool", *sorted(tmp_path.glob("*/final")))
    assert result.code == 0, result.err
    assert Pool.load(tmp_path / "pool").names == ("rank-1-final", "rank-2-final")
    again = run("pool", "create", tmp_path / "pool", adapters / "rank-1")
    assert (again.code, f"phatgoose pool add {tmp_path / 'pool'}" in again.err) == (1, True)


def test_a_pool_takes_only_adapters_of_its_base_later(run, made, adapters):
    pool, _ = made
    other = run("pool", "add", pool, adapters / "stranger")
    assert other.code == 1
    assert "it is of another base, 'org/other'" in other.err
    whole = run("pool", "add", pool, adapters / "stranger", "--any-base")
    assert whole.code == 0, whole.err
    assert "14 experts; 1 of 1 were taken" in whole.out


def test_a_base_that_is_there_when_adapters_are_added_is_recorded(run, adapters, base, tmp_path):
    """It was only named when the pool was made, and an emptied pool keeps it."""
    there = tmp_path / "elsewhere"
    for name in ("rank-1", "rank-2"):
        shutil.copytree(adapters / name, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(there)}))
    pool = tmp_path / "pool"
    assert run("pool", "create", pool, tmp_path / "rank-1").code == 0
    assert read_manifest(pool)["base"] == {"spec": str(there)}
    there.symlink_to(base)
    result = run("pool", "add", pool, tmp_path / "rank-2")
    assert (result.code, "its fingerprint is recorded" in result.out) == (0, True), result.err
    recorded = read_manifest(pool)["base"]
    assert (recorded["spec"], "samples" in recorded) == (str(there), True)
    assert run("pool", "remove", pool, "rank-1", "rank-2").code == 0
    assert run("pool", "add", pool, tmp_path / "rank-1").code == 0
    assert read_manifest(pool)["base"] == recorded


def test_a_damaged_record_of_the_base_is_mended_as_it_says(run, adapters, base, tmp_path):
    pool = tmp_path / "pool"
    assert run("pool", "create", pool, adapters / "rank-1").code == 0
    manifest = read_manifest(pool)
    (pool / "pool.json").write_text(json.dumps(manifest | {"base": {"bad": 1}}))
    refused = run("pool", "base", pool, base)
    assert (refused.code, "Make it null there, then say" in refused.err) == (1, True)
    (pool / "pool.json").write_text(json.dumps(manifest | {"base": None}))
    assert run("pool", "base", pool, base).code == 0
    assert read_manifest(pool)["base"] == manifest["base"]


@pytest.mark.parametrize("name", ["~nobody-here/model", "runs/first--try", "x" * 300])
def test_a_base_under_a_name_that_can_be_nowhere_is_recorded_as_it_is(run, adapters, tmp_path, name):
    shutil.copytree(adapters / "rank-1", tmp_path / "rank-1")
    path = tmp_path / "rank-1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    result = run("pool", "create", tmp_path / "pool", tmp_path / "rank-1")
    assert result.code == 0, result.err
    assert read_manifest(tmp_path / "pool")["base"] == {"spec": name}
    refused = run("generate", "red", "--pool", tmp_path / "pool")
    assert (refused.code, "the recorded base can't be loaded here" in refused.err) == (1, True)


def test_reasons_keep_their_words_whatever_the_adapters_are_called():
    left = {
        "a": "a/x.json has no data.",
        ".": "x.json is bad.",
        "r": "expert 'r' (r): adapter r is bad for it.",
    }
    assert by_reason(left) == ["a: x.json has no data.", ".: x.json is bad.", "r: adapter it is bad for it."]
