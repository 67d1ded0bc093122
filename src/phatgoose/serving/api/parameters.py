"""What the values of parameters may be, and which parameters aren't honoured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

IGNORED = frozenset(
    [
        "cache_salt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)
"""Parameters without a bearing on the answer."""
FORMATS, NO_TEMPLATE = "answers can't be held to a format", "the tokenizer's own chat template is used"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((None, True), "the prompt ends where the model is to answer"),
    "audio": ((None,), "answers are text"),
    "chat_template": ((None,), NO_TEMPLATE),
    "chat_template_kwargs": ((None, {}), NO_TEMPLATE),
    "continue_final_message": ((None, False), "the prompt ends where the model is to answer"),
    "detokenize": ((None, True), "answers are text"),
    "documents": ((None, []), "the tokenizer's own chat template is given messages alone"),
    "function_call": ((None, "none"), "functions can't be called"),
    "functions": ((None, []), "functions can't be called"),
    "guided_choice": ((None,), FORMATS),
    "guided_decoding_backend": ((None,), FORMATS),
    "guided_grammar": ((None,), FORMATS),
    "guided_json": ((None,), FORMATS),
    "guided_regex": ((None,), FORMATS),
    "guided_whitespace_pattern": ((None,), FORMATS),
    "include_reasoning": ((None, True, False), "there is no reasoning"),
    "include_stop_str_in_output": ((None, False), "an answer ends before its stop string"),
    "kv_transfer_params": ((None,), "caches aren't transferred"),
    "length_penalty": ((None, 1.0), "answers aren't searched for"),
    "logits_processors": ((None, []), "requests bring no code"),
    "media_io_kwargs": ((None, {}), "prompts are text"),
    "mm_processor_kwargs": ((None, {}), "prompts are text"),
    "modalities": ((None, ["text"]), "answers are text"),
    "prediction": ((None,), "predicted outputs aren't used"),
    "priority": ((None, 0), "requests are answered in the order they come"),
    "prompt_embeds": ((None,), "prompts are text or tokens"),
    "reasoning_effort": ((None, "none"), "there is no reasoning to set"),
    "response_format": ((None, {"type": "text"}), FORMATS),
    "return_tokens_as_token_ids": ((None, False), "tokens are returned as text; ask for return_token_ids"),
    "skip_special_tokens": ((None, True), "special tokens aren't shown; ask for return_token_ids"),
    "spaces_between_special_tokens": ((None, True), "special tokens aren't shown"),
    "structured_outputs": ((None,), FORMATS),
    "suffix": ((None, ""), "text can't be inserted before a suffix"),
    "thinking_token_budget": ((None,), "there is no reasoning to bound"),
    "tool_choice": ((None, "none", "auto"), "tools can't be called"),
    "tools": ((None, []), "tools can't be called"),
    "truncate_prompt_tokens": ((None,), "prompts are never cut"),
    "use_beam_search": ((None, False), "answers aren't searched for"),
    "verbosity": ((None,), "verbosity can't be set"),
    "vllm_xargs": ((None, {}), "there are no extensions of vLLM's"),
    "web_search_options": ((None,), "nothing is searched"),
}
"""Parameters of OpenAI's and vLLM's that would change the answer, what they may be since that changes nothing, and why nothing else."""
REFUSED_CHATS: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": ((None, False), "the chat template has them"),
    "echo": ((None, False), "the prompt is repeated by /v1/completions only"),
}
REFUSED_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": ((None, True), "give the prompt as tokens instead (/tokenize makes them)"),
}
MAX_STOPS, MAX_TOP, MAX_BIASES, MAX_WORDS = 16, 20, 1024, 128
ONE, MANY_TEXTS, NUMBERS, LISTS = FORMS = ("as one", "as texts", "as tokens", "as lists of tokens")
"""Names of a parameter's forms in pydantic's errors, told to nobody."""
MANY = 64
"""Parameters, of which no request knows as many."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character (a lone surrogate)") from None
    return text


def refused(param: str, message: str) -> PydanticCustomError:
    """What is wrong with a request as a whole, and the parameter that it is told of."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


Text = Annotated[str, AfterValidator(_whole)]
"""Text that a tokenizer can read: JSON can carry half characters."""
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


def supported(
    data: Any, unsupported: Mapping[str, tuple[tuple[Any, ...], str]], known: Collection[str]
) -> Any:
    """A request without the parameters that aren't honoured, where their values change nothing.

    Args:
        known: parameters that this kind of request honours.

    Raises:
        PydanticCustomError: a value would change something.
    """
    if not isinstance(data, dict):
        return data
    unsupported = {name: rule for name, rule in unsupported.items() if name not in known}
    for name, (neutral, why) in unsupported.items():
        if name in data and data[name] not in neutral:
            raise refused(name, f"{name} isn't supported: {why}")
    return {name: value for name, value in data.items() if name not in unsupported}


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_as_whole)]
"""A whole number, also where it is written as 4.0: JSON has one kind of number."""


def none_if(value: Any, *neutral: Any) -> Any:
    """None in place of what means the same."""
    return None if any(type(value) is type(one) and value == one for one in neutral) else value


def form(value: Any) -> str:
    """Which of its forms a parameter is given in, so that what is wrong is told of that form alone."""
    if not isinstance(value, list):
        return ONE
    first = value[0] if value else None
    if isinstance(first, list):
        return LISTS
    return NUMBERS if isinstance(first, int | float) and not isinstance(first, bool) else MANY_TEXTS


def one_or_many(value: Any) -> str:
    return MANY_TEXTS if isinstance(value, list) else ONE


def few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} entries, at most {MAX_BIASES} are taken")
    return value


class Strict(BaseModel):
    """What isn't as it should be is told by its first error: of a large body there could be hundreds of thousands, each an object,
    made while nobody else is answered. So lists are read until their first (fail_fast)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Of many parameters that nobody knows, leaves the first."""
        if not isinstance(data, dict) or len(data) <= MANY:
            return data
        first = next(name for name in data if name not in cls.model_fields)
        return {name: data[name] for name in data if name in cls.model_fields or name == first}


TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Tokens = Annotated[TokenList, Field(min_length=1)]
