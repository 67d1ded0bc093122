"""Conversations → token ids, through the tokenizer's chat template.

A part of the conversation that the template would leave out (a message, a name, tool calls, tools) is refused. Text
that users and tools write is only text: a control token in it ("<|im_end|>") is split into ordinary tokens, so that
nobody can end or begin a turn from inside a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from phatgoose.errors import TaskError
from phatgoose.models.base.base import Base, end_tokens

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
TRUSTED = ("system", "developer", "assistant")
"""Roles whose control tokens are parsed: those of the operator of the conversation, and the model's own."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_ids(
    base: Base,
    messages: Sequence[Message],
    tools: Tools = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[int]:
    """A conversation's tokens up to the model's answer: `apply_chat_template(add_generation_prompt=True)`.

    A TaskError if there is no template, it refuses the conversation, or it would leave a part of it out.

    Args:
        messages: {"role", "content", …} each, as the template takes them. `developer` becomes `system` if the template
            doesn't know that role.
        tokenizer: a copy of the base's, for callers in another thread.
    """
    return _Conversation(base, tokenizer or base.tokenizer, messages, tools).prompt


def conversation_answer_ids(
    base: Base, messages: Sequence[Message], answers: Sequence[Message], tools: Tools = None
) -> tuple[list[int], list[list[int]]]:
    """(`conversation_ids`, for each answer the tokens that the model should write). An answer is an assistant message.

    An answer ends with its first end token, where a served model stops; what the template puts after that isn't part of
    it. If the template marks what the assistant writes ({% generation %}), these marks decide instead.

    A TaskError as by `conversation_ids`, for an encoder–decoder, or if the conversation with its answer doesn't begin
    as without it, so that a model would be trained on other tokens than it is served.
    """
    if base.is_encoder_decoder:
        raise TaskError(
            "conversations are for decoder-only bases: give this encoder–decoder rows with input and target."
        )
    conversation = _Conversation(base, base.tokenizer, messages, tools)
    return conversation.prompt, [conversation.answer_ids(answer) for answer in answers]


class _Conversation:
    """The conversation before an answer, as text and as tokens."""

    def __init__(
        self, base: Base, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools
    ) -> None:
        self.base, self.tokenizer = base, tokenizer
        if tokenizer.chat_template is None:
            raise TaskError(f"the tokenizer of {base.spec} has no chat template.")
        self.tools = [dict(tool) for tool in tools] if tools else None
        try:
            source = self.source = str(tokenizer.get_chat_template(None, self.tools))
        except ValueError as error:
            raise TaskError(f"the tokenizer's chat template can't be chosen: {error}") from error
        self.marks_answers = _GENERATION.search(source) is not None
        plain = [_without_none(message) for message in messages]
        if "developer" not in source:
            plain = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in plain]
        self.messages, self.marked = _mark_control_tokens(self.tokenizer, source, plain)
        self.text = self._render(self.messages, self.tools, True)
        self._refuse_dropped_parts()
        self.prompt = self._encode(self.text)
        if not self.prompt:
            raise TaskError("the model's chat template makes no tokens of the messages.")

    def answer_ids(self, answer: Message) -> list[int]:
        """The answer's tokens."""
        turn = {"role": "assistant", **_without_none(answer)}
        whole = [*self.messages, turn]
        text = self._render(whole, self.tools, False)
        if "tool_calls" in turn:
            without = [*self.messages, _without_key(turn, "tool_calls")]
            self._refuse_if_same("tool_calls", text, without, self.tools, False)
        if not text.startswith(self.text):
            hint = " Some templates do so with a system turn: write it into the first user turn."
            system = any(m.get("role") == "system" for m in self.messages)
            raise TaskError(
                "the chat template renders a conversation differently with its answer than before it: "
                f"{_first_difference(text, self.text)}. A model trained on the one would be served the other."
                + (hint if system else "")
            )
        end = self._end_of_answer(whole, text)
        ids, count = self._encode(text[:end]), len(self.prompt)
        tokens = ids[count:]
        if ids[:count] != self.prompt:
            # The tokenizer merges the prompt's end with the answer's beginning. A served model continues the prompt's
            # own tokens, so the answer is encoded by itself, if that leaves the text the same.
            tokens = self._encode(text[len(self.text) : end])
            if self._decoded([*self.prompt, *tokens]) != self._decoded(ids):
                raise TaskError("the tokenizer can't write the answer behind the prompt's own tokens.")
        if not self.marks_answers:
            ends = end_tokens(self.base.model, self.tokenizer.eos_token_id)
            tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
        if not tokens:
            raise TaskError("the chat template makes no tokens of an answer.")
        return tokens

    def _end_of_answer(self, messages: list[dict[str, Any]], text: str) -> int:
        """Where the answer ends in the rendered text: with the span that the template marks, or with the text."""
        if not self.marks_answers:
            return len(text)
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        rendered = render(
            conversations=[messages], tools=self.tools, chat_template=self.source,
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        spans = [(a, b) for a, b in rendered[1][0] if b > len(self.text)]
        starts, ends = [a for a, _ in spans], [b for _, b in spans]
        if not spans or starts[0] > len(self.text) or starts[1:] != ends[:-1]:
            raise TaskError(
                "what the chat template marks with {% generation %} doesn't begin where its generation prompt ends, or "
                "has gaps: the model would have to write what isn't in the loss."
            )
        return ends[-1]

    def _refuse_dropped_parts(self) -> None:
        """Renders the conversation without each part that some templates ignore; if nothing changes, it was dropped."""
        messages = self.messages
        if self.tools:
            self._refuse_if_same("tools", self.text, messages, None)
        if any("tool_calls" in m for m in messages):
            without = [_without_key(m, "tool_calls") for m in messages]
            self._refuse_if_same("tool_calls", self.text, without, self.tools)
        # Templates treat messages by role, so one comparison per role is enough; a client may send thousands of them.
        for role in dict.fromkeys(m.get("role") for m in messages):
            indices = [i for i, m in enumerate(messages) if m.get("role") == role]
            # The name of a tool's message only repeats the one in its call.
            if role != "tool" and (named := [i for i in indices if "name" in messages[i]]):
                nameless = [_without_key(m, "name") if i in named else m for i, m in enumerate(messages)]
                self._refuse_if_same(f"messages.{named[0]}.name", self.text, nameless, self.tools)
            for i in {indices[0], indices[-1]} if role != "assistant" else ():
                content = messages[i].get("content")
                if isinstance(content, str) and content.strip() not in self.text and len(messages) > 1:
                    others = [*messages[:i], *messages[i + 1 :]]
                    self._refuse_if_same(f"messages.{i} (role {role!r})", self.text, others, self.tools)

    def _refuse_if_same(
        self, part: str, text: str, messages: list[dict[str, Any]], tools: Any, prompt: bool = True
    ) -> None:
        try:
            same = self._render(messages, tools, prompt) == text
        except TaskError:
            return  # the template needs this part
        if same:
            raise TaskError(f"{part}: the model's chat template has no place for it, and would leave it out.")

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        apply: Any = self.tokenizer.apply_chat_template
        try:
            return str(apply(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TaskError(
                f"the model's chat template refuses the conversation ({type(error).__name__}: {error})."[:500]
            ) from error

    def _encode(self, text: str) -> list[int]:
        if not self.marked:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        from transformers.utils import chat_template_utils as utils

        try:
            return list(utils.encode_marked_chat(self.tokenizer, text))
        except ValueError as error:
            raise TaskError(
                f"a message holds a control token that can't be written as text: {error}."
            ) from error

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _mark_control_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str, messages: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    """(the messages with the control tokens marked that users and tools wrote, whether there are any)."""
    written = [text for m in messages if m.get("role") not in TRUSTED for text in _all_texts(m)]
    known: Any = tokenizer
    try:
        from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

        pattern, _ = _get_control_token_patterns(known._get_control_tokens(source))
    except (ImportError, AttributeError):
        if any(str(token) in text for text in written for token in tokenizer.all_special_tokens):
            raise TaskError(
                "a message holds a control token of the tokenizer, which this version of transformers can't write as "
                "text: take it out, or install transformers 5.23 or newer."
            ) from None
        return messages, False
    except TemplateError as error:
        raise TaskError(f"the tokenizer's chat template can't be read: {error}.") from error
    if not any(pattern.search(text) for text in written):
        return messages, False
    return [
        m if m.get("role") in TRUSTED else {**mark_control_tokens(m, pattern), "role": m.get("role")}
        for m in messages
    ], True


def _all_texts(value: Any) -> list[str]:
    """Every text in a message, at any depth."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _all_texts(part)]


def _without_none(message: Message) -> dict[str, Any]:
    """A copy without the keys whose value is None, which templates would render as "None"."""
    return {key: value for key, value in message.items() if value is not None}


def _without_key(message: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _first_difference(one: str, other: str) -> str:
    """Both texts around the place where they begin to differ, without the marks of control tokens."""
    one, other = (text.translate({0xF0000: None, 0xF0001: None}) for text in (one, other))
    end = len(os.path.commonprefix([one, other]))  # noqa: RUF071  # of characters, as meant here
    near = slice(max(0, end - 20), end + 20)
    return f"{one[near]!r} against {other[near]!r}"
