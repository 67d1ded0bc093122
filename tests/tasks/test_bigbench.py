"""BIG-bench's semantics on small files made here; the real archive in test_bigbench_real.py."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace

import pytest

from phatgoose import fetch
from phatgoose.errors import TaskError, UnknownName
from phatgoose.records import SPLITS, Example
from phatgoose.tasks import list_tasks, load_task
from phatgoose.tasks.sources import bigbench, bigbench_files

HEADER = {"canary": "c", "name": "n", "description": "d", "keywords": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHATGOOSE_BIGBENCH", raising=False)
    monkeypatch.delenv("PHATGOOSE_DOWNLOADS", raising=False)


def put(folder, name, examples=None, packed=False, **fields):
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(HEADER | fields | ({} if examples is None else {"examples": examples}))
    if packed:
        (place / "task.json.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (place / "task.json").write_text(text)
    return folder


def rows(task):
    return [e for name in SPLITS for e in task.split(name)]


def only(tmp_path, row, **fields):
    (example,) = rows(load_task("bigbench:t", folder=put(tmp_path / "tasks", "t", [row], **fields)))
    return example


def test_the_papers_prompt(tmp_path):
    fields = {
        "example_input_prefix": "Today I ",
        "example_output_prefix": ". Yesterday I ",
        "task_prefix": "",
    }
    example = only(tmp_path, {"input": "walk", "target": "walked"}, **fields)
    assert example == Example("Today I walk. Yesterday I\nAnswer:", ("walked",))


@pytest.mark.parametrize(
    ("before", "after", "prompt"),
    [
        (None, None, "Do it.\nx"),  # a generic prefix gives way to a line break
        ("\nQ: ", "\nA: ", "Do it.\nx"),
        ("Input:", " Output: ", "Do it.\nx"),
        ("", "", "Do it.\nx"),
        ("\n\nQuestion : ", "\n\n  Best choice: ", "Do it.\nx"),
        ("\nStatement: ", "\nTrue or False? ", "Do it.\nStatement: x\nTrue or False?"),
        ("\nHuman: ", " = ", "Do it.\nHuman: x ="),
    ],
)
def test_prefixes(tmp_path, before, after, prompt):
    fields = {"task_prefix": "Do it.", "example_input_prefix": before, "example_output_prefix": after}
    assert only(tmp_path, {"input": "x", "target": "y"}, **fields).input == prompt + "\nAnswer:"


def test_no_line_break_where_the_instruction_brings_its_own(tmp_path):
    assert (
        only(tmp_path, {"input": "x", "target": "y"}, task_prefix="Do it:\n\n").input
        == "Do it:\n\nx\nAnswer:"
    )
    assert only(tmp_path, {"input": "x", "target": "y"}, task_prefix="Do it: ").input == "Do it: x\nAnswer:"


@pytest.mark.parametrize("label", ["Q:", "question :", " INPUT:\n", "", "Text:", "A: ", "\nThe answer is: "])
def test_generic_labels(label):
    assert bigbench.is_generic(label)


@pytest.mark.parametrize(
    "label", ["Today I ", "\nSwedish proverb: ", "\nJoke or not? ", " is/are formatted as ", " = ", "If "]
)
def test_instructions_are_not_generic(label):
    assert not bigbench.is_generic(label)


def test_choices_are_shown_in_an_order_of_their_own(tmp_path):
    scores = {"right": 1, "b": 0, "c": 0, "d": 0}
    task = load_task(
        "bigbench:t",
        folder=put(
            tmp_path, "t", [{"input": f"q{i}", "target_scores": scores} for i in range(200)], metrics=["x"]
        ),
    )
    places = []
    for e in rows(task):
        question = e.input.partition("\n")[0]
        assert e.input == question + "".join(f"\n  choice: {c}" for c in e.choices) + "\nAnswer:"
        assert e.targets == ("right",)
        assert sorted(e.choices) == sorted(scores)
        places.append(e.choices.index("right"))
    assert all(30 < places.count(i) < 70 for i in range(4))
    # Neither the file's order nor the machine plays a part.
    turned = {"input": "q7", "target_scores": dict(reversed(scores.items()))}
    by_hand = sorted(scores, key=lambda c: hashlib.sha256(f"q7\0{c}".encode()).digest())
    assert only(tmp_path / "2", turned).choices == tuple(by_hand)


@pytest.mark.parametrize("hide", [False, "false"])
def test_choices_can_be_hidden_and_have_a_prefix(tmp_path, hide):
    row = {"input": "q", "target_scores": {"a ": 0, " b": 1}}
    hidden = only(tmp_path / "1", row, append_choices_to_input=hide)
    assert (hidden.input, set(hidden.choices), hidden.targets) == ("q\nAnswer:", {"a", "b"}, ("b",))
    shown = only(tmp_path / "2", row, append_choices_to_input=True, choice_prefix=" option: ")
    assert shown.input == f"q option: {shown.choices[0]} option: {shown.choices[1]}\nAnswer:"


def test_the_output_prefix_comes_after_the_choices(tmp_path):
    e = only(
        tmp_path, {"input": "q", "target_scores": {"a": 0, "b": 1}}, example_output_prefix="\nJoke or not? "
    )
    assert e.input.endswith(f"choice: {e.choices[1]}\nJoke or not?\nAnswer:")


def test_several_right_choices_and_fractional_scores(tmp_path):
    e = only(tmp_path / "1", {"input": "q", "target_scores": {"a": 1, "b": 0, "c": 1}})
    assert set(e.targets) == {"a", "c"}
    e = only(tmp_path / "2", {"input": "q", "target_scores": {"a": 0.2, "b": 0.5, "c": -1}})
    assert e.targets == ("b",)


def test_rows_that_cannot_be_ranked_are_dropped_and_counted(tmp_path):
    examples = [
        {"input": "1", "target_scores": {"a": 0, "b": 0}},
        {"input": "2", "target_scores": {"a": 1}},
        {"input": "3", "target_scores": {"a": 1, "": 0}},
        {"input": "4", "target": ""},
        {"input": "5", "target_scores": {"a": 1, "b": 0}},
        {"input": "5", "target_scores": {"b": 0, "a": 1}},
    ]
    task = load_task("bigbench:t", folder=put(tmp_path, "t", examples))
    assert len(rows(task)) == 1
    assert task.source["dropped"] == {"empty_answer": 2, "no_right_choice": 1, "one_choice": 1}
    assert task.source["merging"] == {"duplicate": 1}


@pytest.mark.parametrize(
    ("target", "expected"), [("a", ("a",)), (["a", "b", "a"], ("a", "b")), (12, ("12",)), (1.5, ("1.5",))]
)
def test_targets(tmp_path, target, expected):
    assert only(tmp_path, {"input": "q", "target": target}) == Example("q\nAnswer:", expected)


@pytest.mark.parametrize(
    ("fields", "ranked"),
    [
        ({"preferred_score": "multiple_choice_grade"}, True),
        ({"preferred_score": "exact_str_match", "metrics": ["multiple_choice_grade"]}, False),
        ({"metrics": ["exact_str_match", "multiple_choice_grade"]}, True),
        ({"metrics": ["exact_str_match"]}, False),
        ({"preferred_score": "rougeLsum"}, False),
    ],
)
def test_both_target_and_scores(tmp_path, fields, ranked):
    row = {"input": "q", "target": "long a", "target_scores": {"a": 1, "b": 0}}
    e = only(tmp_path, row, **fields)
    assert (e.choices is not None, e.targets) == ((True, ("a",)) if ranked else (False, ("long a",)))
    assert "choice: a" in e.input  # BIG-bench shows them either way


def test_a_spec_can_say_that_what_has_choices_is_ranked(tmp_path):
    row = {"input": "q", "target": "long a", "target_scores": {"a": 1, "b": 0}}
    folder = put(tmp_path / "both", "t", [row], preferred_score="exact_str_match")
    assert rows(load_task("bigbench:t", folder=folder))[0].choices is None
    assert rows(load_task("bigbench:t?ranked=false", folder=folder))[0].choices is None
    (e,) = rows(load_task("bigbench:t?ranked=true", folder=folder))
    assert (set(e.choices), e.targets) == ({"a", "b"}, ("a",))
    with pytest.raises(TaskError, match="ranked is true or false, got 'yes'"):
        load_task("bigbench:t?ranked=yes", folder=folder)
    without = put(tmp_path / "without", "t", [row, {"input": "p", "target": "a"}])
    with pytest.raises(TaskError, match='example 1: no "target_scores", and the spec says ranked=true'):
        load_task("bigbench:t?ranked=true", folder=without)


def test_scores_alone_are_ranked_whatever_the_metric(tmp_path):
    folder = put(
        tmp_path, "t", [{"input": "q", "target_scores": {"a": 1, "b": 0}}], preferred_score="macro_f1"
    )
    source = load_task("bigbench:t", folder=folder).source
    assert source["scored_as"] == ["rank classification"]
    assert (source["preferred_score"], source["other_metric"]) == ("macro_f1", True)


def test_subtasks_together_and_alone(tmp_path):
    put(tmp_path, "maps")
    past = {"example_input_prefix": "Today I ", "example_output_prefix": ". Yesterday I "}
    put(tmp_path, "maps/past", [{"input": "walk", "target": "walked"}], packed=True, **past)
    put(tmp_path, "maps/plural", [{"input": "dog", "target": "dogs"}], task_prefix="Make many:\n")
    task = load_task("bigbench:maps", folder=tmp_path)
    assert {e.input for e in rows(task)} == {"Today I walk. Yesterday I\nAnswer:", "Make many:\ndog\nAnswer:"}
    assert task.source["subtasks"] == ["maps/past", "maps/plural"]
    alone = load_task("bigbench:maps/past", folder=tmp_path)
    assert [e.targets for e in rows(alone)] == [("walked",)]
    assert list_tasks("bigbench", folder=tmp_path) == ["maps", "maps/past", "maps/plural"]


def test_folder_of_the_repository_and_environment(tmp_path, monkeypatch):
    put(tmp_path / "bigbench" / "benchmark_tasks", "t", [{"input": "q", "target": "a"}])
    assert len(rows(load_task("bigbench:t", folder=tmp_path))) == 1
    monkeypatch.setenv("PHATGOOSE_BIGBENCH", str(tmp_path / "bigbench"))
    task = load_task("bigbench:t")
    assert len(rows(task)) == 1
    assert "package" not in task.source


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("social_iq", UnknownName, "did you mean 'social_iqa'"),
        ("maps/past_tens", UnknownName, "subtask of maps 'maps/past_tens': did you mean 'maps/past_tense'"),
        ("past_tense", UnknownName, "It looks like 'maps/past_tense'"),
        ("maps?x=1", UnknownName, "option"),
        ("code", TaskError, "programmatic"),
    ],
)
def test_unknown_names(tmp_path, name, kind, says):
    put(tmp_path, "maps")
    for known in ("social_iqa", "maps/past_tense", "maps/plural"):
        put(tmp_path, known, [{"input": "q", "target": "a"}])
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "task.py").write_text("raise SystemExit('never run')")
    with pytest.raises(kind, match=says):
        load_task(f"bigbench:{name}", folder=tmp_path)


def test_a_folder_without_tasks(tmp_path):
    with pytest.raises(TaskError, match="holds no BIG-bench tasks"):
        load_task("bigbench:t", folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("text", "expected an object"),
        ({"target": "a"}, "expected an object"),
        ({"input": 3, "target": "a"}, "expected an object"),
        ({"input": "q"}, 'neither "target" nor'),
        ({"input": "q", "target": {"a": 1}}, '"target" holds dict'),
        ({"input": "q", "target": ["a", None]}, '"target" holds NoneType'),
        ({"input": "q", "target_scores": ["a"]}, "must be an object of choice"),
        ({"input": "q", "target_scores": {"a": "1", "b": 0}}, "score '1', expected a number"),
    ],
)
def test_malformed_rows_name_file_and_row(tmp_path, row, match):
    put(tmp_path, "t", [{"input": "fine", "target": "a"}, row])
    with pytest.raises(TaskError, match=rf"t/task\.json, example 1: .*{match}"):
        load_task("bigbench:t", folder=tmp_path)


def test_malformed_files(tmp_path):
    put(tmp_path, "none", [])
    with pytest.raises(TaskError, match="at least one row"):
        load_task("bigbench:none", folder=tmp_path)
    put(tmp_path, "alone")
    with pytest.raises(TaskError, match="neither"):
        load_task("bigbench:alone", folder=tmp_path)
    put(tmp_path, "prefix", [{"input": "q", "target": "a"}], task_prefix=3)
    with pytest.raises(TaskError, match='"task_prefix" must be text'):
        load_task("bigbench:prefix", folder=tmp_path)
    put(tmp_path, "flag", [{"input": "q", "target": "a"}], append_choices_to_input="maybe")
    with pytest.raises(TaskError, match="append_choices_to_input"):
        load_task("bigbench:flag", folder=tmp_path)
    (put(tmp_path, "cut", []) / "cut" / "task.json").write_text('{"examples": [')
    with pytest.raises(TaskError, match=r"cut/task\.json can't be read"):
        load_task("bigbench:cut", folder=tmp_path)
    (put(tmp_path, "list", []) / "list" / "task.json").write_text("[]")
    with pytest.raises(TaskError, match="expected a JSON object"):
        load_task("bigbench:list", folder=tmp_path)
    (put(tmp_path, "gz", packed=True) / "gz" / "task.json.gz").write_bytes(gzip.compress(b"{}" * 99)[:-5])
    with pytest.raises(TaskError, match=r"gz can't be read"):
        load_task("bigbench:gz", folder=tmp_path)


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """An archive laid out like the real one, pinned in its place."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        tasks = "bigbench-1.0.0/bigbench/benchmark_tasks"
        row = {"input": "q", "target": "a"}
        add(f"{tasks}/t/task.json", json.dumps(HEADER | {"examples": [row]}).encode())
        add(f"{tasks}/maps/task.json", json.dumps(HEADER).encode())
        add(f"{tasks}/maps/one/task.json", json.dumps(HEADER | {"examples": [row]}).encode())
        add(f"{tasks}/t/README.md", b"not wanted")
        add(f"{tasks}/../../escape/task.json", b"{}")
        add(f"{tasks}/code/task.py", b"raise SystemExit")
        add("bigbench-1.0.0/setup.py", b"raise SystemExit")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / bigbench_files.PACKAGE.filename).write_bytes(data.getvalue())
    monkeypatch.setenv("PHATGOOSE_DOWNLOADS", str(downloads))
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    monkeypatch.setattr(bigbench_files, "PACKAGE", replace(bigbench_files.PACKAGE, sha256=digest))
    return downloads / bigbench_files.PACKAGE.filename


def test_only_the_data_is_unpacked_and_only_once(sdist, tmp_path, monkeypatch):
    task = load_task("bigbench:t")
    assert task.source["package"] == "bigbench==1.0.0"
    assert task.source["sha256"] == bigbench_files.PACKAGE.sha256
    (place,) = (p for p in (tmp_path / "cache" / "bigbench").iterdir() if p.is_dir())
    kept = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert kept == ["maps/one/task.json.gz", "maps/task.json.gz", "programmatic.json", "t/task.json.gz"]
    with pytest.raises(TaskError, match="programmatic"):
        load_task("bigbench:code")
    sdist.unlink()
    monkeypatch.setattr(fetch.PinnedPackage, "_download", None)
    assert load_task("bigbench:maps/one").hash == task.hash


def test_an_interrupted_unpacking_leaves_nothing(sdist, tmp_path, monkeypatch):
    real = gzip.compress
    calls = iter(range(99))

    def stop(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gzip, "compress", stop)
        with pytest.raises(KeyboardInterrupt):
            load_task("bigbench:t")
    assert not [p for p in (tmp_path / "cache" / "bigbench").iterdir() if p.is_dir()]
    assert len(rows(load_task("bigbench:t"))) == 1
