"""Suites whose tasks name sisters: which tasks are admitted, by whose experts, and what the tables then hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_experiment import COMMON, recipe_data, write_place
from typer.testing import CliRunner

from conftest import write_rows
from phatgoose.cli.main import app
from phatgoose.evaluation.statistics import paired_difference
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base.load import load_base
from phatgoose.routers import Single
from phatgoose.tasks.lists import named
from phatgoose.tasks.load import load_task
from phatgoose.workflows.experiment import steps as experiment_steps
from phatgoose.workflows.experiment.admission import admission_tables, verdict
from phatgoose.workflows.experiment.hits import hit_table, hits
from phatgoose.workflows.experiment.recipe import ExperimentRecipe, RecipeError
from phatgoose.workflows.experiment.results import RESAMPLES, suite_results
from phatgoose.workflows.experiment.run import run_experiment
from phatgoose.workflows.experiment.scores import ScoreCache

LEARN = {**COMMON, "steps": 12, "learning_rate": 5e-2}
SISTERS = {"always": ["upper", "choice"], "even": ["choice"], "again": ["upper"], "far": []}
TIERS = {"always": "sisters", "even": "sisters", "again": "templates", "far": "unrelated"}


@pytest.fixture
def place(tmp_path, make_base, monkeypatch):
    """The tiny place and a suite "near" of four tasks: two with sisters, one of an expert's own data, one unrelated.

    "always" has one right answer, which is what the experts "always" and "upper" learn.
    """
    place = write_place(tmp_path, make_base("llama"))
    splits = ["train"] * 30 + ["validation"] * 12 + ["test"] * 18
    answers = {
        "always": lambda i: ("yes", ["0", "yes"]),
        "even": lambda i: (("1", "2")[i % 2], ["1", "2"]),
        "again": lambda i: ("yes", ["yes", "no"]),
        "far": lambda i: (f"{i}", [f"{i}", f"{i + 1}"]),
    }
    entries = {}
    for name, answer in answers.items():
        rows = [
            {"input": f"{name} with {i}:", "target": answer(i)[0], "choices": answer(i)[1], "split": split}
            for i, split in enumerate(splits)
        ]
        write_rows(place / f"{name}.jsonl", rows)
        entries[name] = {
            "specs": f"jsonl:{place}/{name}.jsonl", "sisters": SISTERS[name], "tier": TIERS[name],
            "cluster": name, "skill": name, "domain": "numbers",
        }  # fmt: skip
    monkeypatch.setitem(named._SUITES, "near", {"entries": entries})
    monkeypatch.setattr("phatgoose.workflows.experiment.recipe.SUITES", (*named.SUITES, "near"))
    named.suite.cache_clear()
    yield place
    named.suite.cache_clear()


def recipe(place, measure=(), **changes):
    expert = {"rank": 2, "alpha": 4, **LEARN}
    data = recipe_data(place, **{"systems": ["base", "phatgoose"], "expert": expert, **changes})
    data["measure"] = {"suites": ["near"], "test_rows": 8, "choice_rows": 3, **dict(measure)}
    return ExperimentRecipe.from_json(data)


@pytest.fixture
def own(place):
    """The folder of an experiment that trained the ceilings."""
    tasks = {n: f"jsonl:{place}/{n}.jsonl" for n in ("always", "even", "far")}
    ceilings = recipe(
        place,
        pool={"tasks": tasks, "train_rows": 20},
        measure={"suites": ["in-pool"]},
        systems=["base", "own"],
    )
    run_experiment(ceilings, place / "own")
    return place / "own"


def test_a_task_counts_if_its_own_expert_and_a_sister_gain_enough():
    def found(own=(0.10, 0.01), **sisters):
        gains = {
            name: {"mean": 0.5, "gain": gain, "low": -0.1, "high": 0.3} for name, gain in sisters.items()
        }
        return {"own": {"mean": 0.6, "gain": own[0], "low": own[1], "high": 0.3}, "sisters": gains}

    asked = verdict(found(a=0.01, b=0.04), 0.10, 0.04)
    assert (asked["admitted"], asked["sister"], asked["why"]) == (True, "b", "")
    assert verdict(found((0.3 - 0.2, 0.01), a=0.04), 0.1, 0.04)["admitted"]  # 0.09999999999999998
    for bad, why in (
        (found((0.095, 0.01), a=0.04), "its own expert gains +0.095"),
        (found((0.2, 0.0), a=0.04), "and an interval above 0"),
        (found(a=0.035), "its best sister, a, gains +0.035 (-0.100 to +0.300), expected +0.040"),
        (found(), "none of its sisters is in the pool"),
    ):
        judged = verdict(bad, 0.10, 0.04)
        assert not judged["admitted"]
        assert why in judged["why"]
    both = verdict(found((0.0, -0.1), a=0.0), 0.1, 0.04)["why"]
    assert "own expert" in both
    assert "best sister" in both
    admission = {"x": verdict({"rows": 200, "base": 0.5, **found(a=0.04)}, 0.1, 0.04)}
    admission["y"] = verdict({"rows": 150, "base": 0.5, **found()}, 0.1, 0.04)
    tables = admission_tables(admission)
    assert list(tables) == ["Admitted", "Not admitted"]
    assert tables["Admitted"][1][:4] == ["x", "200", "0.500", "0.600"]
    assert tables["Admitted"][1][5:] == ["a", "0.500", "+0.040 (-0.100 to +0.300)"]
    assert tables["Not admitted"][1][5:] == ["", "", ""]


def test_tasks_are_admitted_on_validation_rows_and_the_others_named(place, own):
    measure = {
        "own_experts": str(own / "experts"), "admit_rows": 10, "measures": ["auc", "accuracy"],
        "admit_own_gain": 0.5, "admit_sister_gain": 0.25,
    }  # fmt: skip
    systems = ["base", "phatgoose", "sister", "own", "oracle"]
    asked = recipe(place, measure, systems=systems, page={"prompts": 1})
    results = run_experiment(asked, place / "out")
    assert results["complete"], results["failed"]
    suite = results["suites"]["near"]
    admission = suite["admission"]
    assert list(admission) == ["always", "even"]
    assert admission["always"]["admitted"], admission["always"]
    assert not admission["even"]["admitted"]
    assert suite["common_tasks"] == ["always", "again", "far"]
    assert suite["left_out"] == {"even": f"not admitted: {admission['even']['why']}"}
    # The numbers are those of the experts, on validation rows of the task as its own expert was trained on it.
    base, pool = load_base(str(place / "base"), dtype="float32"), Pool.load(place / "out/pool")
    scores = ScoreCache(base, place / "again")
    for name, found in admission.items():
        task = load_task(f"jsonl:{place}/{name}.jsonl")
        rows = {"split": "validation", "limit": 10}
        alone = scores.score(task, None, None, **rows)
        assert (found["rows"], found["base"]) == (10, alone.mean)
        (folder,) = (own / "experts").glob(f"{name}-*")
        experts = {"own": Expert.load(folder), **{s: pool[s] for s in SISTERS[name]}}
        for expert, numbers in (("own", found["own"]), *found["sisters"].items()):
            score = scores.score(task, Pool([experts[expert]]), Single(0), **rows)
            points = [[[p.points for p in s.predictions]] for s in (score, alone)]
            expected = paired_difference(*points, resamples=RESAMPLES)
            assert (numbers["mean"], numbers["gain"], numbers["low"], numbers["high"]) == (
                score.mean,
                *expected,
            )
    # Who acts: the best sister of each task, and no expert where none is named; its own expert, also of test rows.
    assert results["chosen"]["sister"]["near"] == {"always": "upper", "again": "upper", "far": None}
    assert results["chosen"]["own"]["near"] == {"always": "always", "again": "upper", "far": "far"}
    measured = {system: found["tasks"] for system, found in suite["systems"].items()}
    assert measured["sister"]["far"] == measured["base"]["far"]
    assert measured["own"]["again"] == measured["sister"]["again"]
    for name in ("always", "far"):
        (folder,) = (own / "experts").glob(f"{name}-*")
        task = replace(load_task(f"jsonl:{place}/{name}.jsonl"), name=name)
        score = scores.score(task, Pool([Expert.load(folder)]), Single(0), split="test", limit=8)
        assert measured["own"][name]["mean"] == score.mean
    assert suite["systems"]["own"]["mean"] == pytest.approx(
        sum(measured["own"][t]["mean"] for t in suite["common_tasks"]) / 3
    )
    assert list(suite["hits"]) == ["oracle", "phatgoose", "chance"]
    assert suite["hits"]["phatgoose"]["tasks"] == 2  # "always" and "again" name sisters
    weight = [sum(results["shares"][t][e] for e in SISTERS[t]) for t in ("always", "again")]
    assert suite["hits"]["phatgoose"]["skill"] == pytest.approx(sum(weight) / 2)
    assert suite["hits"]["chance"]["skill"] == (1 + 1 / 2) / 2
    assert list(suite["measures"]["accuracy"]["tiers"]) == ["templates", "sisters", "unrelated"]
    said = (place / "out/results.md").read_text()
    assert "### near: admitted" in said
    assert "### near: not admitted" in said
    assert "### near: whose experts act" in said
    assert f"Left out: even: not admitted: {admission['even']['why']}" in said
    assert (
        "experts" not in json.loads((place / "out/results.json").read_text())["recipe"]["measure"]["suites"]
    )
    assert results["recipe"]["measure"]["own_experts"] == "experts"  # no folder of this machine
    # A second run measures nothing, and other thresholds measure only what they admit.
    files = {p.name for p in (place / "out/scores").iterdir()}
    assert run_experiment(asked, place / "out")["suites"] == results["suites"]
    assert {p.name for p in (place / "out/scores").iterdir()} == files
    strict = run_experiment(
        recipe(place, {**measure, "admit_sister_gain": 0.99}, systems=systems, page={"prompts": 1}),
        place / "out",
    )["suites"]["near"]
    assert {p.name for p in (place / "out/scores").iterdir()} == files
    if not strict["admission"]["always"]["admitted"]:
        assert strict["common_tasks"] == ["again", "far"]


def test_without_the_setting_all_tasks_count(place, own):
    plain = run_experiment(recipe(place), place / "out")["suites"]["near"]
    assert plain["common_tasks"] == list(TIERS)
    assert "admission" not in plain
    assert "measures" not in plain


def test_the_system_sister_asks_named_experts_alone(place, monkeypatch):
    """And oracle all of them; by numbers that leave no doubt."""
    asked = []

    def chosen(run, pool, expert, suite, tasks):
        asked.append((expert, tuple(tasks)))
        return {"scores": {t: [{"upper": 0.5, "choice": 0.75}[expert], None] for t in tasks}, "failed": {}}

    monkeypatch.setattr(experiment_steps, "choose", chosen)
    results = run_experiment(recipe(place, systems=["base", "sister"]), place / "out")
    assert asked == [("upper", ("always", "again")), ("choice", ("always", "even"))]
    expected = {"always": "choice", "even": "choice", "again": "upper", "far": None}
    assert results["chosen"] == {"sister": {"near": expected}}
    assert results["suites"]["near"]["common_tasks"] == list(TIERS)
    asked.clear()
    both = run_experiment(recipe(place, systems=["base", "sister", "oracle"]), place / "out")
    assert asked == [("upper", tuple(TIERS)), ("choice", tuple(TIERS))]
    assert both["chosen"]["sister"]["near"] == expected
    assert both["chosen"]["oracle"]["near"] == dict.fromkeys(TIERS, "choice")


def test_a_pool_without_a_sister_has_none_and_the_task_stays(place):
    pool = {"tasks": {"choice": f"jsonl:{place}/choice.jsonl"}, "train_rows": 20}
    results = run_experiment(recipe(place, systems=["base", "sister"], pool=pool), place / "out")
    suite = results["suites"]["near"]
    assert results["chosen"]["sister"]["near"] == {"always": "choice", "even": "choice", "far": None}
    assert suite["common_tasks"] == list(TIERS)
    assert suite["systems"]["base"].keys() >= {"mean"}
    assert suite["systems"]["sister"].keys() == {"tasks"}  # it lacks "again", so it has no mean
    assert "sister" not in suite["against"]["base"]


def test_a_task_of_an_experts_data_counts_only_with_that_expert(place, own):
    pool = {"tasks": {"choice": f"jsonl:{place}/choice.jsonl"}, "train_rows": 20}
    measure = {"own_experts": str(own / "experts"), "admit_rows": 10}
    suite = run_experiment(recipe(place, measure, pool=pool), place / "out")["suites"]["near"]
    assert suite["left_out"]["again"] == "the expert of its dataset isn't in the pool"


def test_own_experts_that_saw_other_rows_or_none_admit_nothing(place, own):
    """Each is named, and costs its own task only."""
    measure = {"own_experts": str(own / "pool"), "admit_rows": 10}
    other_rows = {**recipe_data(place)["pool"], "train_rows": 19}
    results = run_experiment(recipe(place, measure, pool=other_rows), place / "out")
    assert list(results["failed"]) == ["admit always to near", "admit even to near"]
    assert (
        "0 of them were trained on the rows that this recipe would train it on"
        in results["failed"]["admit always to near"]
    )
    assert "train_rows = 19" in results["failed"]["admit always to near"]
    suite = results["suites"]["near"]
    assert suite["common_tasks"] == ["again", "far"]
    assert suite["left_out"]["even"] == "it couldn't be found out whether it is admitted"
    lone = Pool([Pool.load(own / "pool")["always"]])
    lone.save(place / "lone")
    results = run_experiment(
        recipe(place, {**measure, "own_experts": str(place / "lone")}), place / "lone-out"
    )
    assert list(results["failed"]) == ["admit even to near"]
    assert "has no expert named even" in results["failed"]["admit even to near"]


def test_own_experts_that_saw_what_is_measured_are_refused(place, own):
    """Data without splits is split in another way where nothing is trained on it."""
    rows = [json.loads(line) for line in (place / "even.jsonl").read_text().splitlines()]
    write_rows(place / "even.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows])
    ceilings = recipe(
        place, pool={"tasks": {"even": f"jsonl:{place}/even.jsonl"}, "train_rows": 20},
        measure={"suites": ["in-pool"]}, systems=["base", "own"],
    )  # fmt: skip
    run_experiment(ceilings, place / "again")
    measure = {"own_experts": str(place / "again/experts"), "admit_rows": 10, "test_rows": 40}
    results = run_experiment(recipe(place, measure), place / "out")
    assert "are also training or validation rows of its own expert" in results["failed"]["admit even to near"]


def test_hits_are_of_sisters_and_of_the_right_domain_with_the_wrong_skill():
    tasks = {
        "t": {"sisters": ["a", "b"], "same_domain": ["c"]},
        "u": {"sisters": ["b"], "same_domain": []},
        "far": {"sisters": [], "same_domain": ["a"]},
        "plain": {},
    }
    chosen = {
        "oracle": {"t": "a", "u": "c", "far": "a"},
        "best-single": dict.fromkeys(tasks, "c"),
        "sister": {"t": "a", "u": "b", "far": None},
    }
    shares = {"t": {"a": 0.25, "b": 0.125, "c": 0.5}, "far": {"a": 1.0}}
    found = hits(tasks, chosen, shares, ["a", "b", "c", "d"])
    assert found == {
        "oracle": {"tasks": 2, "skill": 0.5, "domain": 0.0},
        "best-single": {"tasks": 2, "skill": 0.0, "domain": 0.5},
        "phatgoose": {"tasks": 1, "skill": 0.375, "domain": 0.5},
        "chance": {"tasks": 2, "skill": 0.375, "domain": 0.125},
    }
    assert hit_table(found)[1] == ["oracle", "2", "50%", "0%"]
    assert hits(tasks, {}, {}, ["a"]) == {}
    assert hits({"plain": {}}, chosen, {}, ["a"]) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"systems": ["base", "sister"]}, "the system sister is measured on suites whose tasks name sisters"),
        ({"measure": {"admit_rows": 5}}, r"admit_rows admits tasks of the tier sisters, and no suite has one"),
        ({"measure": {"own_experts": "x"}}, "own_experts serve admit_rows and the system own"),
        ({"measure": {"suites": ["sisters"], "admit_own_gain": 1.0}}, r"admit_own_gain is 1.0, expected a gain"),
        ({"measure": {"suites": ["sisters"], "admit_sister_gain": -0.1}}, "admit_sister_gain is -0.1"),
        ({"measure": {"suites": ["sisters"], "admit_sister_gain": float("nan")}}, "admit_sister_gain is nan"),
        ({"measure": {"suites": ["sisters"], "admit_rows": 0.5}}, "admit_rows is 0.5, expected a whole number"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(change, says):
    small = {"base": "b", "systems": ["base"], "pool": {"tasks": {"a": "jsonl:a.jsonl"}}}
    with pytest.raises(RecipeError, match=says):
        ExperimentRecipe.from_json({**small, **change})


def test_a_run_without_the_experts_that_admit_is_refused_before_it_begins(place, tmp_path):
    with pytest.raises(RecipeError, match="say where these are, by own_experts or --own-experts"):
        run_experiment(recipe(place, {"admit_rows": 5}), place / "out")
    with pytest.raises(RecipeError, match="empty holds no experts"):
        run_experiment(recipe(place, {"admit_rows": 5, "own_experts": str(place / "empty")}), place / "out")
    assert not (place / "out").exists()
    file = place / "recipe.toml"
    file.write_text(
        f'base = "{place}/base"\nsystems = ["base"]\n[pool]\ntasks = {{ a = "jsonl:{place}/upper.jsonl" }}\n'
        '[measure]\nsuites = ["near"]\nadmit_rows = 5\n'
    )
    shown = CliRunner().invoke(app, ["experiment", str(file), "--check"])
    assert shown.exit_code == 1
    assert "own experts" in shown.output
    (place / "theirs" / "x-1").mkdir(parents=True)
    (place / "theirs/x-1/expert.json").write_text("{}")
    told = ExperimentRecipe.read(file, own_experts=place / "theirs")
    assert told.measure.own_experts == str(place / "theirs")
    told.check_own_experts()
    file.write_text(file.read_text() + 'own_experts = "theirs"\n')
    assert ExperimentRecipe.read(file).measure.own_experts == str(place / "theirs")
    arguments = ["--own-experts", str(place / "theirs"), "--out", str(place), "--fresh"]
    shown = CliRunner().invoke(app, ["experiment", str(file), *arguments])
    assert "--fresh would remove the own experts" in " ".join(shown.output.split())


def test_a_reference_that_lacks_a_task_leaves_the_others_what_they_were():
    from test_summary import BASE, ORACLE, OURS, table

    whole = suite_results(table(base=BASE, phatgoose=OURS, oracle=ORACLE), dict.fromkeys("ab", ""))
    part = table(base=BASE, phatgoose=OURS, oracle=ORACLE, own={"a": ORACLE["a"]})
    found = suite_results(part, dict.fromkeys("ab", ""), references=("own",))
    assert found["systems"].pop("own").keys() == {"tasks"}
    assert found == whole
    assert suite_results(part, dict.fromkeys("ab", ""))["common_tasks"] == ["a"]
