"""JSON from strangers: the same values as Python's reader, or one kind of error, in bounded time and memory."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.strict_json import MAX_DEPTH, MAX_VALUES, parse_json

NUMBERS = st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab[{]}"\\,:é'), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_reads_what_python_writes(data, ascii_only):
    assert parse_json(json.dumps(data, ensure_ascii=ascii_only, indent=1).encode()) == data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b"[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
        (b'{"a":' * 100_000, f"nested deeper than {MAX_DEPTH}"),
        (b"[" * 65 + b"]" * 65, f"nested deeper than {MAX_DEPTH}"),
        (b"[" + b'[{"a": ' * 33 + b"1" + b"}]" * 33 + b"]", f"nested deeper than {MAX_DEPTH}"),
        (b"[" + b"[1], " * 100 + b"[" * 65 + b"]" * 66, f"nested deeper than {MAX_DEPTH}"),
        (b"[" + b"[1], " * 100 + b"[" * 64, f"nested deeper than {MAX_DEPTH}"),
        (b"[" + b"[1], " * 100 + b"[" * 60, "Expecting value"),
        (b"]" * 300_000 + b"[" * 300_000, "Expecting value"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[-1e999]", "the number -1e999 is too large"),
        (b"[18446744073709551616]", "the number 18446744073709551616 is too large"),
        (b"9" * 100_000, "the number 9{24}… is too large"),
        (b"0." + b"1" * 100_000, "the number 0.1+ is too large"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'{"\\uDFFF": 1}', "surrogates not allowed"),
        (b"[1" + b",1" * MAX_VALUES + b"]", "values, expected at most 4000000"),
        (b'"' + b"\\" * 99, "Unterminated string"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refusals(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_json(raw)


def test_pairs_of_surrogates_and_brackets_in_strings_are_fine():
    assert parse_json(b'["\\ud83d\\ude00", "' + b"[" * 1000 + b'"]') == ["😀", "[" * 1000]
    assert len(parse_json(b"[" + b"[1], " * 100 + b"[2]]")) == 101
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(parse_json(deepest)).encode() == deepest


def test_no_input_takes_long():
    many = ",".join(f'"k{i}": 1' for i in range(200_000))
    hard = [
        "{" + many + ', "k199999": 2}',  # twice at the very end
        '"' * 300_000,
        '"\\' * 300_000,
        "[" + '"\\"' * 300_000,
        "-" * 300_000,
        "1e" + "9" * 300_000,
    ]
    for text in hard:
        start = time.process_time()
        with pytest.raises(ValueError, match=re.compile(".")):
            parse_json(text.encode())
        assert time.process_time() - start < 5
