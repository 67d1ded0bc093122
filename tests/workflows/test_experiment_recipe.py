"""Recipes: every setting checked by name and type, the shipped ones whole, the paper's T0 recipe in full."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from phatgoose.errors import ExpertError, RoutingError, TaskError, TrainingError, UnknownName
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.merge import dare, ties
from phatgoose.experts.pool import Pool
from phatgoose.tasks.spec import split_spec
from phatgoose.workflows.experiment.recipe import ExperimentRecipe, RecipeError, without_own_copies
from phatgoose.workflows.experiment.systems import build, check_system, expanded, padded
from phatgoose.workflows.quickstart import quickstart_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SMALL = {"base": "b", "pool": {"tasks": {"a": "jsonl:a.jsonl"}}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_survive_json(path):
    recipe = ExperimentRecipe.read(path)
    assert recipe.pool_entries
    assert ExperimentRecipe.from_json(recipe.to_json()) == recipe


def test_the_papers_recipe_is_complete():
    recipe = ExperimentRecipe.read(next(p for p in RECIPES if p.stem == "paper-t0-held-in"))
    assert len(recipe.pool_entries) == 36
    assert [(s.name, len(s.entries)) for s in recipe.suites] == [("t0ho", 11), ("bbh", 23), ("bbl", 24)]
    assert (recipe.expert.steps, recipe.expert.rows_per_step, recipe.expert.rank, recipe.expert.alpha) == (
        1000,
        1024,
        16,
        1,
    )
    assert (recipe.gate.steps, recipe.gate.learning_rate, recipe.expert.learning_rate) == (100, 5e-3, 5e-3)
    named = {split_spec(e.specs[0]).options.get("test") for e in recipe.pool_entries}
    assert named == {"validation", "test", "val", None}
    t0ho = without_own_copies(recipe, recipe.suites[0])
    assert t0ho[1] == ("story_cloze",)
    assert len(t0ho[0].entries) == 10


def test_the_published_recipe_trains_at_least_24_experts_of_both_pools_and_measures_every_suite():
    recipe = ExperimentRecipe.read(next(p for p in RECIPES if p.stem == "bigbench-t0"))
    groups = [recipe.group_of(e.name) for e in recipe.pool_entries]
    assert (groups.count("bigbench"), groups.count("t0-held-in")) == (15, 9)
    assert [s.name for s in recipe.suites] == ["in-pool", "t0ho", "bbh", "bbl"]
    assert recipe.measure.test_rows == 100


def test_the_seeds_recipe_asks_for_the_rows_of_the_published_one():
    """So that its scores of base, PHATGOOSE and the first seed are the published ones."""
    recipes = {p.stem: p for p in RECIPES}
    published, seeds = (ExperimentRecipe.read(recipes[n]) for n in ("bigbench-t0", "bigbench-t0-seeds"))
    assert replace(seeds.pool, folder="") == published.pool
    assert len(read_manifest(Path(seeds.pool.folder))["experts"]) == 24  # so that nothing is trained
    assert (seeds.base, seeds.dtype) == (published.base, published.dtype)
    for setting in ("test_rows", "choice_rows", "backend"):
        assert getattr(seeds.measure, setting) == getattr(published.measure, setting)


def test_the_recipes_of_sisters_train_and_measure_alike():
    recipes = {p.stem: ExperimentRecipe.read(p) for p in RECIPES if p.stem.startswith("sisters")}
    one, other, own = recipes["sisters"], recipes["sisters-gemma"], recipes["sisters-own"]
    assert replace(other, base=one.base) == one
    assert [len(s.entries) for s in one.suites] == [37, 31]
    assert (own.base, own.dtype, own.expert) == (one.base, one.dtype, one.expert)
    assert own.pool.admit_rows == one.pool.admit_rows == 200
    assert own.measure.test_rows == one.measure.test_rows == 300
    assert (
        own.pool.train_rows == one.pool.train_rows
    )  # or its experts would have seen other rows, and be refused
    assert (one.measure.admit_rows, one.measure.admit_own_gain, one.measure.admit_sister_gain) == (
        200,
        0.10,
        0.04,
    )
    assert one.measure.measures == ("auc", "centred-accuracy", "accuracy", "rougeL")
    # The ceilings see none of the rows that the suite measures: both load a task with the same splits.
    for entry in own.pool_entries:
        options = split_spec(entry.specs[0]).options
        assert entry.fractions or "test" in options or entry.name in OWN_SPLITS, entry.name


OWN_SPLITS = (
    "tweet_sentiment",
    "tweet_emotion",
    "tweet_hate",
    "banking77",
    "snips",
    "query_wellformedness",
    "liar",
)
"""Tasks of the suite sisters whose datasets have a test split on the Hub."""


def test_story_cloze_is_measured_where_its_owners_copy_is(tmp_path):
    (tmp_path / "story_cloze.test.jsonl").write_text("")
    recipe = ExperimentRecipe.from_json(
        {**SMALL, "measure": {"suites": ["t0ho"]}, "folders": {"t0ho": str(tmp_path)}}
    )
    assert without_own_copies(recipe, recipe.suites[0])[1] == ()
    alone = replace(recipe, folders={"story_cloze": str(tmp_path)})  # the other tasks are fetched
    kept, missing = without_own_copies(alone, alone.suites[0])
    assert missing == ()
    assert len(kept.entries) == 11


def test_the_quickstart_suite_is_the_quickstarts():
    recipe = ExperimentRecipe.from_json({**SMALL, "measure": {"suites": ["quickstart"]}})
    assert tuple(e.specs[0] for e in recipe.suites[0].entries) == tuple(
        quickstart_recipe().measure.tasks.values()
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"measure": {"tasks": {"b": "jsonl:b.jsonl"}}},
            RecipeError,
            "tasks are the suite unseen, which isn't among the suites",
        ),
        ({"folders": {"t0h": "x"}}, UnknownName, "folder 't0h': did you mean 't0ho'"),
        (
            {"pool": {"tasks": {"ld": "bigbench:logical_deduction/three_objects"}}, "measure": {"suites": ["bbh"]}},
            TaskError,
            r"ld \(bigbench/logical_deduction/three_objects\)",
        ),
        ({"systems": ["padded:²"]}, RoutingError, "padded:N"),
        ({"systems": ["padded:2,"]}, RoutingError, "'padded:2,': a setting is empty"),
        ({"systems": ["padded:2,sed=1"]}, RoutingError, "padded has no setting 'sed'; it has: seed"),
        ({"systems": ["oracle:x"]}, RoutingError, "'oracle:x': oracle has no settings"),
        ({"systems": ["merged:density=1"]}, RoutingError, "merged has no setting 'density'; it has: none"),
        ({"systems": ["ties:density=2"]}, RoutingError, "density is a share, expected above 0 and at most 1"),
        ({"systems": ["dare:density=nan"]}, RoutingError, "density is 'nan', expected a number"),
        ({"systems": ["dare:seed=x"]}, RoutingError, "seed is 'x', expected a whole number"),
        ({"systems": ["lora-hub"]}, UnknownName, "known: .*, multitask, .*, weight-only"),
        ({"claims": {"in-pol": 0.6}}, UnknownName, "suite of a claim 'in-pol': did you mean 'in-pool'"),
        ({"claims": {"in-pool": 60}}, RecipeError, r"\[claims\] in-pool is 60, expected a share above 0 and at most 1"),
        ({"claims": {"in-pool": "half"}}, RecipeError, "expected names and numbers"),
        ({"claims": {"in-pool": 0.6}, "systems": ["base", "phatgoose"]}, RecipeError, "add oracle to the systems"),
        ({"dtype": "bf16"}, UnknownName, "dtype 'bf16': did you mean"),
        (
            {"pool": {"tasks": {"a": "bigbnch:social_iqa"}}},
            UnknownName,
            "task source 'bigbnch': did you mean 'bigbench'",
        ),
        ({"bas": "x"}, UnknownName, "setting in the recipe 'bas': did you mean 'base'"),
        ({"expert": {"step": 3}}, UnknownName, r"setting in the recipe, \[expert\] 'step': did you mean 'steps'"),
        ({"measure": {"test_rows": "ten"}}, RecipeError, "test_rows is 'ten', expected a whole number"),
        ({"seeds": 3}, RecipeError, "seeds is 3, expected a list of whole numbers"),
        ({"pool": {"tasks": ["a"]}}, RecipeError, "expected names and texts"),
        ({"pool": []}, RecipeError, "expected settings, got list"),
        ({"pool": {}}, RecipeError, "pool has no tasks"),
        ({"pool": {"names": ["bigbench"], "leave_out": ["nothing"]}}, UnknownName, "task of the pool 'nothing'"),
        ({"pool": {"names": ["t0-held-in", "flan"]}}, RecipeError, "two of the pool's tasks are named"),
        ({"measure": {"suites": ["bbhard"]}}, UnknownName, "suite 'bbhard'"),
        ({"measure": {"suites": ["unseen"]}}, RecipeError, "'unseen' has no tasks"),
        ({"systems": ["phatgose"]}, UnknownName, "did you mean 'phatgoose'"),
        ({"systems": ["phatgoose:top_k=none"]}, RoutingError, "top_k"),
        ({"systems": ["padded:x"]}, RoutingError, "padded:N"),
        ({"systems": ["base", "own"], "measure": {"suites": ["bbl"]}}, RecipeError, "own is measured on in-pool"),
        ({"systems": []}, RecipeError, "systems is empty"),
        ({"systems": ["single:nobody"]}, UnknownName, "expert 'nobody'"),
        ({"measure": {"suites": []}}, RecipeError, "suites is empty"),
        ({"measure": {"test_rows": 0}}, RecipeError, "test_rows is 0"),
        (
            {"measure": {"choice_rows": 0}},
            RecipeError,
            "choice_rows is 0, and best-single and oracle choose by such rows",
        ),
        ({"measure": {"backend": "tritn"}}, UnknownName, "backend 'tritn': did you mean 'triton'"),
        ({"pool": {"tasks": {"my task": "bigbench:social_iqa"}}}, ExpertError, "'my task' can't name an expert"),
        ({"systems": ["model:"]}, RoutingError, "model:SPEC"),
        ({"signature": {"texts": 5000}}, TrainingError, "expected at most 1000"),
        ({"multitask": {"step": 3}}, UnknownName, r"\[multitask\] 'step'"),
        ({"base": None}, RecipeError, "base is None, expected a text"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, says):
    with pytest.raises(error, match=says):
        ExperimentRecipe.from_json({**SMALL, **change})


def test_files_and_folders_are_checked(tmp_path):
    with pytest.raises(RecipeError, match="can't be read as a recipe"):
        ExperimentRecipe.read(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_text(
        'base = "b"\n[pool]\ntasks = { a = "jsonl:a.jsonl" }\n[folders]\nbbh = "here"\n'
    )
    with pytest.raises(TaskError, match="the folder for 'bbh' is"):
        ExperimentRecipe.read(tmp_path / "r.toml")
    (tmp_path / "here").mkdir()
    assert ExperimentRecipe.read(tmp_path / "r.toml").folders == {"bbh": str(tmp_path / "here")}
    other = ExperimentRecipe.read(tmp_path / "r.toml", {"bbh": str(tmp_path)})
    assert other.folders == {"bbh": str(tmp_path)}


def test_an_empty_folder_is_never_the_current_one(tmp_path):
    """Of a pool it means that there is none, as in a recipe without it. Of data it means nothing."""
    file, data = tmp_path / "r.toml", 'base = "b"\n[pool]\nfolder = "{}"\ntasks = {{ a = "jsonl:a.jsonl" }}\n'
    file.write_text(data.format(""))
    assert ExperimentRecipe.read(file).pool.folder == "" == ExperimentRecipe.read(file, pool="").pool.folder
    file.write_text(data.format("there"))
    for pool in (None, ""):
        assert ExperimentRecipe.read(file, pool=pool).pool.folder == str(tmp_path / "there")
    file.write_text('base = "b"\n[pool]\nfolder = ""\n')
    with pytest.raises(RecipeError, match="the recipe's pool has no tasks"):
        ExperimentRecipe.read(file)
    file.write_text(data.format("") + '[folders]\nbbh = ""\n')
    with pytest.raises(RecipeError, match="the folder for 'bbh' is empty: give one"):
        ExperimentRecipe.read(file)
    assert ExperimentRecipe.read(file, {"bbh": str(tmp_path)}).folders == {"bbh": str(tmp_path)}
    with pytest.raises(RecipeError, match="the folder for 't0ho' is empty"):
        ExperimentRecipe.read(file, {"bbh": str(tmp_path), "t0ho": ""})


def test_several_recipes_may_have_one_list_of_folders(tmp_path):
    """Of suites, tasks and sources that this recipe does without, too."""
    folders = dict.fromkeys(
        ("unseen", "story_cloze", "bigbench", "mine", "theirs", "social_iqa", "wsc"), str(tmp_path)
    )
    made = {
        **SMALL,
        "pool": {"names": ["bigbench"], "leave_out": ["social_iqa"]},
        "measure": {
            "suites": ["in-pool", "unseen"],
            "tasks": {"mine": "jsonl:a.jsonl", "theirs": "jsonl:b.jsonl"},
        },
    }
    assert ExperimentRecipe.from_json({**made, "folders": folders}).folders == folders
    with pytest.raises(UnknownName, match="folder 'other'"):
        ExperimentRecipe.from_json({**made, "folders": {"other": str(tmp_path)}})


def test_what_is_given_away_names_no_folder_of_this_machine():
    here = "/home/me/secret"
    recipe = ExperimentRecipe.from_json(
        {
            "base": f"{here}/base",
            "systems": ["base"],
            "pool": {
                "tasks": {"a": f"jsonl:{here}/a.jsonl?input=x", "b": "bigbench:social_iqa"},
                "folder": f"{here}/pool",
            },
            "measure": {"suites": ["unseen"], "tasks": {"c": f"jsonl:{here}/c.jsonl"}},
            "signature": {"encoder": f"{here}/minilm"},
            "folders": {"bbh": f"{here}/bbh"},
        }
    )  # fmt: skip
    shown = recipe.without_paths()
    assert here not in json.dumps(shown)
    assert shown["pool"]["tasks"] == {"a": "jsonl:a.jsonl?input=x", "b": "bigbench:social_iqa"}
    assert (shown["base"], shown["folders"], shown["pool"]["folder"]) == ("base", {"bbh": "bbh"}, "pool")
    assert {k: v for k, v in shown.items() if k in ("seeds", "dtype", "gate")} == {
        k: v for k, v in recipe.to_json().items() if k in ("seeds", "dtype", "gate")
    }


def test_seeds_multiply_only_what_draws():
    assert expanded(["base", "random:seed={seed}"], [3, 5]) == ("base", "random:seed=3", "random:seed=5")
    assert expanded(["PHATGOOSE", "Single:Mine"], [0]) == ("phatgoose", "single:Mine")


def test_merges_and_padding_have_settings(make_base, make_expert):
    base = make_base("llama")
    pool = Pool([make_expert(base, "one", gates=True), make_expert(base, "two", seed=1, gates=True)])
    for name, expected in {
        "ties:density=0.5": ties(pool, 0.5),
        "dare:seed=3": dare(pool, seed=3),
        "dare:density=0.5,seed=3": dare(pool, 0.5, 3),
    }.items():
        check_system(name)
        (found,) = build(name, pool)[0].experts
        assert found.hash == expected.hash
    assert dare(pool, seed=3).hash != dare(pool).hash
    check_system("padded:2,seed=4")
    found, _ = build("padded:2,seed=4", pool)
    assert [e.hash for e in found.experts] == [e.hash for e in padded(pool, 2, seed=4).experts]
    assert [e.hash for e in build("padded:2", pool)[0].experts] == [e.hash for e in padded(pool, 2).experts]
