"""JSON that knows more than JSON: numbers and keys that a writer wouldn't write, and changes to a document's
structure."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any


class Raw(str):
    """Text that is written as it is."""

    __slots__ = ()


class Pairs(list):
    """An object as (key, value) pairs, where a key may stand twice."""

    __slots__ = ()


NUMBERS = [
    "0", "-0", "1", "-1", "2", "3", "7", "8", "255", "256", "65536", "2147483647", "2147483648", "4294967296",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551615",
    "18446744073709551616", "1" + "0" * 400, "1.5", "-2.5", "1e-400", "1e308", "1.8e308", "-1e308", "1e999",
    "3.5e38", "5e-324", "NaN", "Infinity", "-Infinity", "0.1" + "1" * 2000, "1E+5", "01", "1.", ".5", "+1",
    "0x10", "1_0",
]  # fmt: skip
STRINGS = [
    "", "a", " ", ".", "..", "../..", "/", "/etc/passwd", "\\", "..\\..", "C:\\", "a/b", "\x00", "\x1b[2J",
    "\n", "é", "😀", "‮", "x" * 300, "x" * 5000, "lora_A", "LORA", "IA3", "F32", "BF16", "I64", "NaN", "true",
    "null", "1", "expert.json", "experts/a", "packed/stacks-1.safetensors", "(a+)+$", ".*" * 30, "(", "[",
    "q_proj", "none", "all", "__metadata__",
]  # fmt: skip
OTHERS = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    '""',
    "[[]]",
    '{"a": 1}',
    '{"": {}}',
    '"\\ud800"',
    '{"a": 1, "a": 2}',
    "",
]


def deep(rng: random.Random) -> Raw:
    depth = rng.choice([3, 30, 63, 64, 65, 500, 5000])
    return Raw(rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth]))


def edge(rng: random.Random) -> Any:
    """A value that somebody may not have thought of."""
    kind = rng.random()
    if kind < 0.45:
        return Raw(rng.choice(NUMBERS))
    if kind < 0.75:
        return rng.choice(STRINGS)
    if kind < 0.95:
        return Raw(rng.choice(OTHERS))
    return deep(rng)


def parsed(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=Pairs)


_quoted = json.encoder.encode_basestring_ascii


def written(node: Any) -> bytes:
    return _text(node).encode("utf-8", "surrogatepass")


def _text(node: Any) -> str:
    kind = type(node)
    if kind is str:
        return _quoted(node)
    if kind is int:
        return repr(node)
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{_text(key)}: {_text(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_text, node)) + "]"
    return json.dumps(node)


def spots(node: Any, found: list[tuple[Any, int]] | None = None) -> list[tuple[Any, int]]:
    """Every place of a value below `node`: (its container, its index)."""
    found = [] if found is None else found
    if isinstance(node, list):
        for i, item in enumerate(node):
            found.append((node, i))
            spots(item[1] if isinstance(node, Pairs) else item, found)
    return found


def get(spot: tuple[Any, int]) -> Any:
    container, i = spot
    return container[i][1] if isinstance(container, Pairs) else container[i]


def put(spot: tuple[Any, int], value: Any) -> None:
    container, i = spot
    container[i] = (container[i][0], value) if isinstance(container, Pairs) else value


def mutated(rng: random.Random, document: Any) -> Any:
    """`document` (of `parsed`) with one change; it may be changed in place."""
    places = spots(document)
    if not places or rng.random() < 0.01:
        return edge(rng)
    container, i = spot = rng.choice(places)
    kind = rng.randrange(10)
    if kind <= 2:
        put(spot, edge(rng))
    elif kind == 3:
        put(spot, _near(rng, get(spot)))
    elif kind == 4:
        del container[i]
    elif kind == 5:
        container.insert(rng.randrange(len(container) + 1), container[i])  # a key twice, an item twice
    elif kind == 6:
        new = edge(rng)
        container.insert(i, (rng.choice(STRINGS), new) if isinstance(container, Pairs) else new)
    elif kind == 7 and isinstance(container, Pairs):
        container[i] = (rng.choice([*STRINGS, _near(rng, container[i][0])]), container[i][1])
    elif kind == 8:
        put(spot, copy.deepcopy(get(rng.choice(places))))
    else:
        put(spot, [get(spot)] * rng.choice([1, 2, 1000]))
    return document


def _near(rng: random.Random, value: Any) -> Any:
    """A value close to this one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int) and not isinstance(value, Raw):
        near = [value + 1, value - 1, -value, value * 2, value * 2**32]
        if abs(value) < 1 << 1000:  # float() and str() have limits
            near += [float(value), str(value), value % 2 == 1]
        return rng.choice(near)
    if isinstance(value, float):
        if abs(value) > 1e300 or value != value:
            return 0
        return rng.choice([value * 1e300, -value, int(value), str(value)])
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return rng.choice(
            [
                value[:at],
                value[at:],
                value * 2,
                value[:at] + rng.choice(STRINGS) + value[at:],
                value.upper(),
                value[:at] + "\x00",
            ]
        )
    return [value]


_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")


def numbers_replaced(rng: random.Random, raw: bytes) -> bytes:
    """One number of a text replaced by an edge case."""
    found = list(_NUMBER.finditer(raw))
    if not found:
        return raw
    one = rng.choice(found)
    return raw[: one.start()] + rng.choice(NUMBERS).encode() + raw[one.end() :]
