"""--check: what can be said of a recipe's data without fetching any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phatgoose.cli.main import app
from phatgoose.errors import DownloadError, PhatgooseError, StorageError, TaskError, UnknownName
from phatgoose.experts.pool import Pool
from phatgoose.tasks import load_task
from phatgoose.tasks.lists.named import POOLS, SUITES, pool_entries, suite
from phatgoose.tasks.load import check_task
from phatgoose.tasks.sources import promptsource
from phatgoose.tasks.sources.prompted import KNOWN_SPLITS, check_splits
from phatgoose.tasks.spec import split_spec
from phatgoose.workflows.experiment.check import check_data
from phatgoose.workflows.experiment.recipe import ExperimentRecipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    for name in ("PHATGOOSE_PROMPTSOURCE", "PHATGOOSE_BIGBENCH", "PHATGOOSE_BBH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.network
def test_the_papers_recipe_holds_in_full():
    """Every name, split and prompt of its 36 experts and three suites; only rows are left to the Hub."""
    from phatgoose.tasks.sources import bigbench_files

    try:
        promptsource.root()
        bigbench_files.root(None)
    except (DownloadError, StorageError) as cause:
        pytest.skip(f"promptsource and BIG-bench can't be had here: {cause}")
    found = check_data(ExperimentRecipe.read(RECIPES / "paper-t0-held-in.toml"))
    assert found.problems == {}
    assert set(found.unknown) == {"your own copies, without which they are left out", "the Hub"}
    held_in = {e.name: e.specs[0] for e in pool_entries("t0-held-in") if e.name != "trec"}
    assert len(held_in) == 35
    counts = {n: found.prompts[s] for n, s in held_in.items()}
    assert min(counts.values()) >= 2
    # As the paper's appendix and promptsource count them.
    assert (counts["wiki_qa"], counts["paws"], counts["adversarial_qa"], counts["imdb"]) == (5, 11, 5, 11)


def test_every_named_datasets_splits_are_known():
    specs = [s for p in POOLS for e in pool_entries(p) for s in e.specs]
    specs += [s for n in SUITES for e in suite(n).entries for s in e.specs]
    asked = {s for s in specs if s.startswith("prompted:")}
    assert all(check_splits(split_spec(s)) for s in asked)
    assert {s.removeprefix("prompted:").partition("?")[0] for s in asked} == set(KNOWN_SPLITS)


def test_splits_that_are_not_there_are_named():
    with pytest.raises(UnknownName, match="split of wiki_bio 'validation': known: test, train, val"):
        check_task("prompted:wiki_bio?test=validation")
    with pytest.raises(TaskError, match="anli has the splits train_r1, dev_r1"):
        check_task("prompted:anli")
    assert not check_splits(split_spec("prompted:wiki_bio?hub=me/wiki_bio&test=validation"))
    assert not check_splits(split_spec("prompted:another"))


@pytest.mark.parametrize(
    "spec", ["anli", "anli?test=dev", "wiki_bio?test=validation", "ag_news?test=validation"]
)
def test_files_in_a_folder_have_splits_of_their_own(tmp_path, spec):
    """As a run reads them, whatever splits the Hub's dataset has."""
    for name, split in (
        ("anli", "train"),
        ("anli", "dev"),
        ("wiki_bio", "validation"),
        ("ag_news", "validation"),
    ):
        rows = [
            json.dumps({"template": "t", "i": i, "prompt": f"p {i}", "completion": "yes"}) for i in range(20)
        ]
        (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(rows) + "\n")
    assert check_task(f"prompted:{spec}", tmp_path) in (
        None,
        "promptsource's prompts, which aren't in the cache",
    )
    with pytest.raises((UnknownName, TaskError)):
        check_task(f"prompted:{spec}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("flan:niv2/Translation", "flan:niv2/Translation is a category of Natural Instructions"),
        ("flan:nowhere", "should read flan:COLLECTION/TASK"),
        ("bbh:snarks?choises=x", "option of bbh: specs 'choises'"),
        ("bigbench:hyperbaton?foo=x", "option of bigbench: specs 'foo'"),
        ("hf:some/rows?inputt=x", "option of hf: specs 'inputt'"),
        ("jsonl:a.jsonl?inputt=x", "option of jsonl: specs 'inputt'"),
        ("p3:one?subset=x", "option of p3: specs 'subset'"),
        ("prompted:wiki_qa?rows=x", "rows must be a number"),
        ("hf:./rows", "rows does not exist"),
    ],
)
def test_a_look_finds_what_loading_would_stumble_on(spec, says, nothing_cached):
    for find in (check_task, load_task):
        with pytest.raises(PhatgooseError, match=says):
            find(spec)


@pytest.mark.parametrize(
    "spec", ["flan:flan2021/x", "p3:one", "prompted:piqa", "bbh:snarks", "jsonl:a.jsonl"]
)
def test_a_folder_is_looked_into(spec, tmp_path, nothing_cached):
    with pytest.raises(PhatgooseError):
        check_task(spec, tmp_path)
    row = '{"inputs": "a", "targets": "b"}\n'
    for name in ("flan2021_x.jsonl", "one.jsonl", "piqa.train.jsonl", "snarks.json", "a.jsonl"):
        (tmp_path / name).write_text(row)
    assert check_task(spec, tmp_path) in (None, "promptsource's prompts, which aren't in the cache")


def test_missing_rows_of_experts_that_are_there_end_no_run(tmp_path, make_base, make_expert, nothing_cached):
    Pool([make_expert(make_base("llama"), "upper")]).save(tmp_path / "pool")
    made = {
        "base": "b",
        "systems": ["base"],
        "pool": {"tasks": {"upper": "jsonl:nowhere.jsonl"}, "folder": str(tmp_path / "pool")},
        "measure": {"suites": ["bbh-cot-repo"]},
    }
    found = check_data(ExperimentRecipe.from_json(made))
    assert found.problems == {}
    assert ["upper"] in found.unknown.values()
    made["measure"] = {"suites": ["bbh-cot-repo", "in-pool"]}
    assert list(check_data(ExperimentRecipe.from_json(made)).problems) == ["upper"]


def test_without_anything_at_hand_it_says_what_it_does_not_know(nothing_cached):
    found = check_data(ExperimentRecipe.read(RECIPES / "paper-t0-held-in.toml"))
    assert found.problems == {}
    assert "cb" in found.unknown["promptsource's prompts, which aren't in the cache, and the Hub"]
    assert "navigate" in found.unknown["BIG-bench, which isn't in the cache"]
    assert "web_of_lies" in found.unknown["the Hub"]


def test_what_a_run_would_fail_at_is_told_now(nothing_cached, tmp_path, monkeypatch):
    task = tmp_path / "bigbench" / "there"
    task.mkdir(parents=True)
    (task / "task.json").write_text('{"examples": []}')
    monkeypatch.setenv("PHATGOOSE_BIGBENCH", str(tmp_path / "bigbench"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "r.toml").write_text(
        'base = "b"\nsystems = ["base"]\n[pool.tasks]\ngood = "bigbench:there"\ntypo = "bigbench:ther"\n'
        'gone = "jsonl:gone.jsonl"\nsplit = "prompted:wiki_bio?test=tset"\nhard = "bbh:snark"\n'
        'empty = "prompted:quail"\nhub = "hf:some/rows"\n[folders]\nempty = "rows"\n'
    )
    shown = CliRunner().invoke(app, ["experiment", str(tmp_path / "r.toml"), "--check"])
    assert shown.exit_code == 1
    said = " ".join(shown.output.split())
    for part in (
        "typo: unknown bigbench task 'ther': did you mean 'there'",
        "gone.jsonl does not exist",
        "split: unknown split of wiki_bio 'tset': did you mean 'test'",
        "hard: unknown bbh task 'snark': did you mean 'snarks'",
        "has no file quail.SPLIT.jsonl",
        "not checked: the Hub (hub)",
    ):
        assert part in said, said
    assert "good:" not in said
