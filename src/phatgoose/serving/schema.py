"""What requests may say: OpenAI's parameters as far as they can be honoured, the others refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

IGNORED = frozenset(
    [
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)
"""Parameters without a bearing on the answer."""
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((None,), "answers are text"),
    "function_call": ((None, "none"), "functions can't be called"),
    "functions": ((None, []), "functions can't be called"),
    "modalities": ((None, ["text"]), "answers are text"),
    "prediction": ((None,), "predicted outputs aren't used"),
    "reasoning_effort": ((None, "none"), "there is no reasoning to set"),
    "response_format": ((None, {"type": "text"}), "answers can't be held to a format"),
    "suffix": ((None, ""), "text can't be inserted before a suffix"),
    "tool_choice": ((None, "none", "auto"), "tools can't be called"),
    "tools": ((None, []), "tools can't be called"),
    "verbosity": ((None,), "verbosity can't be set"),
    "web_search_options": ((None,), "nothing is searched"),
}
"""Parameters that would change the answer, what they may be since that changes nothing, and why nothing else."""
MAX_STOPS, MAX_TOP, MAX_BIASES = 16, 20, 1024
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


def _form(value: Any) -> str:
    """Which of its forms a parameter is given in, so that what is wrong is told of that form alone."""
    if not isinstance(value, list):
        return ONE
    first = value[0] if value else None
    if isinstance(first, list):
        return LISTS
    return NUMBERS if isinstance(first, int | float) and not isinstance(first, bool) else MANY_TEXTS


def _one_or_many(value: Any) -> str:
    return MANY_TEXTS if isinstance(value, list) else ONE


def _few(value: Any) -> Any:
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


class Extension(Strict):
    """What is asked for beyond OpenAI's interface."""

    experts: bool = Field(
        False, description="Return how much each expert acted on the prompt and on the answer."
    )


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Common(Strict):
    """What both kinds of completion take."""

    model: Text | None = Field(
        None,
        max_length=256,
        description="The routed pool, base, the name of an expert, or a router (phatgoose:top_k=3). The pool, if it isn't given.",
    )
    n: int | None = Field(1, ge=1, le=128)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    stop: (
        Annotated[
            Annotated[Stop, Tag(ONE)]
            | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag(MANY_TEXTS)],
            Discriminator(_one_or_many),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(_few),
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    phatgoose: Extension | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (neutral, why) in REFUSED.items():
            if name in data and name not in cls.model_fields and data[name] not in neutral:
                raise refused(name, f"{name} isn't supported: {why}")
        dropped = {name for name in (*IGNORED, *REFUSED) if name not in cls.model_fields}
        return {key: value for key, value in data.items() if key not in dropped}

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag(ONE)] | Annotated[list[TextPart], Field(fail_fast=True), Tag(MANY_TEXTS)],
        Discriminator(_one_or_many),
    ]
    name: Text | None = Field(None, max_length=256)
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common):
    """A conversation; the tokenizer's chat template makes a prompt of it."""

    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs to be true")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Common):
    """A text to go on with, or several; as text or as tokens."""

    prompt: Annotated[
        Annotated[Text, Tag(ONE)]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(MANY_TEXTS)]
        | Annotated[Tokens, Tag(NUMBERS)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag(LISTS)],
        Discriminator(_form),
    ]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    best_of: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused(
                "best_of", "best_of isn't supported: answers aren't ranked; leave it out, or make it n"
            )
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens is 0, which makes sense with echo only")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class AddExpert(Strict):
    """An expert to add: a folder on the server's machine."""

    folder: Text = Field(min_length=1, max_length=4096)
    name: Text | None = Field(None, min_length=1, max_length=256)
