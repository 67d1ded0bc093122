import hashlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Example
from phatgoose.tasks.splits import Fractions, build_task, hash_fraction, merge, normalise, split

WORDS = st.lists(st.sampled_from(["a", "A", "b", "ß", "SS", " ", "\n", "c"]), min_size=1, max_size=5).map(
    "".join
)
PROMPTS = WORDS.filter(lambda s: s.strip() != "").map(str.strip)
ROWS = st.lists(
    st.tuples(PROMPTS, st.sampled_from(["x", "y", "z"])).map(lambda r: Example(r[0], (r[1],))), max_size=40
)


def rows(n: int) -> list[Example]:
    return [Example(f"prompt {i}", (str(i),)) for i in range(n)]


def test_position_is_the_documented_formula():
    text = "  What is\n 2 + 2?\tSTRASSE"
    digest = hashlib.sha256(b"what is 2 + 2? strasse").hexdigest()
    assert hash_fraction(text) == int(digest[:16], 16) / 2**64
    assert hash_fraction("Straße") == hash_fraction(" STRASSE")


def test_fractions_and_order():
    task = build_task("t", {"train": rows(2000)}, {}, Fractions())
    for name, low, high in (("test", 0, 0.2), ("validation", 0.2, 0.3), ("train", 0.3, 1)):
        h = [hash_fraction(e.input) for e in task.split(name)]
        assert h == sorted(h)
        assert all(low <= x < high + 1e-12 for x in h)
        assert len(h) == pytest.approx(2000 * (high - low), abs=60)
    assert sum(task.source["rows"].values()) == 2000
    assert task.source["split_rule"] == {"version": 1, "test": 0.2, "validation": 0.1}


@given(ROWS)
def test_splits_are_disjoint_and_lose_no_prompt(examples):
    splits, _ = split({"train": examples}, Fractions())
    keys = [{normalise(e.input) for e in splits[name]} for name in SPLITS]
    assert sum(map(len, keys)) == len(set().union(*keys))  # disjoint
    assert set().union(*keys) == {normalise(e.input) for e in examples}


@given(ROWS, ROWS, st.randoms())
def test_a_prompts_split_depends_on_nothing_else(examples, others, random):
    before, _ = split({"train": examples}, Fractions())
    mixed = examples + others
    random.shuffle(mixed)
    after, _ = split({"train": mixed}, Fractions())
    for name in SPLITS:
        assert {e.input for e in before[name]} <= {e.input for e in after[name]}


@given(ROWS, ROWS, ROWS)
def test_own_splits_stay_disjoint(train, validation, test):
    splits, _ = split({"train": train, "validation": validation, "test": test}, Fractions())
    keys = {name: {normalise(e.input) for e in splits[name]} for name in SPLITS}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))  # disjoint
    if test:
        assert keys["test"] == {normalise(e.input) for e in test}


def test_own_splits_are_kept_overlap_is_dropped_and_counted():
    r = rows(50)
    task = build_task("t", {"train": r, "validation": r[:10], "test": r[5:20]}, {}, Fractions())
    assert {e.input for e in task.test} == {e.input for e in r[5:20]}
    assert {e.input for e in task.validation} == {e.input for e in r[:5]}
    assert {e.input for e in task.train} == {e.input for e in r[20:]}
    assert task.source["merging"] == {"train_in_test": 15, "train_in_validation": 5, "validation_in_test": 5}
    assert task.source["own_splits"] == ["validation", "test"]


def test_a_missing_split_is_taken_from_train():
    r, other = rows(300), [Example(f"other {i}", ("x",)) for i in range(20)]
    splits, _ = split({"train": r, "test": other}, Fractions())
    assert len(splits["test"]) == 20
    assert {e.input for e in splits["validation"]} == {
        e.input for e in r if 0.2 <= hash_fraction(e.input) < 0.3
    }
    assert len(splits["train"]) + len(splits["validation"]) == 300


def test_a_test_set_alone_stays_a_test_set():
    task = build_task("t", {"test": rows(30)}, {}, Fractions())
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 30)


def test_merge_open_answers():
    e = [Example("p", ("a",)), Example("p", ("b", "a")), Example("p", ("a",)), Example("q", ("a",))]
    kept, counts = merge(e)
    assert kept == [Example("p", ("a", "b")), Example("q", ("a",))]
    assert counts == {"merged": 1, "duplicate": 1}


def test_merge_choices():
    e = [
        Example("p", ("a",), ("a", "b", "c")),
        Example("p", ("b",), ("c", "b", "a")),
        Example("p", ("d",), ("d", "e")),  # other choices: another question
        Example("p", ("a",)),
        Example("q", ("a",), ("a", "b")),
        Example("q", ("b",), ("a", "b")),
    ]
    kept, counts = merge(e)
    assert kept == [Example("p", ("a", "b"), ("a", "b", "c")), e[2], e[3]]
    assert counts == {"merged": 2, "all_choices_right": 1}


def test_the_first_rows_are_a_random_sample_whatever_the_files_order():
    ordered = [Example(f"{letter}{i}", ("x",)) for letter in string.ascii_lowercase for i in range(100)]
    train = build_task("t", {"train": ordered}, {}, Fractions()).train
    assert len({e.input[0] for e in train[:100]}) > 15


def test_bad_fractions_and_no_rows():
    with pytest.raises(TaskError, match="sum to at most 1"):
        Fractions(0.8, 0.3)
    with pytest.raises(TaskError, match=r"no examples \(rows dropped: \{'one_choice': 3\}\)"):
        build_task("t", {"train": []}, {}, Fractions(), {"one_choice": 3})
    nothing_kept = build_task("t", {"train": rows(9)}, {}, Fractions(0, 0))
    assert len(nothing_kept.train) == 9
