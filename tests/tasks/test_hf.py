"""Through `datasets` itself, on local datasets and a local stand-in for the Hub: no network."""

import re

import datasets
import pytest

from phatgoose.errors import DownloadError, TaskError, UnknownName
from phatgoose.records import Example
from phatgoose.tasks import load_task
from phatgoose.tasks.sources.hf import load_data
from phatgoose.tasks.sources.promptsource import read_templates
from phatgoose.tasks.spec import TaskSpec

pytest_plugins = ["hub_stand_in"]


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
    task = load_task(f"hf:{spec}{options}")
    assert calls == asked
    assert "copy" not in task.source


def test_no_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DownloadError, match=r"'owner/name'.*network"):
        load_task(f"hf:owner/name{OPTIONS}")


# Datasets that the Hub holds as scripts, with a stand-in for the Hub: `datasets` itself refuses the script
# and reads the copy.

BRANCH = "refs/convert/parquet"


@pytest.fixture
def script(hub, tmp_path, monkeypatch):
    """script({path: Dataset}) → the repository allenai/qa, once qa: a script, and these files on
    the branch of copies."""
    from hub_stand_in import _Api

    for name, value in (
        ("HF_ENDPOINT", hub.url),
        ("HF_HUB_OFFLINE", False),
        ("HF_UPDATE_DOWNLOAD_COUNTS", False),
    ):
        monkeypatch.setattr(datasets.config, name, value)
    as_model = _Api.respond

    def respond(self):
        if re.match(r"(/api)?/datasets/qa(/(resolve|revision|tree)/|$)", self.place):
            return self.answer(307, Location=self.path.replace("/datasets/", "/datasets/allenai/", 1))
        self.place = self.place.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        return as_model(self)

    monkeypatch.setattr(_Api, "respond", respond)

    def make(copy=None):
        repo = hub.add("allenai/qa", files={"README.md": b"# QA\n", "qa.py": b"raise SystemExit\n"})
        files = {".gitattributes": b""}
        for path, data in (copy or {}).items():
            data.to_parquet(str(tmp_path / "one.parquet"))
            files[path] = (tmp_path / "one.parquet").read_bytes()
        if copy is not None:
            repo.commit(files, BRANCH)
        return repo

    return make


TWO = {
    "v1.0/train/0000.parquet": nli(25),
    "v1.0/train/0001.parquet": nli(15, 25),
    "v1.0/train_r1/0000.parquet": nli(9, 200),
    "v1.0/validation/0000.parquet": nli(10, 40),
    "v1.11/train/0000.parquet": nli(30, 100),
}


@pytest.mark.parametrize("name", ["allenai/qa/v1.0", "allenai/qa?config=v1.0", "qa/v1.0", "qa?config=v1.0"])
def test_a_script_is_read_from_the_copy_of_its_config(script, name):
    repo = script(TWO)
    task = load_task(f"hf:{name}{'&' if '?' in name else '?'}{OPTIONS[1:]}")
    assert task.source["copy"] == {
        "branch": BRANCH,
        "dataset": "allenai/qa",
        "config": "v1.0",
        "commit": repo.branches[BRANCH],
    }
    assert prompts(task.validation) == {f"p{i} Question: h?" for i in range(40, 50)}
    assert prompts((*task.train, *task.test)) == {f"p{i} Question: h?" for i in range(40)}
    assert Example("p3 Question: h?", ("not_entailment",), ("entailment", "not_entailment")) in {
        *task.train,
        *task.test,
    }


def test_a_copy_is_read_and_recorded_every_time(script):
    repo = script(TWO)
    spec = f"hf:allenai/qa{OPTIONS}&config="
    first, other, again = (load_task(spec + config) for config in ("v1.0", "v1.11", "v1.0"))
    assert (again.hash, again.source) == (first.hash, first.source)
    assert other.source["copy"]["config"] == "v1.11"
    assert prompts((*other.train, *other.validation, *other.test)) == {
        f"p{i} Question: h?" for i in range(100, 130)
    }
    repo.commit(
        {p: d for p, d in repo.commits[repo.branches[BRANCH]].items() if not p.endswith("0001.parquet")},
        BRANCH,
    )
    changed = load_task(spec + "v1.0")
    assert changed.source["copy"]["commit"] == repo.branches[BRANCH] != first.source["copy"]["commit"]
    assert prompts((*changed.train, *changed.test)) == {f"p{i} Question: h?" for i in range(25)}


def test_the_splits_of_a_copy_are_its_folders(script):
    script(TWO)
    task = load_task(f"hf:allenai/qa/v1.0{OPTIONS}&train=train_r1")
    assert prompts((*task.train, *task.test)) == {f"p{i} Question: h?" for i in range(200, 209)}


def test_the_only_config_of_a_copy_need_not_be_named(script):
    script({"default/train/0000.parquet": nli(30)})
    task = load_task(f"hf:qa{OPTIONS}")
    assert task.source["copy"]["config"] == "default"
    assert len(task.train) + len(task.validation) + len(task.test) == 30
    with pytest.raises(UnknownName, match="unknown config of qa 'plain': known: default"):
        load_task(f"hf:qa/plain{OPTIONS}")


def test_one_of_several_configs_must_be_named(script):
    script(TWO)
    with pytest.raises(
        TaskError, match=r"allenai/qa has several configs: v1\.0, v1\.11\. Write one as \?config="
    ):
        load_task(f"hf:allenai/qa{OPTIONS}")
    with pytest.raises(UnknownName, match=r"did you mean 'v1\.11'"):
        load_task(f"hf:allenai/qa/v1.12{OPTIONS}")


@pytest.mark.parametrize("place", ["partial-train/0000.parquet", "qa-train.parquet", "train/a/0000.parquet"])
def test_a_copy_that_may_not_be_whole_is_refused(script, place):
    script({"v1.0/validation/0000.parquet": nli(9), f"v1.0/{place}": nli(9), "v2/test/0000.parquet": nli(9)})
    folder = re.escape(f"v1.0/{place.rpartition('/')[0]} ")
    with pytest.raises(TaskError, match=rf"allenai/qa is a dataset script.*found some in {folder}.*your own"):
        load_task(f"hf:allenai/qa/v1.0{OPTIONS}")
    assert load_task(f"hf:allenai/qa/v2{OPTIONS}").source["copy"]["config"] == "v2"


@pytest.mark.parametrize("copy", [None, {}])
def test_a_script_without_a_copy(script, copy):
    script(copy)
    with pytest.raises(
        DownloadError, match=r"qa is a dataset script.*no parquet copy.*hf:/path.*SPLIT.jsonl"
    ):
        load_task(f"hf:qa{OPTIONS}")


def test_no_copy_is_read_where_it_is_not_what_was_asked_for(script, hub):
    """Another revision; a record that is not kept; a Hub that fails."""
    repo = script(TWO)
    with pytest.raises(DownloadError, match="scripts are no longer supported"):
        load_task(f"hf:allenai/qa/v1.0{OPTIONS}&revision={repo.head}")
    with pytest.raises(DownloadError, match="scripts are no longer supported"):
        load_data(TaskSpec("hf", "allenai/qa", {"config": "v1.0"}, "hf:allenai/qa"))
    hub.fault("/revision/refs/", "status", 500)
    with pytest.raises(DownloadError, match=r"can't load the dataset 'allenai/qa'.*500"):
        load_task(f"hf:allenai/qa/v1.0{OPTIONS}")


@pytest.mark.parametrize("name", ["qa", "allenai/qa"])
def test_a_dataset_is_found_by_the_id_that_it_once_had(script, tmp_path, name):
    """No script: files as they are on main."""
    files = {"README.md": b"# QA\n"}
    for split, n in (("train", 30), ("validation", 10)):
        nli(n, n).to_parquet(str(tmp_path / "one.parquet"))
        files[f"{split}-00000.parquet"] = (tmp_path / "one.parquet").read_bytes()
    script().commit(files)
    task = load_task(f"hf:{name}{OPTIONS}")
    assert "copy" not in task.source
    assert prompts(task.validation) == {f"p{i} Question: h?" for i in range(10, 20)}
    assert len(task.train) + len(task.test) == 30


def test_prompts_over_a_copy(script, tmp_path, monkeypatch, request):
    request.addfinalizer(read_templates.cache_clear)
    repo = script(TWO)
    (tmp_path / "ps" / "qa" / "v1.0").mkdir(parents=True)
    (tmp_path / "ps" / "qa" / "v1.0" / "templates.yaml").write_text(
        "dataset: qa\nsubset: v1.0\ntemplates:\n  a: !Template\n    answer_choices: yes ||| no\n    id: a\n"
        "    jinja: '{{premise}}? ||| {{answer_choices[label]}}'\n    metadata: !TemplateMetadata\n"
        "      original_task: true\n    name: a\n    reference: ''\n"
    )
    monkeypatch.setenv("PHATGOOSE_PROMPTSOURCE", str(tmp_path / "ps"))
    read_templates.cache_clear()
    task = load_task("prompted:qa/v1.0")
    assert task.source["copy"]["commit"] == repo.branches[BRANCH]
    assert prompts(task.validation) == {f"p{i}?" for i in range(40, 50)}
    assert {e.targets for e in task.validation} == {("yes",), ("no",)}


def test_a_copy_in_a_folder_is_read_under_the_hubs_name(tmp_path):
    """With its config as the last folder, its own splits, a class label by number, and splits that are left out."""
    place = tmp_path / "owner" / "name" / "part"
    place.mkdir(parents=True)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["n", "y"]))
    for split, count in (("train", 30), ("test", 10)):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(place / f"{split}.parquet")
    spec = "hf:owner/name/part?input={text}?&answer_index=label&choices=no|yes"
    task = load_task(spec, folder=tmp_path)
    assert len(task.test) == 10
    assert {e.choices for e in task.train} == {("no", "yes")}
    assert {e.targets for e in task.train if e.input == "train 1?"} <= {("yes",)}
    alone = load_task(f"{spec}&train=", folder=tmp_path)
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (0, 0, 10)
    as_train = load_task(f"{spec}&train=test&test=", folder=tmp_path)
    assert sum(len(as_train.split(s)) for s in ("train", "validation", "test")) == 10
