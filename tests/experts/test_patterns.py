"""rank_pattern and alpha_pattern: as PEFT resolves them, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters import peft_patterns as patterns
from phatgoose.experts.adapters.peft_patterns import Patterns

PATHS = st.text("ab.1_-", min_size=1, max_size=12)
ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^.]", "1", "_", "-", "^", "$", "[0-9]"]
)
QUANTIFIERS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "*?", "+?", "{0,}"])
SIMPLE = st.recursive(
    st.tuples(ATOMS, QUANTIFIERS).map("".join),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=2).map("|".join)
        | st.tuples(st.sampled_from(["(", "(?:"]), inner, st.just(")"), QUANTIFIERS).map("".join)
        | st.tuples(st.sampled_from(["(?=", "(?!", "(?<=", "(?<!"]), inner, st.just(")"), QUANTIFIERS).map(
            "".join
        )
    ),
    max_leaves=6,
)


def valid(pattern):
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@settings(max_examples=500, deadline=None)
@given(st.lists(PATHS | SIMPLE.filter(valid), max_size=5), PATHS)
def test_the_same_pattern_as_peft(keys, path):
    numbers = {key: number for number, key in enumerate(keys)}
    expected = numbers.get(get_pattern_key(list(numbers), path), "none")  # the path itself if nothing matches
    assert Patterns(numbers, "rank_pattern", "here").find(path, "none") == expected


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.xq_proj", False),
        ("0.q_proj", "model.layers.0.q_proj", True),
        ("layers.1.q", "layers.11q", True),
        ("layers.1.q", "layersX1Yq", True),  # a dot is any character
        ("", "a", False),
        ("", "a.", True),
        ("^a.b", "a.b", True),
        ("^b", "a.b", False),
        (r"layers\.[0-9]+\.(q|v)_proj", "model.layers.12.v_proj", True),
        (r"^(?!.*vision).*q_proj", "model.layers.12.q_proj", True),
        (r"^(?!.*vision).*q_proj", "model.vision.layers.12.q_proj", False),
        (r"(?<=self_attn\.)q_proj", "model.self_attn.q_proj", True),
    ],
)
def test_examples(pattern, path, matches):
    assert Patterns({pattern: 3}, "rank_pattern", "here").find(path, None) == (3 if matches else None)
    assert (re.match(rf"(.*\.)?({pattern})$", path) is not None) == matches


def test_thousands_of_names_are_quick():
    paths = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(50) for j in range(100)]
    setting = Patterns({path: number for number, path in enumerate(paths)}, "rank_pattern", "here")
    start = time.process_time()
    assert [setting.find(path, None) for path in paths] == list(range(len(paths)))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+[bc]",
        "(?=(a+)+[bc])a",
        "(?!(a|a)*[bc])b",
        "(a|a)*[bc]",
        r"(.*)*[^\w.]",
        "[ab]*" * 20 + "[bc]",
        "((a{1,99}){1,99}){1,99}[bc]",
    ],
)
def test_patterns_that_would_never_end_are_stopped(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    setting = Patterns({pattern: 3}, "rank_pattern", "here")
    start = time.process_time()
    with pytest.raises(ExpertError, match=r"rank_pattern takes longer than 0.3 seconds .*Write module names"):
        for number in range(100_000):
            setting.find("a" * 500 + f".{number}", None)
    assert time.process_time() - start < 1
    with pytest.raises(ExpertError, match="takes longer"):
        setting.find("b", None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([], "expected an object"),
        ("q_proj", "expected an object"),
        ({"(": 2}, "not a regular expression"),
        ({"[z-a]": 2}, "not a regular expression"),
        ({r"(a)\1": 2}, "isn't matched here"),
        ({"(?i)a": 2}, "isn't matched here"),
        ({"(?P<n>a)": 2}, "isn't matched here"),
        ({"a{1000}": 2}, "isn't matched here"),
        ({"a++": 2}, "isn't matched here"),
        ({"[[a]": 2}, "isn't matched here"),
        ({"[a--b]": 2}, "isn't matched here"),
        ({"(" * 1000 + ")" * 1000: 2}, "isn't matched here"),
        ({"a*" * 1000: 2}, "isn't matched here"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refusals(setting, message):
    with pytest.raises(ExpertError, match=message) as caught:
        Patterns(setting, "rank_pattern", "here")
    assert len(str(caught.value)) < 1000
