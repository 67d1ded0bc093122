"""The way from a task to a conversation, each step by its command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from cli_fixtures import SMALL
from peft import PeftModel

from conftest import make_model
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool

pytest_plugins = ["cli_fixtures"]


def test_training_ends_with_an_expert_that_peft_loads(ready, base):
    folder, out = ready
    expert = Expert.load(folder / "one")
    assert expert.name == "one"
    assert expert.provenance["config"]["rank"] == 2
    assert expert.provenance["config"]["learning_rate"] == 0.05
    PeftModel.from_pretrained(make_model("llama"), folder / "one")
    assert not (folder / "one.work").exists()
    text = out["one"].out
    best = min(loss for _, loss in expert.provenance["validation_losses"])
    assert f"{best:.4f}" in text
    assert str(folder / "one") in text
    following = text.splitlines()[-1].partition("phatgoose ")[2]
    assert following.startswith(f"gate {folder / 'one'} --task")
    assert "--rows-per-step 4" in following
    assert "--steps" not in following
    assert "--rank" not in following


def test_gates_go_in_place_or_elsewhere(ready):
    folder, out = ready
    assert Expert.load(folder / "one").gates is not None
    assert Expert.load(folder / "two").gates is None
    gated = Expert.load(folder / "two-gated")
    assert gated.name == "two"
    assert gated.gates is not None
    assert any(bool(g.any()) for g in gated.gates.values())
    assert "pool create" in out["gate one"].out
    assert not (folder / "one.work").exists()
    assert not (folder / "two-gated.work").exists()


def test_the_same_training_again_says_that_it_is_done(ready, run, base, task):
    folder, _ = ready
    common = ["--task", task, "--base", base, *SMALL]
    before = (folder / "one" / "expert.json").stat()
    again = run("train", "--out", folder / "one", "--name", "one", "--rank", 2, *common)
    assert again.code == 0, again.err
    assert "finished before" in again.out
    again = run("gate", folder / "one", *common)
    assert again.code == 0, again.err
    assert "finished before" in again.out
    assert (folder / "one" / "expert.json").stat() == before


@pytest.mark.parametrize("change", [["--rank", 3], ["--seed", 5], ["--limit-train", 4], ["--name", "other"]])
def test_another_training_is_refused_where_an_expert_is(ready, run, base, task, change):
    folder, _ = ready
    before = (folder / "two" / "expert.json").read_bytes()
    given = {"--rank": 2, "--seed": 1, "--name": "two"} | {change[0]: change[1]}
    options = [x for pair in given.items() for x in pair]
    result = run("train", "--out", folder / "two", "--task", task, "--base", base, *SMALL, *options)
    assert result.code == 1
    assert "--overwrite" in result.err
    assert (folder / "two" / "expert.json").read_bytes() == before


def test_overwrite_replaces_and_a_work_folder_keeps_what_else_is_in_it(ready, run, base, task, tmp_path):
    folder, _ = ready
    Expert.load(folder / "two").save(tmp_path / "e")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine.txt").write_text("mine")
    options = ["--task", task, "--base", base, *SMALL, "--target-modules", "q_proj, v_proj"]
    result = run("train", "--out", tmp_path / "e", "--work", tmp_path / "w", *options, "--overwrite")
    assert result.code == 0, result.err
    expert = Expert.load(tmp_path / "e")
    assert expert.name == "e"
    assert {p.rpartition(".")[2] for p in expert.updates} == {"q_proj", "v_proj"}
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["mine.txt"]
    for name in ("adapter", "gate-training"):  # somebody's own, and another command's
        (tmp_path / "w" / name).mkdir()
        (tmp_path / "w" / name / "mine.txt").write_text("mine")
    result = run("train", "--out", tmp_path / "f", "--work", tmp_path / "w", *options)
    assert result.code == 1
    assert "adapter exists, and no training wrote it" in result.err
    (tmp_path / "w" / "adapter" / "mine.txt").unlink()
    (tmp_path / "w" / "adapter").rmdir()
    result = run("train", "--out", tmp_path / "f", "--work", tmp_path / "w", *options)
    assert result.code == 0, result.err
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["gate-training", "mine.txt"]


def test_what_came_to_an_expert_while_its_gates_were_trained_is_kept(
    ready, run, base, task, tmp_path, monkeypatch
):
    import phatgoose.training.gate as module

    options = ["--task", task, "--base", base, *SMALL]
    source = Expert.load(ready[0] / "one")
    place = replace(source, gates=None, provenance={}).save(tmp_path / "e")
    trained, others = module.train_gate, DataSignature(dict(source.gates), None, None, None)

    def meanwhile(change):
        def slowly(*args, **settings):
            gated = trained(*args, **settings)
            change(Expert.load(place)).save(place)
            return gated

        monkeypatch.setattr(module, "train_gate", slowly)
        return run("gate", place, *options)

    result = meanwhile(lambda e: e.with_signature(others, {"by": "another"}))
    assert result.code == 0, result.err
    made = Expert.load(place)
    assert made.gates is not None
    assert made.signature.equals(others)
    assert made.provenance["signature"] == {"by": "another"}
    assert made.base == source.base  # the gates' record says which, where the adapter's doesn't
    place = replace(source, gates=None).save(tmp_path / "g")
    result = meanwhile(lambda e: e.with_gates(source.gates, {"by": "another"}))
    assert result.code == 1
    assert "was changed while its gate was made" in result.err
    assert Expert.load(place).provenance["gate"] == {"by": "another"}
    assert (tmp_path / "g.work" / "gates").is_dir()


def test_a_folder_that_one_stands_in_is_not_replaced(ready, run, base, task, tmp_path, monkeypatch):
    place = Expert.load(ready[0] / "one").save(tmp_path / "e")
    monkeypatch.chdir(place)
    for command in (
        ["gate", ".", "--overwrite"],
        ["signature", ".."],
        ["train", "--out", ".", "--overwrite"],
    ):
        result = run(*command, "--task", task, "--base", base)
        assert result.code == 1
        assert "you are in it" in result.err


def test_training_goes_on_from_what_was_kept(run, base, task, tmp_path, monkeypatch):
    from phatgoose.experts.expert import Expert as Kind

    def killed(self, folder):
        raise KeyboardInterrupt

    options = ["train", "--out", tmp_path / "e", "--task", task, "--base", base, *SMALL, "--rank", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Kind, "save", killed)
        stopped = run(*options)
    assert stopped.code == 130
    assert "run the same command again to go on" in stopped.err
    assert (tmp_path / "e.work").is_dir()
    result = run(*options)
    assert result.code == 0, result.err
    assert "2/2" in stopped.err
    assert "2/2" not in result.err  # the training itself was finished
    assert (tmp_path / "e" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "e.work").exists()


def test_pool_list_add_remove(ready, run, tmp_path):
    folder, out = ready
    assert "2 experts; 2 of 2 were taken" in out["pool"].out
    Pool.load(folder / "pool").save(tmp_path / "pool")
    pool = tmp_path / "pool"
    added = run("pool", "add", pool, folder / "two", "--name", "three")
    assert added.code == 0, added.err
    assert "2 of 3 have them" in added.out
    assert "the same adapter twice" in added.err
    lines = run("pool", "list", pool).out.splitlines()
    assert lines[0].split() == [
        "name",
        "task",
        "rank",
        "modules",
        "parameters",
        "gates",
        "base",
        "validation",
        "loss",
    ]
    cells = [line.split() for line in lines[1:]]
    assert [c[0] for c in cells] == ["one", "two", "three"]
    assert [c[5] for c in cells] == ["yes", "yes", "no"]
    assert {c[1] for c in cells} == {"jsonl:colour"}
    assert {c[2] for c in cells} == {"2"}
    assert {c[3] for c in cells} == {"14"}
    assert cells[0][4] == f"{Expert.load(folder / 'one').parameters:,}"
    removed = run("pool", "remove", pool, "two", "three")
    assert removed.code == 0, removed.err
    assert Pool.load(pool).names == ("one",)


def test_pool_verify(ready, run, base):
    folder, _ = ready
    result = run("pool", "verify", folder / "pool", "--base", base)
    assert result.code == 0, result.err
    assert "2 experts" in result.out
    assert "is their base" in result.out
    assert result.err == ""


def test_eval_compares_routers_on_the_same_rows(ready, run, base, task, tmp_path):
    folder, _ = ready
    routers = [
        "base",
        "phatgoose:top_k=1",
        "single:two",
        "random:seed=3",
        "uniform",
        "merged",
        "ties:density=0.5",
    ]
    options = [x for name in routers for x in ("--router", name)]
    out = tmp_path / "scores.json"
    result = run(
        "eval",
        "--base",
        base,
        "--pool",
        folder / "pool",
        "--task",
        task,
        *options,
        "--limit",
        3,
        "--out",
        out,
    )
    assert result.code == 0, result.err
    head, row, *differences = result.out.splitlines()
    assert head.split() == ["task", "metric", "rows", *routers]
    assert row.startswith("jsonl:colour")
    assert len(differences) == 6
    data = json.loads(out.read_text())
    assert list(data["results"]) == routers
    assert data["complete"]
    assert data["results"]["single:two"]["router"] == {"router": "Single", "expert": "two"}
    assert data["results"]["merged"]["router"] == {"router": "merged"}
    assert data["results"]["ties:density=0.5"]["router"] == {"router": "ties:density=0.5"}
    scores = {name: r["scores"]["tasks"][0] for name, r in data["results"].items()}
    assert all(len(s["predictions"]) == 3 for s in scores.values())
    assert scores["uniform"]["predictions"] == scores["merged"]["predictions"]
    assert data["tasks"]["jsonl:colour"]["hash"] == scores["base"]["task_hash"]
    again = run("eval", "--base", base, "--task", task, "--out", out)
    assert again.code == 1
    assert "--overwrite" in again.err


def test_eval_measures_what_evaluate_measures(ready, run, base, task, tmp_path):
    from phatgoose import Gander, evaluate, load_base, load_task, route

    folder, _ = ready
    out = tmp_path / "scores.json"
    result = run(
        "eval", "--base", base, "--pool", folder / "pool", "--task", task, "--split", "train", "--out", out
    )
    assert result.code == 0, result.err
    model = load_base(base)
    route(model, Pool.load(folder / "pool"), Gander())
    expected = evaluate(model, load_task(task), split="train")
    found = json.loads(out.read_text())["results"]["gander"]["scores"]
    assert found["mean"] == expected.mean
    assert [p["text"] for p in found["tasks"][0]["predictions"]] == [
        p.text for p in expected.tasks[0].predictions
    ]


@pytest.mark.parametrize("router", ["phatgoose", "base"])
def test_generate_says_what_the_model_generates(ready, run, base, router):
    from phatgoose import load_base, route

    folder, _ = ready
    prompt = "what is the colour of red?\nAnswer:"
    options = ["--base", base, "--pool", folder / "pool", "--router", router, "--max-new-tokens", 12]
    found = run("generate", prompt, *options)
    assert found.code == 0, found.err
    assert run("generate", "-", *options, input=prompt + "\n").out == found.out
    model = load_base(base)
    if router != "base":
        route(model, Pool.load(folder / "pool"))
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        new = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    text = model.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.out == text.lstrip() + "\n"


def test_a_temperature_draws_by_the_seed(run, base):
    def draw(seed):
        options = ["--base", base, "--temperature", 5, "--seed", seed, "--max-new-tokens", 12]
        return run("generate", "the colour", *options).out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generate_with_an_encoder_decoder(run, save_base):
    result = run("generate", "the colour of red", "--base", save_base("t5"), "--max-new-tokens", 4)
    assert result.code == 0, result.err


def test_a_full_context_is_said(run, base):
    result = run("generate", "red " * 600, "--base", base, "--max-new-tokens", 4)
    assert result.code == 1
    assert "context 512" in result.err


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def test_chat_piped(ready, run, base):
    folder, _ = ready
    typed = (
        "/router\nhello\\nthere\n/router sing:one\n/router single:too\n/router single:two\n"
        "/base\n/rest\n/reset\n/help\n"
    )
    result = run("chat", "--base", base, "--pool", folder / "pool", "--max-new-tokens", 3, input=typed)
    assert result.code == 0, result.err  # the input's end is the conversation's
    assert "raw prompts" in result.err
    assert "router: gander; experts: one, two" in result.out
    assert "did you mean 'single'" in result.err
    assert "did you mean 'two'" in result.err
    assert "did you mean '/reset'" in result.err
    assert "router: single:two" in result.err
    assert "router: base" in result.err
    assert "forgotten" in result.err
    assert "/quit" in result.out
    assert ">" not in result.out  # no prompt for a pipe
    answer = run(
        "generate", "hello\nthere", "--base", base, "--pool", folder / "pool", "--max-new-tokens", 3
    ).out
    assert answer in result.out


def test_chat_remembers_through_the_template_until_reset(run, save_base):
    base = save_base("llama", 7, TEMPLATE)
    options = ["--base", base, "--max-new-tokens", 3]
    chat = run("chat", *options, input="red\nblue\n/reset\nred\n/quit\nnever\n")
    assert chat.code == 0, chat.err
    first, second, third = chat.out.splitlines()
    assert first == third
    assert run("generate", "red", "--chat", *options).out == first + "\n"
    whole = f"user: red\nassistant: {first}\nuser: blue\nassistant:"
    assert run("generate", whole, *options).out == second + "\n"
    raw = run("chat", "--raw", *options, input="red\n")
    assert raw.out == run("generate", "red", *options).out


def test_prompts_are_given_as_the_experts_were_trained(ready, run, save_base):
    """They were trained on plain rows, which the pool records: a template around a prompt takes them off it."""
    folder, _ = ready
    options = ["--base", save_base("llama", 0, TEMPLATE), "--pool", folder / "pool", "--max-new-tokens", 3]
    chat = run("chat", *options, input="red\n")
    assert "raw prompts" in chat.err
    assert "without the chat template" in chat.err
    assert chat.out == run("generate", "red", *options).out
    asked = run("chat", "--chat", *options, input="red\n")
    assert "note: trained on prompts without the chat template" in asked.err
    assert ": one, two." in asked.err
    assert asked.out == run("generate", "red", "--chat", *options).out
    assert "note: trained on prompts" in run("generate", "red", "--chat", *options).err


def test_gates_differ_from_zero_in_the_file(ready):
    folder, _ = ready
    gates = safetensors.torch.load_file(folder / "pool" / "experts" / "one" / "gates.safetensors")
    assert len(gates) == 14
