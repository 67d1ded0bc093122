from dataclasses import dataclass, field

import pytest

from phatgoose.tasks.splits import CHAT
from phatgoose.workflows.prompt_forms import endpoint, fitting_form, read_of_turn, trained_form


@dataclass
class Stub:
    """What is read of an expert."""

    name: str
    provenance: dict = field(default_factory=dict)


@dataclass
class Experts:
    experts: list


def of(style):
    return {"task": {"source": {"prompt_style": style}}} if style else {}


def pool(*styles):
    return Experts([Stub(f"e{i}", of(style)) for i, style in enumerate(styles)])


@pytest.mark.parametrize(
    ("provenance", "form"),
    [
        (of("as is"), "raw"),
        (of(CHAT), "chat"),
        ({"kind": "peft"}, None),
        ({"gate": of(CHAT)}, "chat"),
        ({**of("as is"), "gate": of(CHAT)}, "raw"),
        ({"gate": {"task": {"source": {"source": "generated"}}}}, None),
        ({"task": {"source": {"parts": [{"prompt_style": CHAT}] * 2, "prompt_style": "each part's own"}}}, "chat"),
        ({"task": {"source": {"parts": [{"prompt_style": CHAT}, {"prompt_style": "as is"}]}}}, None),
        ({"task": "a stranger's", "gate": 3}, None),
    ],
)  # fmt: skip
def test_what_an_experts_record_says(provenance, form):
    assert trained_form(Stub("e", provenance)) == form


def test_routers_read_whole_prompts_where_signatures_are_of_conversations():
    assert read_of_turn(pool("as is", None), "hi") == ["hi"] == read_of_turn(None, "hi")
    assert read_of_turn(pool("as is", CHAT), "hi") == []


def test_the_endpoint_that_fits():
    assert endpoint(pool("as is", "as is")) == "/v1/completions"
    assert endpoint(pool(CHAT)) == "/v1/chat/completions"
    assert endpoint(pool(CHAT, "as is")) is endpoint(pool(None)) is None


@pytest.mark.parametrize(
    ("styles", "asked", "template", "form", "says"),
    [
        ((), None, True, "chat", None),
        (("as is", "bigbench/1"), None, True, "raw", "without the chat template"),
        (("as is", CHAT), None, True, "chat", r"--raw .*: e0\."),
        (("as is", None), None, True, "chat", r": e0\."),
        ((CHAT, CHAT), None, True, "chat", None),
        ((None, None), None, True, "chat", None),
        (("as is",), "chat", True, "chat", "--raw gives prompts as they are"),
        ((CHAT,), "raw", True, "raw", "--chat puts prompts through it"),
        ((CHAT,), None, False, "raw", "tokenizer lacks"),
        (("as is",), None, False, "raw", None),
        (("as is",) * 7, "chat", True, "chat", "e4 and 2 more"),
    ],
)
def test_the_form_that_fits(styles, asked, template, form, says):
    import re

    found, remark = fitting_form(pool(*styles) if styles else None, asked, template)
    assert found == form
    assert remark is None if says is None else re.search(says, remark)
