"""`phatgoose gate --generated`, and pools without gates on the command line."""

from __future__ import annotations

import pytest

from phatgoose.experts.expert import Expert

pytest_plugins = ["cli_fixtures"]
SMALL = ["--steps", 2, "--rows-per-step", 4, "--rows-per-batch", 2, "--max-length", 64]
SMALL += ["--validate-every", 1, "--learning-rate", 0.05]
TEXTS = ["--generated", "--texts", 12, "--text-tokens", 10]


@pytest.mark.slow(3)
def test_gates_without_data(run, ready, base, tmp_path):
    folder, _ = ready
    out = tmp_path / "gated"
    made = run("gate", folder / "two", "--out", out, "--base", base, *TEXTS, *SMALL)
    assert made.code == 0, made.err
    assert "written" in made.err
    assert "usable" in made.err
    gated = Expert.load(out)
    source = gated.provenance["gate"]["task"]["source"]
    assert (source["source"], source["config"]["rows"], source["config"]["seed"]) == ("generated", 12, 0)
    assert not (tmp_path / "gated.work").exists()
    before = (out / "expert.json").stat()
    again = run("gate", folder / "two", "--out", out, "--base", base, *TEXTS, *SMALL)
    assert again.code == 0, again.err
    assert "finished before" in again.out
    assert (out / "expert.json").stat() == before
    for change in (["--temperature", 0.5], ["--seed", 3], ["--steps", 3]):
        other = run("gate", folder / "two", "--out", out, "--base", base, *TEXTS, *SMALL, *change)
        assert other.code == 1
        assert "--overwrite" in other.err


def test_prompts_come_from_a_file(run, ready, base, save_base, tmp_path):
    folder, _ = ready
    file = tmp_path / "prompts.txt"
    file.write_text("what is the colour?\\nAnswer:\n\n  number  \n")
    out = tmp_path / "gated"
    options = ["--base", base, *TEXTS, *SMALL]
    made = run("gate", folder / "two", "--out", out, *options, "--prompts", file)
    assert made.code == 0, made.err
    source = Expert.load(out).provenance["gate"]["task"]["source"]
    assert source["prompts"]["number"] == 2
    again = run("gate", folder / "two", "--out", out, *options, "--prompts", file)
    assert "finished before" in again.out
    from phatgoose.cli.contribute.gate import lines

    assert lines(file) == ("what is the colour?\nAnswer:", "number")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--task, or --generated"),
        (["--generated", "--task", "jsonl:x.jsonl"], "--task, or --generated"),
        (["--task", "jsonl:x.jsonl", "--temperature", "0.5"], "go with --generated"),
        (["--task", "jsonl:x.jsonl", "--prompts", "x"], "go with --generated"),
        (["--generated", "--limit-train", "3"], "--texts"),
    ],
)
def test_options_that_contradict_each_other(run, ready, base, options, said):
    folder, _ = ready
    result = run("gate", folder / "two", "--base", base, *options, *SMALL)
    assert result.code == 2
    assert said in " ".join(result.err.replace("│", " ").split())


def test_bad_prompts_and_settings(run, ready, base, tmp_path):
    folder, _ = ready
    (tmp_path / "empty.txt").write_text("\n \n")
    for options, said in (
        (["--prompts", tmp_path / "none.txt"], "can't be read"),
        (["--prompts", tmp_path / "empty.txt"], "has no prompts"),
        (["--temperature", "0"], "WritingConfig.temperature"),
    ):
        result = run("gate", folder / "two", "--base", base, *TEXTS, *SMALL, *options)
        assert result.code == 1
        assert said in result.err
    assert Expert.load(folder / "two").gates is None


@pytest.mark.parametrize(
    "router", ["phatgoose:ungated=weights", "arrow", "spectr:top_k=1", "lag:first=1", "weight-only"]
)
def test_a_pool_with_an_ungated_expert_answers(run, ready, base, tmp_path, router):
    folder, _ = ready
    pool = tmp_path / "pool"
    assert run("pool", "create", pool, folder / "one", folder / "two").code == 0
    options = ["--base", base, "--pool", pool, "--max-new-tokens", 2]
    assert run("generate", "red", *options, "--router", router).code == 0
    refused = run("generate", "red", *options, "--router", "phatgoose")
    assert refused.code == 1
    assert "expert 'two' has no gates" in refused.err
    assert "ungated=weights" in refused.err
