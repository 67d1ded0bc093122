"""Through `datasets` itself, on local datasets: no network."""

import datasets
import pytest

from phatgoose.errors import DownloadError, TaskError, UnknownName
from phatgoose.records import Example
from phatgoose.tasks import load_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def nli(n, start=0):
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        idx=datasets.Value("int32"),
        label=datasets.ClassLabel(names=["entailment", "not_entailment"]),
    )
    rows = [
        {"premise": f"p{i}", "hypothesis": "h", "idx": i, "label": i % 2} for i in range(start, start + n)
    ]
    return datasets.Dataset.from_list(rows, features=features)


OPTIONS = "?input={premise} Question: {hypothesis}?&target=label&choices=names"


def prompts(examples):
    return {e.input for e in examples}


def test_class_labels_and_own_splits_from_disk(tmp_path):
    data = datasets.DatasetDict(train=nli(40), validation=nli(10, 40), test=nli(12, 45))
    data.save_to_disk(tmp_path / "nli")
    task = load_task(f"hf:{tmp_path}/nli{OPTIONS}")
    assert task.name == "hf:nli"
    assert prompts(task.test) == {f"p{i} Question: h?" for i in range(45, 57)}
    assert prompts(task.validation) == {f"p{i} Question: h?" for i in range(40, 45)}
    assert task.source["merging"] == {"validation_in_test": 5}
    assert Example("p3 Question: h?", ("not_entailment",), ("entailment", "not_entailment")) in task.train


def test_values_rename_class_labels(tmp_path):
    nli(30).save_to_disk(tmp_path / "nli")
    task = load_task(f"hf:{tmp_path}/nli{OPTIONS}&values=entailment:yes|not_entailment:no")
    assert {e.choices for e in task.train} == {("yes", "no")}
    assert {e.targets for e in task.train} == {("yes",), ("no",)}


@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_a_single_file_is_split_by_the_rule(tmp_path, kind):
    data = datasets.Dataset.from_list([{"q": f"{i}+1", "a": i + 1} for i in range(100)])
    getattr(data, f"to_{kind}")(str(tmp_path / f"sums.{kind}"))
    task = load_task(f"hf:sums.{kind}?input=q&target=a", folder=tmp_path)
    (tmp_path / "same.jsonl").write_text(
        "".join(f'{{"input": "{i}+1", "target": {i + 1}}}\n' for i in range(100))
    )
    assert task.hash == load_task(f"jsonl:{tmp_path}/same.jsonl").hash


def test_a_folder_with_named_files(tmp_path):
    folder = tmp_path / "qa"
    folder.mkdir()
    for name, start in (("train", 0), ("test", 50)):
        nli(20, start).to_parquet(str(folder / f"{name}.parquet"))
    task = load_task(f"hf:{folder}{OPTIONS}")
    assert len(task.test) == 20
    assert len(task.train) + len(task.validation) == 20


def test_an_unlabelled_test_split_counts_as_none(tmp_path):
    hidden = nli(10, 100).map(lambda r: {"label": -1})
    datasets.DatasetDict(train=nli(60), test=hidden).save_to_disk(tmp_path / "nli")
    task = load_task(f"hf:{tmp_path}/nli{OPTIONS}")
    assert task.source["dropped"] == {"unlabelled_test": 10}
    assert len(task.test) > 0
    assert prompts(task.test) < {f"p{i} Question: h?" for i in range(60)}


def test_splits_can_be_chosen(tmp_path):
    data = datasets.DatasetDict(train=nli(40), validation=nli(10, 40), dev_2=nli(5, 70))
    data.save_to_disk(tmp_path / "nli")
    task = load_task(f"hf:{tmp_path}/nli{OPTIONS}&test=validation")
    assert prompts(task.test) == {f"p{i} Question: h?" for i in range(40, 50)}
    assert len(task.validation) + len(task.train) == 40
    task = load_task(f"hf:{tmp_path}/nli{OPTIONS}&train=&validation=&test=dev_2")
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 5)
    with pytest.raises(UnknownName, match="did you mean 'dev_2'"):
        load_task(f"hf:{tmp_path}/nli{OPTIONS}&test=dev2")


def test_nested_choices_and_letters(tmp_path):
    rows = [
        {"question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
        for i in range(9)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "csqa.parquet"))
    task = load_task(f"hf:{tmp_path}/csqa.parquet?input=question&choices=choices.text&answer_index=answerKey")
    assert {(e.targets, e.choices) for e in task.train} == {(("b",), ("a", "b"))}


def test_errors(tmp_path):
    nli(5).save_to_disk(tmp_path / "nli")
    with pytest.raises(UnknownName, match="did you mean 'premise'"):
        load_task(f"hf:{tmp_path}/nli?input=premis&target=label")
    with pytest.raises(TaskError, match="row 0: choices=names needs a class label"):
        load_task(f"hf:{tmp_path}/nli?input=premise&target=hypothesis&choices=names")
    with pytest.raises(TaskError, match="does not exist"):
        load_task(f"hf:{tmp_path}/none{OPTIONS}")
    datasets.DatasetDict(a=nli(5), b=nli(5)).save_to_disk(tmp_path / "odd")
    with pytest.raises(TaskError, match=r"has the splits \['a', 'b'\]"):
        load_task(f"hf:{tmp_path}/odd{OPTIONS}")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(TaskError, match="expected a file ending in"):
        load_task(f"hf:{tmp_path}/x.txt{OPTIONS}")
    (tmp_path / "bad.json").write_text("{{{")
    with pytest.raises(TaskError, match="can't be loaded as a dataset"):
        load_task(f"hf:{tmp_path}/bad.json{OPTIONS}")


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("owner/name/config", [("owner/name", "config")]),
        ("owner/name", [("owner/name", None)]),
        ("glue/rte", [("glue/rte", None), ("glue", "rte")]),
        ("glue/rte?config=x", [("glue/rte", "x")]),
    ],
)
def test_hub_names(monkeypatch, spec, asked):
    calls = []

    def fake(name, config=None, revision=None):
        calls.append((name, config))
        if name == "glue/rte" and config is None:
            raise datasets.exceptions.DatasetNotFoundError(name)
        return datasets.DatasetDict(train=nli(9))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    options = OPTIONS if "?" not in spec else "&" + OPTIONS[1:]
    load_task(f"hf:{spec}{options}")
    assert calls == asked


def test_no_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DownloadError, match=r"'owner/name'.*network"):
        load_task(f"hf:owner/name{OPTIONS}")
