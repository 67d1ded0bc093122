"""rank_pattern and alpha_pattern: strangers' regular expressions, matched in bounded time."""

from __future__ import annotations

import re
import time
from typing import Any

import regex

from phatgoose.errors import ExpertError, brief

SECONDS = 2.0
"""Processor time for one setting at all of an adapter's modules. Ordinary patterns take milliseconds."""
_PLAIN = re.compile(r"[\w.-]*")
# Only `regex` can stop in the middle of a match. What is allowed means the same to it as to `re`:
# characters, classes, groups, look-around.
_SIMPLE = re.compile(
    r"""(?:
        (?: \\[.\-/_dDwWsS]                             # an escaped character, a class of them
          | \[\^?(?:[\w./] | -(?!-) | \\[.\-dDwWsS])+\]
          | \((?:\?(?:[:=!]|<[=!])|(?!\?)) | [)|^$]
          | [^\\\[\](){}?*+|^$]
        )
        (?: (?: [*+?] | \{\d{1,2}\} | \{\d{1,2},\d{0,2}\} ) \?? (?![*+?{]) )?
    )*+""",
    re.VERBOSE,
)
_LENGTH, _GROUPS = 1000, 20
_FEW = 1000


class Patterns:
    """A setting's values by patterns of module paths.

    As in PEFT, the first key counts for which re.match(rf"(.*\\.)?({key})$", path) finds a match.

    Raises:
        ExpertError: it isn't an object, or a pattern isn't valid, or isn't of the simple kind that can be
            matched safely (no back-references, flags, named groups).
    """

    def __init__(self, patterns: Any, setting: str, where: str):
        self._setting, self._where, self._seconds = setting, where, SECONDS
        if not isinstance(patterns, dict | None):
            raise ExpertError(
                f"{where}: {setting} is {brief(patterns)}, expected an object of numbers by pattern."
            )
        self._values = list((patterns or {}).values())
        # Patterns without other special characters than dots are looked up: {length: {places of dots: {text: number}}}.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, str, Any]] = []
        for number, pattern in enumerate(patterns or {}):
            if _PLAIN.fullmatch(pattern):
                dots = tuple(m.start() for m in re.finditer(r"\.", pattern))
                self._plain.setdefault(len(pattern), {}).setdefault(dots, {}).setdefault(pattern, number)
            else:
                self._others.append((number, pattern, self._compiled(pattern)))

    def _compiled(self, pattern: str) -> Any:
        simple = len(pattern) <= _LENGTH and pattern.count("(") <= _GROUPS and _SIMPLE.fullmatch(pattern)
        try:
            if not simple:
                raise ExpertError(
                    f"{self._where}: {self._setting} has {brief(pattern)}, a regular expression of a kind "
                    "that isn't matched here. Write module names, or characters, classes, groups and "
                    "look-around, without back-references, flags and named groups."
                )
            re.compile(rf"(.*\.)?({pattern})$")
            return regex.compile(rf"(.*\.)?({pattern})$", regex.VERSION0)
        except (re.error, regex.error, OverflowError, RecursionError) as cause:
            raise ExpertError(
                f"{self._where}: {self._setting} has {brief(pattern)}, which is not a regular expression: {cause}"
            ) from cause

    def find(self, path: str, default: Any) -> Any:
        """The value for a module path, or `default` if no pattern matches it."""
        if not self._others and len(self._values) < _FEW:  # this is quicker than asking for the time
            first = self._first_plain(path) if self._values else None
            return default if first is None else self._values[first]
        start = time.process_time()
        first = self._first_plain(path)
        for number, pattern, compiled in self._others:
            if first is not None and first < number:
                break
            left = self._seconds - (time.process_time() - start)
            try:
                if left <= 0:
                    raise TimeoutError
                if compiled.match(path, timeout=left):
                    first = number
                    break
            except TimeoutError:
                raise self._too_slow(pattern) from None
        self._seconds -= time.process_time() - start
        if self._seconds <= 0:
            raise self._too_slow(None)
        return default if first is None else self._values[first]

    def _first_plain(self, path: str) -> int | None:
        """The first plain pattern that matches the end of the path: all of it, or what follows a dot."""
        found = []
        for length in {len(path)} | {len(path) - m.end() for m in re.finditer(r"\.", path)}:
            for dots, numbers in self._plain.get(length, {}).items():
                text = list(path[len(path) - length :])
                for place in dots:
                    text[place] = "."
                if (number := numbers.get("".join(text))) is not None:
                    found.append(number)
        return min(found, default=None)

    def _too_slow(self, pattern: str | None) -> ExpertError:
        self._seconds = 0.0
        which = "" if pattern is None else f" ({brief(pattern)})"
        return ExpertError(
            f"{self._where}: {self._setting} takes longer than {SECONDS:g} seconds to match with the "
            f"adapter's modules{which}. Write module names instead of regular expressions."
        )
