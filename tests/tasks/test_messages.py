import json
from datetime import UTC, datetime

import datasets
import pytest

from conftest import write_rows
from phatgoose.errors import TaskError
from phatgoose.records import SPLITS, Task
from phatgoose.tasks import load_task
from phatgoose.tasks.messages import to_examples
from phatgoose.tasks.splits import CHAT

USER, YES = {"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": "yes"}
MORE = [{"role": "user", "content": "And ice?"}, {"role": "assistant", "content": "no"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"default": None}}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}

DEEP = "[" * 100_000 + "]" * 100_000
"""JSON that is nested deeper than Python reads."""


def load(tmp_path, *rows, options=""):
    path = tmp_path / "chat.jsonl"
    write_rows(path, rows)
    return load_task(f"jsonl:{path}{options}")


def all_of(task):
    return [e for name in SPLITS for e in task.split(name)]


@pytest.mark.parametrize(
    ("row", "options", "before"),
    [
        ({"messages": [USER, YES]}, "", [USER]),
        ({"messages": [SYSTEM, USER, {**YES, "content": "yes\n"}]}, "", [SYSTEM, USER]),
        ({"conversations": [{"from": "human", "value": "Is water wet?"}, {"from": "gpt", "value": "yes"}]}, "", [USER]),
        ({"conversations": [USER, YES], "system": "Be brief."}, "", [SYSTEM, USER]),
        ({"prompt": [USER], "completion": [YES]}, "", [USER]),
        ({"chat": [USER, YES], "input": "x"}, "?messages=chat&ignore=input", [USER]),
        ({"messages": json.dumps([USER, YES])}, "", [USER]),
        ({"messages": [USER, {**YES, "weight": 1}, *MORE[:1], {**MORE[1], "weight": 0}]}, "", [USER]),
        ({"messages": [USER, YES, *MORE[:1], {**MORE[1], "training": False}]}, "", [USER]),
        ({"messages": [USER, YES, *MORE[:1]]}, "", [USER]),
        ({"messages": [USER, {**YES, "content": None, "tool_calls": None, "value": "yes"}]}, "", [USER]),
    ],
)  # fmt: skip
def test_forms(tmp_path, row, options, before):
    (example,) = all_of(load(tmp_path, row, options=options))
    messages, tools = example.messages()
    assert (messages, tools, example.targets) == (before, None, ("yes",))
    assert json.loads(example.answers[0])["role"] == "assistant"
    assert example.input == "\n\n".join(m["content"] for m in before)


def test_calls_tools_and_results_are_kept(tmp_path):
    result = {"role": "tool", "name": "add", "content": "3"}
    task = load(tmp_path, {"messages": [USER, CALL, result, YES], "tools": [TOOL]})
    call, answer = sorted(all_of(task), key=lambda e: len(e.input))
    assert call.messages() == ([USER], [TOOL])
    assert json.loads(call.answers[0]) == CALL
    assert answer.messages() == ([USER, CALL, result], [TOOL])
    shared = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    said = [{"from": "human", "value": "1?"}, shared, {"from": "observation", "value": "3"}]
    (only,) = all_of(load(tmp_path, {"conversations": said}))
    assert json.loads(only.answers[0])["tool_calls"][0]["function"]["name"] == "add"


def test_a_turn_with_a_text_and_a_call_isnt_the_text_alone(tmp_path):
    both = {**CALL, "content": "yes"}
    task = load(tmp_path, {"messages": [USER, both]}, {"messages": [USER, YES]})
    (example,) = all_of(task)
    assert sorted(example.targets) == ["yes", "yes\n" + json.dumps(CALL["tool_calls"])]
    assert sorted(json.loads(a) == both for a in example.answers) == [False, True]


def test_every_turn_is_an_example_and_shares_its_conversations_split(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Is {i} even?"}, YES, *MORE]} for i in range(60)]
    task = load(tmp_path, *rows)
    assert task.source["prompt_style"] == CHAT
    assert sum(len(task.split(name)) for name in SPLITS) == 120
    for name in SPLITS:
        assert 0 < len(task.split(name)) < 120
        openings = [e.placed_by for e in task.split(name)]
        assert all(openings.count(o) == 2 for o in openings)
        assert len({e.group for e in task.split(name)}) == len(openings) / 2
    plain = load_task(f"jsonl:{_plain(tmp_path)}")  # a conversation of one turn falls where its text falls
    chats = load(
        tmp_path, *({"messages": [{"role": "user", "content": f"Is {i} odd?"}, YES]} for i in range(60))
    )
    assert [e.input for e in chats.test] == [e.input for e in plain.test]


def _plain(tmp_path):
    path = tmp_path / "plain.jsonl"
    write_rows(path, ({"input": f"Is {i} odd?", "target": "yes"} for i in range(60)))
    return path


def test_rows_merge_by_conversation_and_hash_differs(tmp_path):
    no = {**YES, "content": "no"}
    (merged,) = all_of(load(tmp_path, {"messages": [USER, YES]}, {"messages": [USER, no]}))
    assert merged.targets == ("yes", "no")
    assert [json.loads(a)["content"] for a in merged.answers] == ["yes", "no"]
    one = {"messages": [SYSTEM, USER, YES]}
    other = {"messages": [{"role": "user", "content": "Be brief."}, USER, YES]}  # the same texts, other roles
    assert len(all_of(load(tmp_path, one, other))) == 2
    assert load(tmp_path, one).hash != load(tmp_path, other).hash


def test_choices_are_of_the_last_turn(tmp_path):
    task = load(tmp_path, {"messages": [USER, YES, *MORE], "choices": ["yes", "no"]})
    first, last = sorted(all_of(task), key=lambda e: len(e.input))
    assert (first.choices, last.choices, last.targets) == (None, ("yes", "no"), ("no",))
    assert load(tmp_path, {"messages": [USER, YES, *MORE]}, options="?choices=yes|no").hash == task.hash


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER]}, "no turn of the assistant"),
        ({"messages": [YES]}, 'turn comes first: give it "weight": 0'),
        ({"messages": [USER, {"role": "asistant", "content": "yes"}]}, "role is 'asistant'"),
        ({"messages": [USER, {"role": "assistant"}]}, "has no content"),
        ({"messages": [USER, {**YES, "content": " "}]}, "empty target"),
        ({"messages": [USER, {**YES, "content": ""}]}, "empty target"),
        ({"messages": [{"from": "human", "value": "2?"}, {"from": "function_call", "value": "add"}]}, "isn't JSON"),
        ({"messages": [{"from": "human", "value": "2?"}, {"from": "function_call", "value": DEEP}]}, "isn't JSON"),
        ({"messages": [USER, YES], "tools": DEEP}, "is no JSON list"),
        ({"messages": DEEP}, "unknown column 'input'"),
        ({"messages": [{**USER, "content": [{"type": "image", "url": "a"}]}, YES]}, "part of type 'image'"),
        ({"messages": [{**USER, "content": ["Is", "it?"]}, YES]}, "part of type 'str'"),
        ({"messages": [USER, YES], "answer": "x"}, '"answer" is not read'),
        ({"messages": [SYSTEM, USER, YES], "system": "x"}, "both"),
        ({"messages": [USER, YES], "choices": ["no", "maybe"]}, "not among the choices"),
    ],
)  # fmt: skip
def test_malformed_rows_are_refused_with_their_line(tmp_path, row, says):
    with pytest.raises(TaskError, match=f"line 1.*{says}"):
        load(tmp_path, row)
    with pytest.raises(TaskError, match=r"line 2.*every row holds messages"):
        load(tmp_path, {"messages": [USER, YES]}, {"input": "a", "target": "b"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("target=x", "target= is not for messages"),
        ("tools=x", "no such column"),
        ("choices=x", "no such column"),
    ],
)
def test_options_that_messages_do_not_have_are_refused(tmp_path, options, says):
    with pytest.raises(TaskError, match=says):
        load(tmp_path, {"messages": [USER, YES]}, options=f"?{options}")


def test_times_in_a_tables_messages_are_texts():
    turn = {**USER, "timestamp": datetime(2024, 5, 6, tzinfo=UTC)}
    (example,) = to_examples({"messages": [turn, YES]}, ("messages",), {}, "row")
    assert example.messages()[0] == [{**USER, "timestamp": "2024-05-06T00:00:00+00:00"}]
    with pytest.raises(ValueError, match="holds a bytes"):
        to_examples({"messages": [{**USER, "audio": b"x"}, YES]}, ("messages",), {}, "row")


def test_hf_datasets(tmp_path):
    """Tables fill in keys that other rows have: they are taken out again."""
    rows = [{"messages": [USER, YES], "tools": None}, {"messages": [USER, CALL], "tools": [TOOL]}]
    datasets.Dataset.from_list(
        [{"messages": [{**m, "name": None} for m in r["messages"]]} for r in rows]
    ).to_parquet(str(tmp_path / "a.parquet"))
    task: Task = load_task(f"hf:{tmp_path / 'a.parquet'}")
    assert task.source["prompt_style"] == CHAT
    (example,) = all_of(task)
    assert example.messages() == ([USER], None)
    assert [json.loads(a) for a in example.answers] == [YES, CALL]
