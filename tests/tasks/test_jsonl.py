import gzip
import json
from collections import Counter

import pytest

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example
from phatgoose.tasks import load_task


def write(path, rows):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def only(path, options=""):
    task = load_task(f"jsonl:{path}{options}")
    (example,) = [e for name in SPLITS for e in task.split(name)]
    return example


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_plain_and_gzipped(tmp_path, name):
    path = write(tmp_path / name, [{"input": " Say hé \n", "target": " hé "}, "", "   "])
    assert only(path) == Example("Say hé", ("hé",))
    assert load_task(f"jsonl:{path}").name == "jsonl:a"


def test_a_line_break_at_a_prompts_end_is_part_of_it(tmp_path):
    """What a template rendered ends so: "### Response:\n", "<|im_start|>assistant\n"."""
    row = {"input": " Walk?\n### Response:\n", "target": "walked"}
    assert only(write(tmp_path / "a.jsonl", [row])) == Example("Walk?\n### Response:\n", ("walked",))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input": "p", "target": 3}, Example("p", ("3",))),
        ({"input": "p", "target": ["a", "b", "a"]}, Example("p", ("a", "b"))),
        ({"input": "p", "targets": ["a", "b"]}, Example("p", ("a", "b"))),
        ({"input": "p", "target": "b", "choices": ["a", "b"]}, Example("p", ("b",), ("a", "b"))),
        ({"input": "p", "choices": ["a", "b"], "answer_index": 1}, Example("p", ("b",), ("a", "b"))),
        (
            {"input": "p", "target": "b", "choices": ["a", "b"], "answer_index": 1},
            Example("p", ("b",), ("a", "b")),
        ),
        ({"input": "p", "target": "b", "choices": ["a", "b"], "_note": 7}, Example("p", ("b",), ("a", "b"))),
        ({"input": "p", "target": "x", "choices": None}, Example("p", ("x",))),
    ],
)
def test_fields(tmp_path, row, expected):
    assert only(write(tmp_path / "a.jsonl", [row])) == expected


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"q": "p", "a": "x"}, "?input=q&target=a", Example("p", ("x",))),
        ({"q": "p", "a": "x", "n": 1}, "?input={{{q}}} go&target=a&ignore=n", Example("{p} go", ("x",))),
        ({"q": "p", "a": "x", "n": 1}, "?input=q&target=a&ignore=*", Example("p", ("x",))),
        ({"s": "p", "l": 0}, "?input=s&choices=yes|no&answer_index=l", Example("p", ("yes",), ("yes", "no"))),
        (
            {"s": "p", "l": "2"},
            "?input=s&choices=y|n&answer_index=l&answer_base=1",
            Example("p", ("n",), ("y", "n")),
        ),
        ({"s": "p", "l": "B"}, "?input=s&choices=y|n&answer_index=l", Example("p", ("n",), ("y", "n"))),
        (
            {"s": "p", "o1": "u", "o2": "v", "l": 1},
            "?input=s&choices={o1}|not {o2}&answer_index=l",
            Example("p", ("not v",), ("u", "not v")),
        ),
        (
            {"s": "p", "l": "n"},
            "?input=s&target=l&values=y:Yes|n:No&choices=Yes|No",
            Example("p", ("No",), ("Yes", "No")),
        ),
        (
            {"s": "p", "c": {"text": ["a", "b"]}, "l": "A"},
            "?input=s&choices=c.text&answer_index=l",
            Example("p", ("a",), ("a", "b")),
        ),
        ({"s": "p", "t": "x"}, "?input=s&target=[{t}]", Example("p", ("[x]",))),
        (
            {"w": ["a", "b"], "t": [["x", 1, "y"], ["z", 2, "u"]]},
            "?input={w|, }: {t|; }&target=w",
            Example("a, b: x | 1 | y; z | 2 | u", ("a", "b")),
        ),
        (
            {"q": "p", "c": ["a", "b"], "l": 1},
            "?input={q} ({choices| or })&choices=c&answer_index=l",
            Example("p (a or b)", ("b",), ("a", "b")),
        ),
        (
            {"q": "p", "c": ["u", "v"], "n": ["1", "2"], "l": "1"},
            "?input=q&choices=c&answer_index=l&answer_labels=n",
            Example("p", ("u",), ("u", "v")),
        ),
        (
            {"q": "p", "r": 0.8},
            "?input=q&target=r&values=<=0.2:bad|>=0.8:good&choices=bad|good",
            Example("p", ("good",), ("bad", "good")),
        ),
    ],
)
def test_options(tmp_path, row, options, expected):
    assert only(write(tmp_path / "a.jsonl", [row]), options) == expected


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"target": "x"}, "", r"line 2: unknown column 'input'"),
        ({"input": "p"}, "", r"line 2: no target"),
        ({"input": "p", "target": "x", "label": 3}, "", r'line 2: field "label" is not read'),
        ({"input": "p", "target": "x", "targets": ["x"]}, "", r"line 2: has both"),
        ({"input": " ", "target": "x"}, "", r"line 2: empty input"),
        ({"input": "p", "target": " "}, "", r"line 2: empty target"),
        ({"input": "p", "target": []}, "", r"line 2: no answer"),
        ({"input": "p", "target": {"a": 1}}, "", r"line 2: expected text or a number, got dict"),
        ({"input": "p", "target": "c", "choices": ["a", "b"]}, "", r"line 2: target 'c' is not among"),
        ({"input": "p", "target": "a", "choices": ["a", " a "]}, "", r"line 2: fewer than two"),
        ({"input": "p", "target": "a", "choices": "ab"}, "", r"line 2: choices in 'choices' are str"),
        (
            {"input": "p", "choices": ["a", "b"], "answer_index": 2},
            "",
            r"line 2: answer_index 2 points outside",
        ),
        ({"input": "p", "choices": ["a", "b"], "answer_index": -1}, "", r"line 2: no answer_index"),
        (
            {"input": "p", "choices": ["a", "b"], "answer_index": "x"},
            "",
            r"line 2: answer_index 'x' is neither",
        ),
        (
            {"input": "p", "target": "a", "choices": ["a", "b"], "answer_index": 1},
            "",
            r"line 2: answer_index says 'b'",
        ),
        ({"input": "p", "target": "a", "answer_index": 1}, "", r"line 2: an answer_index needs choices"),
        ({"input": "p", "target": "e"}, "?values=x:y", r"line 2: unknown raw target value 'e'"),
        (
            {"input": "p", "target": "e"},
            "?input={inptu}",
            r"line 1: unknown column 'inptu': did you mean 'input'",
        ),
        ({"input": "p", "target": "e"}, "?input=a } {input}", r"line 1: unbalanced }"),
        ({"input": "p", "target": "\ud800"}, "", r"line 2: .*Unicode"),
        ({"input": "p", "target": "x", "split": "dev"}, "", r"line 2: .split. must be train"),
        ({"input": "p", "target": "x", "split": "test"}, "", r"line 2: either every row"),
        ("[1, 2]", "", r"line 2: expected a JSON object"),
        ('{"input": ', "", r"line 2: not JSON"),
    ],
)
def test_bad_rows_name_their_line(tmp_path, row, options, match):
    path = write(tmp_path / "a.jsonl", [{"input": "fine", "target": "x"}, row])
    with pytest.raises(TaskError, match=match):
        load_task(f"jsonl:{path}{options}")


def test_bad_files(tmp_path):
    with pytest.raises(TaskError, match="does not exist"):
        load_task(f"jsonl:{tmp_path}/none.jsonl")
    with pytest.raises(TaskError, match="no examples"):
        load_task(f"jsonl:{write(tmp_path / 'empty.jsonl', [''])}")
    cut = write(tmp_path / "cut.jsonl.gz", [{"input": f"{i} {i * i}", "target": "x"} for i in range(999)])
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(TaskError, match="can't be read past line"):
        load_task(f"jsonl:{cut}")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(TaskError, match=r"plain.jsonl.gz can't be read: Not a gzipped"):
        load_task(f"jsonl:{tmp_path}/plain.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "\xe9", "target": "x"}')
    with pytest.raises(TaskError, match=r"latin.jsonl can't be read: 'utf-8'"):
        load_task(f"jsonl:{tmp_path}/latin.jsonl")
    with pytest.raises(TaskError, match="values= should read"):
        load_task(f"jsonl:{write(tmp_path / 'a.jsonl', [{'input': 'p', 'target': 'x'}])}?values=xy")


def test_own_splits(tmp_path):
    rows = [{"input": f"p{i}", "target": "x", "split": SPLITS[i % 3]} for i in range(30)]
    task = load_task(f"jsonl:{write(tmp_path / 'a.jsonl', rows)}")
    for i, name in enumerate(SPLITS):
        assert {e.input for e in task.split(name)} == {f"p{j}" for j in range(i, 30, 3)}


def test_choices_are_drawn_by_hash_with_the_right_one_anywhere(tmp_path):
    names = [f"c{i}" for i in range(40)]
    rows = [{"q": f"row {i}", "c": names, "l": i % 40} for i in range(200)]
    options = "?input={q}: {choices|, }.&choices=c&answer_index=l&draw=5"
    task = load_task(f"jsonl:{write(tmp_path / 'a.jsonl', rows)}{options}")
    found = [e for split in SPLITS for e in task.split(split)]
    assert len(found) == 200
    for e in found:
        assert len(set(e.choices)) == 5
        assert e.targets[0] in e.choices
        assert e.input.endswith(": " + ", ".join(e.choices) + ".")
    places = Counter(e.choices.index(e.targets[0]) for e in found)
    assert set(places) == set(range(5))
    assert min(places.values()) > 20
    assert len({c for e in found for c in e.choices}) == 40
    again = load_task(
        f"jsonl:{write(tmp_path / 'b.jsonl', [{**r, 'c': names[::-1], 'l': 39 - r['l']} for r in rows])}{options}"
    )
    assert again.hash == task.hash  # the order of the source's choices doesn't matter


def test_rows_of_other_answers_can_be_left_out(tmp_path):
    rows = [{"q": str(i), "r": i / 10} for i in range(10)]
    spec = f"jsonl:{write(tmp_path / 'a.jsonl', rows)}?input=q&target=r&values=<=0.2:bad|>=0.8:good"
    with pytest.raises(TaskError, match=r"line 4: unknown raw target value '0.3'.*others=drop"):
        load_task(spec)
    task = load_task(f"{spec}&others=drop")
    assert sum(len(task.split(s)) for s in SPLITS) == 5
    assert task.source["dropped"] == {"other_answer": 5}
    with pytest.raises(TaskError, match="others=drop goes with values="):
        load_task(f"{spec}&others=keep")
    with pytest.raises(TaskError, match="no number"):
        load_task(
            f"jsonl:{write(tmp_path / 'b.jsonl', [{'q': 'p', 'r': 'x'}])}?input=q&target=r&values=>=1:a"
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("?input=q&target=t&draw=3", "draw= needs choices="),
        ("?input=q&choices=c&answer_index=l&draw=1", "draw= needs choices=, and a number of at least 2"),
        ("?input=q&target=t&answer_labels=c", "answer_labels= needs answer_index="),
        (
            "?input=q&choices=c&answer_index=l&answer_labels=q",
            "'q' isn't a list of a label for each of the 2",
        ),
        ("?input=q&choices=c&answer_index=t&answer_labels=c", r"'x' is not among the labels \['a', 'b'\]"),
        ("?input={q|, }&target=t", "'q' is str, expected a list to join"),
    ],
)
def test_choices_that_mean_nothing_are_refused(tmp_path, options, match):
    row = {"q": "p", "c": ["a", "b"], "l": 0, "t": "x"}
    with pytest.raises(TaskError, match=match):
        load_task(f"jsonl:{write(tmp_path / 'a.jsonl', [row])}{options}&ignore=*")
