import json

import pytest

from conftest import write_rows
from phatgoose.errors import TaskError, UnknownName
from phatgoose.records import SPLITS
from phatgoose.tasks import Fractions, list_tasks, load_task, split_spec
from phatgoose.tasks.examples import make_example
from phatgoose.tasks.load import SOURCES, check_task, find_source, without_paths
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.splits import RULE, build_task


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sums.jsonl"
    write_rows(path, ({"input": f"{i}+1=", "target": i + 1} for i in range(200)))
    return path


def test_spec():
    spec = split_spec("hf:a/b/c?input={x}%26{y}%0A50%25 sure&target=z")
    assert (spec.source, spec.name) == ("hf", "a/b/c")
    assert spec.options == {"input": "{x}&{y}\n50% sure", "target": "z"}
    assert split_spec("jsonl:C:/x=y+z.jsonl").name == "C:/x=y+z.jsonl"


@pytest.mark.parametrize(
    "bad", ["social_iqa", ":x", "bigbench:", "", "jsonl:x?input", "jsonl:x?=y", "jsonl:x?a=1&a=2"]
)
def test_malformed_specs(bad):
    with pytest.raises(TaskError, match="task spec"):
        split_spec(bad)


def test_unknown_source_and_option_suggest():
    with pytest.raises(UnknownName, match="did you mean 'bigbench'"):
        load_task("bigbnech:x")
    with pytest.raises(UnknownName, match="did you mean 'target'"):
        load_task("jsonl:x.jsonl?tarjet=a")
    with pytest.raises(UnknownName):
        list_tasks("jsonl")


def test_limit_and_fractions_and_source(file, tmp_path):
    whole = load_task(f"jsonl:{file}")
    few = load_task("jsonl:sums.jsonl", folder=tmp_path, limit=5)
    assert few.train == whole.train[:5]
    assert few.test == whole.test[:5]
    assert few.source["limit"] == {"train": 5, "validation": 5, "test": 5}
    assert few.source["folder"] == str(tmp_path)
    assert few.hash != whole.hash
    only_test = load_task(f"jsonl:{file}", limit={"test": 1})
    assert (len(only_test.test), only_test.train) == (1, whole.train)
    half = load_task(f"jsonl:{file}", fractions=Fractions(test=0.5, validation=0))
    assert {e.input for e in whole.test} < {e.input for e in half.test}
    assert not half.validation
    json.dumps(few.source)
    with pytest.raises(TaskError, match="limit of tset"):
        load_task(f"jsonl:{file}", limit={"tset": 1})


def test_same_source_same_hash(file):
    assert load_task(f"jsonl:{file}").hash == load_task(f"jsonl:{file}").hash


@pytest.mark.parametrize(
    ("spec", "shared"),
    [
        ("jsonl:/home/me/secret plans/data.jsonl?input=q", "jsonl:data.jsonl?input=q"),
        ("jsonl:data.jsonl", "jsonl:data.jsonl"),
        ("hf:/home/me/set?target=a", "hf:set?target=a"),
        ("hf:org/set", "hf:org/set"),
        ("from-a-package:/home/me/set.csv?sheet=1", "from-a-package:set.csv?sheet=1"),
        ("bigbench:a/b", "bigbench:a/b"),
    ],
)
def test_what_is_given_away_holds_no_local_path(spec, shared):
    assert without_paths({"spec": spec, "folder": "/home/me", "rows": 3}) == {"spec": shared, "rows": 3}


TOY = TaskSource(
    load=lambda spec, folder, fractions: build_task(
        spec.name, {"train": [make_example(f"{spec.name} {i}", ["x"]) for i in range(40)]}, {}, fractions
    ),
    check=lambda spec, folder: None if folder else "the toy shop",
    options=("size",),
)


def test_a_source_is_one_object(monkeypatch):
    monkeypatch.setitem(SOURCES.table, "toy", f"{__name__}:TOY")
    task = load_task("toy:ball?size=3")
    assert sum(len(task.split(split)) for split in SPLITS) == 40
    assert task.source["split_rule"]["version"] == RULE
    assert check_task("toy:ball") == "the toy shop"
    assert check_task("toy:ball", "/") is None
    for call in (load_task, check_task):
        with pytest.raises(UnknownName, match="option of toy: specs 'sise': did you mean 'size'"):
            call("toy:ball?sise=3")
    with pytest.raises(UnknownName, match="can be listed 'toy': known: bbh, bigbench"):
        list_tasks("toy")
    assert all(isinstance(find_source(name), TaskSource) for name in SOURCES)


def test_long_prompts_and_what_is_more_than_the_rarest_answer_has_are_left_out(tmp_path):
    rows = [{"input": f"row {i}", "target": "ab"[i % 5 == 0]} for i in range(300)]
    rows.append({"input": "a prompt of five words", "target": "a"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = f"jsonl:{tmp_path}/rows.jsonl"
    whole, even = load_task(spec), load_task(f"{spec}?balance=true&max_words=4")
    for split in SPLITS:
        answers = [e.targets[0] for e in even.split(split)]
        rarest = sum(e.targets[0] == "b" for e in whole.split(split))
        assert answers.count("a") == answers.count("b") == rarest
        assert abs(answers[:10].count("a") - answers[:10].count("b")) <= 1  # so any first rows are balanced
        for answer in "ab":
            kept = [e for e in even.split(split) if e.targets[0] == answer]
            assert (
                kept
                == [e for e in whole.split(split) if e.targets[0] == answer and "five" not in e.input][
                    :rarest
                ]
            )
    assert even.source["dropped"] == {"long": 1, "unbalanced": 180}
    assert even.source["rows"] == {split: len(even.split(split)) for split in SPLITS}
    assert len(load_task(f"{spec}?balance=true", limit=4).train) == 4
    with pytest.raises(TaskError, match="balance must be true"):
        load_task(f"{spec}?balance=yes")
    with pytest.raises(TaskError, match="no prompt has at most 1 words"):
        load_task(f"{spec}?max_words=1")
