"""The pool that comes with the repository is the published experiment's: whole, of its recipe's tasks,
made as the recipe says."""

import json
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from phatgoose.cli.main import app
from phatgoose.experts.pool import Pool
from phatgoose.workflows import quickstart
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.quickstart import run_quickstart

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pool():
    return Pool.load(ROOT / "pools" / "bigbench-t0")


def test_it_holds_an_expert_with_gates_for_every_task_of_the_recipe(pool):
    recipe = ExperimentRecipe.read(ROOT / "recipes" / "bigbench-t0.toml")
    assert pool.names == tuple(entry.name for entry in recipe.pool_entries)
    for expert, entry in zip(pool.experts, recipe.pool_entries, strict=True):
        made = expert.provenance
        assert made["base"]["spec"] == recipe.base
        assert made["task"]["name"] == entry.name
        for asked, said in ((recipe.expert, made["config"]), (recipe.gate, made["gate"]["config"])):
            wanted = json.loads(json.dumps(asked.key()))
            assert {key: said.get(key) for key in wanted} == wanted
        assert expert.gates is not None
        assert expert.gates.keys() == expert.updates.keys()


def test_it_holds_no_row_of_anybodys_data(pool):
    """Weights, gates, and how they were made; no data signature, whose embeddings come from prompts."""
    assert all(expert.signature is None for expert in pool.experts)
    files = {path.name for path in (ROOT / "pools" / "bigbench-t0").rglob("*") if path.is_file()}
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
        "gates.safetensors",
        "README.md",
        "pool.json",
    }
    assert files - {".lock"} == expected


@pytest.mark.slow(4)
@pytest.mark.network
def test_it_answers_as_the_readme_says():
    asked = "Today I walk. Yesterday I\nAnswer:"
    shown = CliRunner().invoke(app, ["generate", "--pool", str(ROOT / "pools" / "bigbench-t0"), asked])
    assert shown.exit_code == 0, shown.output
    assert "walked" in shown.stdout


@pytest.mark.slow(20)
@pytest.mark.network
def test_the_quickstart_begins_with_answers_and_shows_them_once(monkeypatch, tmp_path):
    def experiment(recipe, out, **_):
        out.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run_experiment", experiment)
    shown = []
    for _ in range(2):  # the second run goes on where the first was stopped
        text = StringIO()
        with pytest.raises(KeyboardInterrupt):
            run_quickstart(tmp_path / "out", smoke=True, console=Console(file=text, width=200))
        shown.append([line.strip() for line in text.getvalue().splitlines()])
    answers = {prompt: expert.partition(";")[0] for prompt, expert in pairwise(shown[0])}
    assert not {"Today I sing. Yesterday I sang", *shown[0][:1]} & {*shown[1]}
    assert answers["Today I sing. Yesterday I sang"] == "expert: linguistic_past_tense"
    assert answers["The capital of Portugal is Lisbon"] == "expert: qa_wikidata"
    assert (
        answers["This is a mouse. Now there is another one. There are two mice"]
        == "expert: linguistic_plural"
    )
