"""Suites by measure, tier and cluster: means, differences and power against direct computation, and what is shown."""

from __future__ import annotations

import random
from statistics import NormalDist

import numpy as np
import pytest
from tiny_experiment import recipe_data, write_place

from phatgoose.errors import UnknownName
from phatgoose.evaluation.statistics import paired_difference
from phatgoose.records import Example, Prediction, TaskScore
from phatgoose.workflows.experiment.executors import Processes
from phatgoose.workflows.experiment.measures.compare import by_measure, smallest
from phatgoose.workflows.experiment.measures.tables import measure_sections, tier_sections
from phatgoose.workflows.experiment.measures.values import answers_of
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.experiment.results import RESAMPLES, suite_results
from phatgoose.workflows.experiment.run import run_experiment

ALL_MEASURES = ("auc", "centred-accuracy", "accuracy", "rougeL")
SKILL = {"base": 0.0, "phatgoose": 0.8, "oracle": 2.0}


def rows_of(task, count, labels, seed):
    draws = random.Random(seed)
    return [Example(f"{task} {i}", (draws.choice(labels),), tuple(labels)) for i in range(count)]


def score(task, rows, skill, seed, groups=()):
    draws, made = random.Random(f"{task} {seed}"), []
    for row in rows:
        scores = tuple(draws.gauss(skill * (c in row.targets), 1) for c in row.choices)
        best = row.choices[scores.index(max(scores))]
        made.append(Prediction(best in row.targets, best, choice_scores=scores))
    return scored(task, made, groups)


def scored(task, made, groups=()):
    mean = sum(p.points for p in made) / len(made)
    return TaskScore(task, "test", "x", mean, 0, 1, len(made), "hash", tuple(made), groups=groups)


@pytest.fixture(scope="module")
def suite():
    """Three tasks with labels in two clusters and two tiers, one whose answers are generated, and one by ROUGE."""
    tasks, answers, table = {}, {}, {system: {} for system in SKILL}
    for name, cluster, tier, labels in (
        ("mood", "sentiment", "sisters", ["bad", "good"]),
        ("stars", "sentiment", "sisters", ["one", "two", "three"]),
        ("topic", "topic", "unrelated", ["a", "b"]),
    ):
        rows = rows_of(name, 60, labels, 0)
        groups = tuple(i // 2 for i in range(60)) if name == "stars" else ()
        tasks[name] = {"metric": None, "cluster": cluster, "tier": tier}
        answers[name] = answers_of(rows)
        for system, skill in SKILL.items():
            table[system][name] = score(name, rows, skill, system, groups)
    for name, metric in (("sum", None), ("write", "rougeL")):
        tasks[name] = {"metric": metric, "cluster": name, "tier": "sisters"}
        answers[name] = answers_of([Example(str(i), ("x",)) for i in range(40)])
        for system, skill in SKILL.items():
            draws = random.Random(f"{name} {system}")
            values = [min(1.0, draws.random() / 2 + skill / 8) for _ in range(40)]
            table[system][name] = scored(
                name, [Prediction(v > 0.5, "x", value=v if metric else None) for v in values]
            )
    return table, tasks, answers


def test_each_measure_has_the_tasks_that_it_is_defined_on(suite):
    found = by_measure(*suite, ALL_MEASURES)
    assert {name: one["all"]["tasks"] for name, one in found.items()} == {
        "auc": ["mood", "stars", "topic"],
        "centred-accuracy": ["mood", "stars", "topic"],
        "accuracy": ["mood", "stars", "topic", "sum"],
        "rougeL": ["write"],
    }
    assert found["auc"]["undefined"] == dict.fromkeys(("sum", "write"), "its answers are generated")
    assert {n: list(m["tiers"]) for n, m in found.items()} == {
        "auc": ["sisters", "unrelated"],
        "centred-accuracy": ["sisters", "unrelated"],
        "accuracy": ["sisters", "unrelated"],
        "rougeL": ["sisters"],
    }
    assert found["auc"]["tiers"]["sisters"]["tasks"] == ["mood", "stars"]
    for part in (found["auc"]["all"], found["auc"]["tiers"]["sisters"]):
        for system, mine in part["systems"].items():
            values = [found["auc"]["tasks"][t]["systems"][system] for t in part["tasks"]]
            assert mine["mean"] == pytest.approx(np.mean(values))
            assert mine["low"] < mine["mean"] < mine["high"]
    # The order is the recipe's, and so is which one is primary.
    assert list(by_measure(*suite, ("rougeL", "auc"))) == ["rougeL", "auc"]
    assert "p" in found["auc"]["all"]["against"]["base"]["phatgoose"]
    assert "p" not in found["accuracy"]["all"]["against"]["base"]["phatgoose"]


def test_accuracy_by_measure_is_what_results_have_without_measures(suite):
    """To the last bit of a draw: also across the parts in which resamples are computed, and with groups."""
    table, tasks, answers = suite
    few = {s: {t: row[t] for t in ("mood", "stars", "topic", "sum")} for s, row in table.items()}
    known = {t: tasks[t] for t in few["base"]}
    plain = suite_results(few, dict.fromkeys(known, "hash"))
    found = by_measure(few, known, answers, ("accuracy",))["accuracy"]["all"]
    for system, mine in found["systems"].items():
        expected = {k: plain["systems"][system][k] for k in ("mean", "low", "high")}
        assert mine == pytest.approx(expected, abs=1e-12)
    for other in ("base", "phatgoose"):
        for system, mine in found["against"][other].items():
            for key, value in plain["against"][other][system].items():
                assert mine[key] == pytest.approx(value, abs=1e-12), key


def test_the_smallest_difference_is_what_a_test_finds_in_four_of_five_draws(suite):
    table = suite[0]
    one = by_measure(*suite, ("rougeL",))["rougeL"]["all"]["against"]["base"]["phatgoose"]
    rows = [[p.points for p in table[s]["write"].predictions] for s in ("phatgoose", "base")]
    error = np.std(np.subtract(*rows)) / np.sqrt(40)
    assert one["error"] == pytest.approx(error, rel=0.02)
    assert one["smallest"] == pytest.approx((1.96 + 0.8416) * one["error"], rel=1e-3)
    # Two comparisons with the base: Holm's first step tests at 2.5 %.
    assert one["smallest_holm"] == pytest.approx((2.2414 + 0.8416) * one["error"], rel=1e-3)
    draws = np.random.default_rng(0)
    differences = draws.normal(0, 0.02, 20_000)
    known = smallest(differences, 8)
    normal = NormalDist()
    for level, size in ((0.05, known["smallest"]), (0.05 / 8, known["smallest_holm"])):
        needed = normal.inv_cdf(1 - level / 2) * 0.02
        assert np.mean(draws.normal(size, 0.02, 200_000) > needed) == pytest.approx(0.8, abs=0.01)


def test_clusters_are_drawn_whole(suite):
    """Against drawing them one by one: two clusters have three tasks and one."""
    found = by_measure(*suite, ("auc",))["auc"]
    one = found["all"]["against"]["base"]["phatgoose"]
    gains = {
        t: found["tasks"][t]["systems"]["phatgoose"] - found["tasks"][t]["systems"]["base"]
        for t in ("mood", "stars", "topic")
    }
    assert found["all"]["clusters"] == 2
    clusters, draws, means = [("mood", "stars"), ("topic",)], random.Random(3), []
    for _ in range(20_000):
        drawn = [t for c in draws.choices(clusters, k=2) for t in c]
        means.append(np.mean([gains[t] for t in drawn]))
    expected = np.quantile(means, [0.025, 0.975])
    assert [one["clusters"]["low"], one["clusters"]["high"]] == pytest.approx(expected)
    assert one["clusters"]["low"] < one["difference"] < one["clusters"]["high"]
    # Of one cluster nothing can be drawn, and tasks without clusters have none.
    assert "clusters" not in found["tiers"]["sisters"]["against"]["base"]["phatgoose"]
    table, tasks, answers = suite
    bare = {t: {**info, "cluster": ""} for t, info in tasks.items()}
    assert (
        "clusters"
        not in by_measure(table, bare, answers, ("auc",))["auc"]["all"]["against"]["base"]["oracle"]
    )


def test_a_system_without_some_task_has_no_mean_there(suite):
    table, tasks, answers = suite
    partial = {**table, "own": {t: table["oracle"][t] for t in ("mood", "stars")}}
    found = by_measure(partial, tasks, answers, ("auc",))["auc"]
    assert "own" not in found["all"]["systems"]
    assert found["all"]["systems"] == by_measure(*suite, ("auc",))["auc"]["all"]["systems"]
    assert found["tiers"]["sisters"]["systems"]["own"] == found["tiers"]["sisters"]["systems"]["oracle"]
    assert list(found["tasks"]["topic"]["systems"]) == ["base", "phatgoose", "oracle"]


def test_paired_intervals_are_of_the_same_rows(suite):
    """Of within-row areas, which are means over rows: against `paired_difference`."""
    table, tasks, answers = {s: {} for s in SKILL}, {"t": {"metric": None}}, {}
    rows = [Example(str(i), (f"{i} 0",), tuple(f"{i} {k}" for k in range(4))) for i in range(50)]
    answers["t"] = answers_of(rows)
    values = {}
    for system, skill in SKILL.items():
        table[system]["t"] = score("t", rows, skill, system)
        values[system] = [
            np.mean([p.choice_scores[0] > s for s in p.choice_scores[1:]])
            for p in table[system]["t"].predictions
        ]
    found = by_measure(table, tasks, answers, ("auc",))["auc"]
    assert found["tasks"]["t"]["compares"] == "within rows"
    one = found["all"]["against"]["base"]["oracle"]
    expected = paired_difference([values["oracle"]], [values["base"]], resamples=RESAMPLES)
    assert (one["difference"], one["low"], one["high"]) == pytest.approx(expected)


def test_tables_show_every_system_task_and_tier(suite):
    table, tasks, answers = suite
    partial = {**table, "own": {t: table["oracle"][t] for t in ("mood", "stars")}}
    found = {"tasks": tasks, "measures": by_measure(partial, tasks, answers, ALL_MEASURES)}
    first, *others = measure_sections(found)
    assert (first["title"], first["primary"], first["tasks"], first["clusters"]) == ("AUC", True, 3, 2)
    head, *rows = first["systems"]
    assert head == [
        "system",
        "mean",
        "− base",
        "p",
        "over clusters",
        "shows from",
        "− PHATGOOSE",
        "p",
        "over clusters",
        "shows from",
    ]
    assert [row[0] for row in rows] == ["oracle", "phatgoose", "base"]
    assert rows[2][2:6] == [""] * 4
    assert all(len(row) == len(head) for row in rows)
    assert first["by_task"][0] == [
        "task",
        "tier",
        "cluster",
        "compares",
        "base",
        "own",
        "oracle",
        "phatgoose",
    ]
    assert first["by_task"][3][:6] == [
        "topic",
        "unrelated",
        "topic",
        "between rows",
        first["by_task"][3][4],
        "",
    ]
    assert first["undefined"] == {"its answers are generated": ["sum", "write"]}
    assert others[1]["by_task"][0] == ["task", "tier", "cluster", "base", "own", "oracle", "phatgoose"]
    assert "p" not in others[1]["systems"][0]
    tiers = tier_sections(found)
    assert list(tiers) == ["sisters", "unrelated"]
    head, *rows = tiers["sisters"]["systems"]
    assert head[:6] == ["system", "AUC", "− base", "p", "− PHATGOOSE", "p"]
    assert head[6:9] == ["Label-centred accuracy", "− base", "− PHATGOOSE"]
    assert {row[0] for row in rows} == {"base", "phatgoose", "oracle", "own"}
    assert all(len(row) == len(head) for row in rows)
    assert measure_sections({"tasks": {}}) == []


def test_a_run_has_its_measures_beside_what_it_had(tmp_path, make_base):
    place = write_place(tmp_path, make_base("llama"))
    data = recipe_data(place, systems=["base", "phatgoose", "oracle"])
    plain = run_experiment(ExperimentRecipe.from_json(data), place / "out")
    files = sorted((place / "out" / "scores").iterdir())
    asked = ExperimentRecipe.from_json(
        {**data, "measure": {**data["measure"], "measures": list(ALL_MEASURES)}}
    )
    found = run_experiment(asked, place / "out", executor=(executor := Processes(1)))
    executor.close()
    assert sorted((place / "out" / "scores").iterdir()) == files  # no model ran
    for name, suite in found["suites"].items():
        measures = suite.pop("measures")
        assert suite == plain["suites"][name]
        # "choice" has the same choices in all rows, and those of "held" differ.
        task, how = {"in-pool": ("choice", "between rows"), "unseen": ("held", "within rows")}[name]
        assert list(measures) == ["auc", *(["centred-accuracy"] if name == "in-pool" else []), "accuracy"]
        assert measures["auc"]["tasks"][task]["compares"] == how
        for system in ("base", "phatgoose", "oracle"):
            values = {m: one["tasks"][task]["systems"][system] for m, one in measures.items()}
            assert values["accuracy"] == pytest.approx(suite["systems"][system]["tasks"][task]["mean"])
            if how == "within rows":  # of two choices each
                assert values["auc"] == pytest.approx(values["accuracy"])
    said = (place / "out" / "results.md").read_text()
    assert "### in-pool: AUC" in said
    assert "### unseen: Accuracy" in said
    assert "- Not defined (its answers are generated): upper." in said
    assert "- Not defined (its choices differ from row to row): held." not in said  # no table is empty


def test_an_unknown_measure_is_refused_by_name():
    small = {"base": "b", "pool": {"tasks": {"a": "jsonl:a.jsonl"}}}
    with pytest.raises(UnknownName, match="measure 'acu': did you mean 'auc'"):
        ExperimentRecipe.from_json({**small, "measure": {"measures": ["acu"]}})
