"""docs/serving-parameters.md, written from the schema of requests by `cli.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from phatgoose.serving.api.schema import IGNORED, AnswerRequest, ChatRequest, CompletionRequest

_VLLM = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template chat_template_kwargs
continue_final_message documents echo frequency_penalty ignore_eos include_reasoning include_stop_str_in_output
kv_transfer_params length_penalty logit_bias logits_processors logprobs max_completion_tokens max_tokens
media_io_kwargs messages min_p min_tokens mm_processor_kwargs model n parallel_tool_calls presence_penalty priority
prompt prompt_embeds prompt_logprobs reasoning_effort repetition_penalty request_id response_format return_token_ids
return_tokens_as_token_ids seed skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream
stream_options structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p
truncate_prompt_tokens use_beam_search user vllm_xargs
"""
VLLM = frozenset(_VLLM.split())
"""Parameters of /v1/chat/completions and /v1/completions in vLLM's server, early in 2026."""

HEAD = """\
# Parameters of requests

Written by `python docs/generate/cli.py` from the schema itself: change that, not this page. \
How they work together: [serving](serving.md#what-is-honoured).

| column | |
|---|---|
| completions, chats | what `/v1/completions` and `/v1/chat/completions` take: a range or kind, and the default (=) |
| vLLM | whether vLLM's server has a parameter of this name (early in 2026), for one of the two at least |

A value marked "only" is accepted because it changes nothing; any other value is refused with status 400. \
So are parameters that aren't listed here.
Whole numbers, except tokens, may be written as 4.0. `null` counts as not given.

## Honoured

| parameter | completions | chats | vLLM | |
|---|---|---|---|---|
"""
MIDDLE = """
## Taken where it changes nothing, else refused

| parameter | completions | chats | vLLM | why |
|---|---|---|---|---|
"""
LAST = """
## Taken and not used

| parameter | vLLM |
|---|---|
"""
KINDS: tuple[type[AnswerRequest], ...] = (CompletionRequest, ChatRequest)


def markdown() -> str:
    """The whole page."""
    names = dict.fromkeys(name for kind in KINDS for name in kind.model_fields)
    refused = sorted({name for kind in KINDS for name in kind.unsupported} - set(names))
    rows = [*map(_honoured, names)], [*map(_refused, refused)]
    ignored = [f"| `{name}` | {_in_vllm(name)} |\n" for name in sorted(IGNORED)]
    return "".join([HEAD, *rows[0], MIDDLE, *rows[1], LAST, *ignored])


def _honoured(name: str) -> str:
    cells = [_cell(kind, name) for kind in KINDS]
    told = next(kind.model_fields[name].description for kind in KINDS if name in kind.model_fields)
    return f"| `{name}` | {' | '.join(cells)} | {_in_vllm(name)} | {told} |\n"


def _refused(name: str) -> str:
    whys = dict.fromkeys(kind.unsupported[name].why for kind in KINDS if name in kind.unsupported)
    cells = [_only(kind, name) for kind in KINDS]
    return f"| `{name}` | {' | '.join(cells)} | {_in_vllm(name)} | {'; '.join(whys)} |\n"


def _in_vllm(name: str) -> str:
    return "yes" if name in VLLM else ""


def _cell(kind: type[AnswerRequest], name: str) -> str:
    """What a kind of request takes as this parameter."""
    field = kind.model_fields.get(name)
    if field is None:
        return _only(kind, name)
    schema = kind.model_json_schema()["properties"][name]
    found = ", ".join(dict.fromkeys(_kinds(schema, _range(field))))
    default = "" if field.is_required() or field.default is None else f" = {json.dumps(field.default)}"
    return f"{found}{default}"


def _kinds(schema: dict[str, Any], numbers: str) -> Iterator[str]:
    """The kinds of value that a JSON schema allows, in words; `numbers`: which numbers."""
    for one in schema.get("anyOf") or schema.get("oneOf") or [schema]:
        kind = one.get("type")
        if "anyOf" in one or "oneOf" in one:
            yield from _kinds(one, numbers)
        elif kind in ("integer", "number"):
            yield numbers or ("a whole number" if kind == "integer" else "a number")
        elif kind == "array":
            yield _many(one["items"])
        elif kind in _WORDS:
            yield _WORDS[kind]
        elif kind != "null":
            yield "an object"


_WORDS = {"boolean": "true or false", "string": "a text"}


def _many(items: dict[str, Any]) -> str:
    match items.get("type"):
        case "string":
            return "texts"
        case "integer":
            return "tokens"
        case "array":
            return "lists of tokens"
    return "objects"


def _range(field: FieldInfo) -> str:
    """Which numbers a parameter may be; empty where that is all."""
    bounds = {k: getattr(m, k) for m in field.metadata for k in ("ge", "gt", "le") if hasattr(m, k)}
    least, above, most = bounds.get("ge"), bounds.get("gt"), bounds.get("le")
    if least is not None and abs(least) >= 2**53:
        return "a whole number"
    if above is not None:
        return f"above {above:g}, to {most:g}"
    if least is None:
        return ""
    return f"{least:g} to {most:g}" if most is not None else f"{least:g} or more"


def _only(kind: type[AnswerRequest], name: str) -> str:
    """The values that change nothing."""
    if name not in kind.unsupported:
        return "refused"
    values = [f"`{json.dumps(value)}`" for value in kind.unsupported[name].neutral if value is not None]
    return f"only {' or '.join(values)}" if values else "only `null`"
