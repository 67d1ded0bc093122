import json

import datasets
import pytest

from conftest import write_rows
from phatgoose.errors import TaskError, UnknownName
from phatgoose.records import Example
from phatgoose.tasks import load_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def row(i, target, choices=None, **more):
    base = {
        "inputs": [1, 2],
        "inputs_pretokenized": f"Premise {i}?\n",
        "targets": [3],
        "targets_pretokenized": f"\n{target}",
    }
    return base | ({} if choices is None else {"answer_choices": choices}) | more


def rows(task):
    return {*task.train, *task.validation, *task.test}


def test_choices_and_open_answers(tmp_path):
    data = [row(0, "Yes", ["Yes", "No"]), row(1, "free text", []), row(2, "other", ["Yes", "No"])]
    datasets.DatasetDict(train=datasets.Dataset.from_list(data)).save_to_disk(tmp_path / "cb_GPT_3_style")
    assert rows(load_task("p3:cb_GPT_3_style", folder=tmp_path)) == {
        Example("Premise 0?", ("Yes",), ("Yes", "No")),
        Example("Premise 1?", ("free text",)),
        Example("Premise 2?", ("other",)),
    }


def test_score_eval_rows_are_gathered(tmp_path):
    data = [
        row(i, c, ["a", "b", "c"], idx=[i, j], is_correct=i < 50 and j == i % 3, weight=1.0)
        for j, c in enumerate("abc")
        for i in range(60)
    ]
    write_rows(tmp_path / "x_score_eval.jsonl", data)
    task = load_task("p3:x_score_eval", folder=tmp_path)
    assert rows(task) == {Example(f"Premise {i}?", ("abc"[i % 3],), ("a", "b", "c")) for i in range(50)}
    assert task.source["dropped"] == {"no_right_choice": 10}


def test_own_splits_are_kept(tmp_path):
    place = tmp_path / "c"
    place.mkdir()
    for name, start in (("train", 0), ("validation", 30), ("test", 40)):
        datasets.Dataset.from_list([row(i, "x") for i in range(start, start + 10)]).to_parquet(
            str(place / f"{name}.parquet")
        )
    task = load_task("p3:c", folder=tmp_path)
    assert {e.input for e in task.test} == {f"Premise {i}?" for i in range(40, 50)}
    assert {e.input for e in task.validation} == {f"Premise {i}?" for i in range(30, 40)}
    swapped = load_task("p3:c?test=validation&validation=test", folder=tmp_path)
    assert swapped.test == task.validation


def test_errors(tmp_path):
    with pytest.raises(TaskError, match="not a folder"):
        load_task("p3:c", folder=tmp_path / "none")
    (tmp_path / "cb_style.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(UnknownName, match="did you mean 'cb_style'"):
        load_task("p3:cb_stile", folder=tmp_path)
    with pytest.raises(TaskError, match="no column inputs_pretokenized, targets_pretokenized"):
        load_task("p3:cb_style", folder=tmp_path)
    (tmp_path / "y.jsonl").write_text(json.dumps(row(0, "x", is_correct=True, idx="a")) + "\n")
    with pytest.raises(TaskError, match="row 0: idx must be"):
        load_task("p3:y", folder=tmp_path)
    (tmp_path / "z.jsonl").write_text(json.dumps(row(0, " ") | {"inputs_pretokenized": "p"}) + "\n")
    with pytest.raises(TaskError, match="no examples"):
        load_task("p3:z", folder=tmp_path)


def test_the_hub_is_asked_for_the_config(monkeypatch):
    calls = []

    def fake(name, config=None, revision=None):
        calls.append((name, config, revision))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([row(0, "x")]))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load_task("p3:cb_GPT_3_style?revision=abc")
    assert calls == [("bigscience/P3", "cb_GPT_3_style", "abc")]
