import gzip
import json

import pytest

from phatgoose.errors import DownloadError, TaskError, UnknownName
from phatgoose.records import Example
from phatgoose.tasks import list_tasks, load_task
from phatgoose.tasks.sources import bbh


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"input": "Which?\nOptions:\n(A) one (B)\n(B) two", "target": "(B)"},
        {"input": "Which is it?\nOptions:\n(A) one\n(B) two", "target": "two"},
    ]
    (tmp_path / "ruin_names.json").write_text(json.dumps({"canary": "c", "examples": rows}))
    rows = [{"input": "Back?\nOptions:\n- Yes\n- No ", "target": "No"}, {"input": "8 = ", "target": "8"}]
    (tmp_path / "navigate.json.gz").write_bytes(gzip.compress(json.dumps({"examples": rows}).encode()))
    return tmp_path


def test_every_row_is_a_test_row(folder, monkeypatch):
    task = load_task("bbh:ruin_names", folder=folder)
    assert (task.train, task.validation) == ((), ())
    assert set(task.test) == {
        Example("Which?\nOptions:\n(A) one (B)\n(B) two\nAnswer:", ("(B)",), ("(A)", "(B)")),
        Example("Which is it?\nOptions:\n(A) one\n(B) two\nAnswer:", ("two",)),
    }
    monkeypatch.setenv("PHATGOOSE_BBH", str(folder))
    assert set(load_task("bbh:navigate").test) == {
        Example("Back?\nOptions:\n- Yes\n- No\nAnswer:", ("No",), ("Yes", "No")),
        Example("8 =\nAnswer:", ("8",)),
    }
    assert list_tasks("bbh") == ["navigate", "ruin_names"]


def test_options_need_a_block():
    assert bbh.to_example("Is it (A) x or (B) y?", "(A)").choices is None
    assert bbh.to_example("Options:\n(A) no\nOptions:\n- valid \n- invalid", "valid").choices == (
        "valid",
        "invalid",
    )


def test_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(UnknownName, match="did you mean 'navigate'"):
        load_task("bbh:navigat", folder=folder)
    with pytest.raises(TaskError, match="not a folder"):
        load_task("bbh:navigate", folder=tmp_path / "none")
    (folder / "a.json").write_text('{"examples": [{"input": "x"}]}')
    with pytest.raises(TaskError, match=r"a\.json, example 0: expected"):
        load_task("bbh:a", folder=folder)
    (folder / "b.json.gz").write_bytes(b"no gzip")
    with pytest.raises(TaskError, match=r"b\.json\.gz can't be read"):
        load_task("bbh:b", folder=folder)
    (folder / "c.json").write_text('{"examples": []}')
    with pytest.raises(TaskError, match="no examples"):
        load_task("bbh:c", folder=folder)
    (folder / "d.json").write_text("[]")
    with pytest.raises(TaskError, match='list "examples"'):
        load_task("bbh:d", folder=folder)


def test_from_the_hub(monkeypatch):
    import datasets

    monkeypatch.delenv("PHATGOOSE_BBH", raising=False)
    asked = []

    def fake(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"input": "not True is", "target": "False"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_task("bbh:boolean_expressions").test == (Example("not True is\nAnswer:", ("False",)),)
    assert asked == [("lukaemon/bbh", "boolean_expressions", "test")]
    with pytest.raises(UnknownName):
        load_task("bbh:boolean")

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DownloadError, match="PHATGOOSE_BBH"):
        load_task("bbh:boolean_expressions")
    assert len(list_tasks("bbh")) == 27
