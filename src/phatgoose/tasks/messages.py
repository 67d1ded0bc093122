"""Rows that hold a conversation → one Example for each of the assistant's turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from phatgoose.records import Example
from phatgoose.tasks.examples import make_example

COLUMNS = ("messages", "conversations", "conversation")
OPTIONS = ("messages", "tools")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_TRAIN_KEYS = ("weight", "train", "training")
"""Keys with which OpenAI's and axolotl's rows say whether a turn is trained on."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def message_columns(row: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...] | None:
    """The columns that hold a row's messages; None if it has none, or the options say to read other columns."""
    if "messages" in options:
        return (options["messages"],)
    if "input" in options or "input" in row:
        return None
    if named := [name for name in COLUMNS if _is_list(row.get(name))]:
        return (named[0],)
    pair = ("prompt", "completion")
    return pair if all(_is_list(row.get(name)) for name in pair) else None


def columns_read(columns: Sequence[str], options: Mapping[str, str]) -> set[str]:
    """Columns that `to_examples` reads."""
    return {*columns, options.get("tools", "tools"), "system", options.get("choices", "choices")}


def to_examples(
    row: Mapping[str, Any], columns: Sequence[str], options: Mapping[str, str], group: str
) -> list[Example]:
    """An example for each turn of the assistant, with all messages before it as its prompt, as when a model is asked
    for that turn. They share `group`, and their split.

    Raises:
        ValueError: the row breaks a rule; the message says which.
    """
    if odd := sorted(options.keys() & {"target", "answer_index", "answer_base", "values"}):
        raise ValueError(f"{odd[0]}= is not for messages: the assistant's turns are the answers")
    parts = [[_message(m) for m in _list(row.get(name), name)] for name in columns]
    messages = [m for part in parts for m in part]
    first = len(parts[0]) if len(parts) > 1 else 0
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        if any(m["role"] == "system" for m in messages):
            raise ValueError('both a "system" field and a message of the system')
        messages, first = [{"role": "system", "content": system}, *messages], first + bool(first)
    name = _column_of("tools", row, options)
    tools = _list(row[name], name) if row.get(name) else None
    answers = [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and i >= first and not _is_context_only(m)
    ]
    if not answers:
        raise ValueError("no turn of the assistant to learn from")
    messages = [{k: v for k, v in m.items() if k not in _TRAIN_KEYS} for m in messages]
    choices = _choices(row, options)
    found = [_example(messages, i, tools, choices if i == answers[-1] else None) for i in answers]
    return found if len(found) == 1 else [replace(e, group=group) for e in found]


def _column_of(what: str, row: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """The column of tools or choices. A column that an option names must exist."""
    if what in options and options[what] not in row:
        raise ValueError(f"{what}={options[what]}: there is no such column")
    return options.get(what, what)


def _choices(row: Mapping[str, Any], options: Mapping[str, str]) -> list[Any] | None:
    if "|" in (literal := options.get("choices", "")):
        return list(literal.split("|"))
    name = _column_of("choices", row, options)
    return _list(row[name], name) if row.get(name) else None


def _example(messages: list[dict[str, Any]], turn: int, tools: Any, choices: list[Any] | None) -> Example:
    before, answer = messages[:turn], messages[turn]
    if not before:
        raise ValueError('the assistant\'s turn comes first: give it "weight": 0 if it is only context')
    first = next(i for i, m in enumerate(messages) if (i and m["role"] == "assistant") or i == turn)
    text = _text(answer).strip()
    made = make_example(_joined(before), [text], None if choices is None else [str(c) for c in choices])
    if choices is not None:
        answer = {**answer, "content": text}
    conversation = {"messages": before, **({"tools": tools} if tools else {})}
    opening = _joined(messages[:first]) if first < turn else None
    return replace(made, conversation=_json(conversation), answers=(_json(answer),), opening=opening)


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"a message is {type(given).__name__}, expected an object with role and content")
    message = {k: v for k, v in given.items() if v is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if role == "function_call":  # ShareGPT's form of a call: its JSON as the text
        try:
            call = json.loads(str(message.pop("content", "")))
        except (ValueError, RecursionError) as cause:
            raise ValueError("a function_call isn't JSON") from cause
        role, message["tool_calls"] = "assistant", [{"type": "function", "function": call}]
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN_ROLES:
        raise ValueError(f"a message's role is {role!r}, expected one of {', '.join(_KNOWN_ROLES)}")
    content = message.get("content")
    if not isinstance(content, str | list) and not (content is None and "tool_calls" in message):
        raise ValueError(f"a message of role {role!r} has no content")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"a message of role {role!r} has a part of type {kind!r}, and only texts are read"
            )
    return {"role": role, **message}


def _is_context_only(message: Mapping[str, Any]) -> bool:
    return any(message.get(mark) in (0, False) for mark in _TRAIN_KEYS if mark in message)


def _text(message: Mapping[str, Any]) -> str:
    """A message as text, for people and for comparisons: its content, followed by its tool calls."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    return "\n".join([*([content] if content else []), *([_json(calls)] if calls else [])])


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(_text(m).strip() for m in messages)


def _is_list(value: Any) -> bool:
    """True for a list of messages, also if it is written as JSON."""
    try:
        return all(isinstance(m, Mapping) for m in _list(value, ""))
    except ValueError:
        return False


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as cause:
            raise ValueError(f'"{name}" is no JSON list') from cause
    if not isinstance(value, list | tuple):
        raise ValueError(f'"{name}" is {type(value).__name__}, expected a list')
    return list(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_date_to_text)


def _date_to_text(value: Any) -> str:
    """A date as text; some tables have dates in messages (WildChat's turns)."""
    if isinstance(value, date):
        return value.isoformat()
    raise ValueError(f"a message holds a {type(value).__name__}, which isn't JSON")
