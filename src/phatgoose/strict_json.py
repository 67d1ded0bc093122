"""Read strangers' JSON strictly: no key twice, one kind of error for all faults, bounded memory."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_VALUES = 4_000_000
"""Most commas, colons and opening brackets, which bound the memory that a text can take."""
MAX_DEPTH = 64
MAX_INTEGER = 2**64
"""Whole numbers are smaller than this: seeds, sizes of files."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """The value of UTF-8 JSON.

    Raises:
        ValueError: what is wrong with it: not UTF-8, no JSON, a key twice in one object, NaN or infinity (1e999 too), a
            whole number of 2^64 or more, half a surrogate pair, nesting deeper than 64, more than four million values.
    """
    if (count := sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has about {count} values, expected at most {MAX_VALUES}")
    _check_depth(raw)
    text = raw.decode("utf-8")
    data = DECODER.decode(text)
    if _SURROGATE.search(text):
        json.dumps(
            data, ensure_ascii=False
        ).encode()  # fails on half a pair, which no file or terminal can hold
    return data


def _check_depth(raw: bytes) -> None:
    """Checks the depth before parsing, which deep nesting would break. Brackets in strings don't count."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    brackets = left = _STRING.sub(b"", raw).translate(_BRACKETS, _OTHERS)
    for _ in range(MAX_DEPTH):  # removes the innermost level
        left = left.replace(b"()", b"")
    depth = 0
    for mark in brackets if left else b"":
        depth += 1 if mark == ord("(") else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
        if depth < 0:
            return  # parsing stops here


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_BRACKETS = bytes.maketrans(b"[{]}", b"(())")
_OTHERS = bytes(set(range(256)) - set(b"[{]}"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= MAX_INTEGER:
        raise ValueError(f"the number {text[:24]}{'…' if len(text) > 24 else ''} is too large")
    return value


def _number(text: str) -> float:
    if len(text) > 1000 or not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
