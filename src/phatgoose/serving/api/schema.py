"""Request bodies: the parameters that are honoured, and what happens to the others."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

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

FIRST = TypeVar("FIRST")
SECOND = TypeVar("SECOND")
MAX_STOPS, MAX_TOP, MAX_BIASES, MAX_WORDS = 16, 20, 1024, 128
ONE, MANY_TEXTS, NUMBERS, LISTS = FORMS = ("as one", "as texts", "as tokens", "as lists of tokens")
"""Tags of a parameter's forms in pydantic's errors. Clients never see them."""


class Unsupported(NamedTuple):
    """A parameter that would change the answer and isn't honoured."""

    neutral: tuple[Any, ...]
    """Values that change nothing, so they are accepted."""
    why: str


_TABLES = tomllib.loads(files("phatgoose.serving.api").joinpath("unsupported.toml").read_text("utf-8"))
IGNORED = frozenset(_TABLES["ignored"])
"""Parameters that have no effect on the answer."""


def _unsupported(*tables: str) -> dict[str, Unsupported]:
    rules = {name: rule for table in tables for name, rule in _TABLES[table].items()}
    return {name: Unsupported((None, *rule["neutral"]), rule["why"]) for name, rule in rules.items()}


def invalid(param: str, message: str) -> PydanticCustomError:
    """An error about the request as a whole, reported under `param`."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def _check_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character (a lone surrogate)") from None
    return text


def _integral_float_to_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limit_biases(value: Any) -> Any:
    # Before pydantic validates each entry: there may be very many.
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} entries, at most {MAX_BIASES} are taken")
    return value


Text = Annotated[str, AfterValidator(_check_surrogates)]
"""Text that a tokenizer can read. JSON can also carry lone surrogates."""
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Name = Annotated[Text | None, Field(max_length=256)]
Integer = Annotated[int, BeforeValidator(_integral_float_to_int)]
"""An integer, which may be written as 4.0: JSON has one kind of number."""
Count = Annotated[Integer | None, Field(ge=0)]
PositiveCount = Annotated[Integer | None, Field(ge=1)]
Answers = Annotated[Integer | None, Field(ge=1, le=128)]
TopLogprobs = Annotated[Integer | None, Field(ge=0, le=MAX_TOP)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Tokens = Annotated[TokenList, Field(min_length=1)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_limit_biases)]


def _tag_one_or_many(value: Any) -> str:
    return MANY_TEXTS if isinstance(value, list) else ONE


OneOrMany = Annotated[
    Annotated[FIRST, Tag(ONE)] | Annotated[SECOND, Tag(MANY_TEXTS)], Discriminator(_tag_one_or_many)
]
"""One value, or a list of them. The tags keep pydantic's errors to the form that the client used."""


def _tag_prompt(value: Any) -> str:
    """The form in which a completion's prompt is given."""
    if not isinstance(value, list):
        return ONE
    first = value[0] if value else None
    if isinstance(first, list):
        return LISTS
    return NUMBERS if isinstance(first, int | float) and not isinstance(first, bool) else MANY_TEXTS


class StrictModel(BaseModel):
    """A body of which the first error is reported.

    A large body may hold hundreds of thousands of errors. Each would be an object, made while no other client is
    served. So lists are validated up to their first error (fail_fast).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        """Drops parameters that change nothing, refuses unsupported ones, and keeps only the first unknown one."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if name not in cls.ignored}
        for name, (neutral, why) in cls.unsupported.items():
            if name in data and data.pop(name) not in neutral:
                raise invalid(name, f"{name} isn't supported: {why}")
        known = cls.model_fields
        first = next((name for name in data if name not in known), None)
        return {name: value for name, value in data.items() if name in known or name == first}


class Extension(StrictModel):
    """What can be requested beyond OpenAI's API."""

    experts: bool = False
    """Return how much each expert acted on the prompt and on the answer."""


class StreamOptions(StrictModel):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = None


class AnswerRequest(StrictModel):
    """The parameters that chats and completions share."""

    model: Name = None
    """The routed pool, base, the name of an expert, or a router (phatgoose:top_k=3). Default: the pool."""
    n: Answers = 1
    """The number of answers to each prompt."""
    temperature: Annotated[float | None, Field(ge=0, le=2)] = 1.0
    """0: take the likeliest token."""
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of likeliest tokens whose probabilities add up to this."""
    top_k: Annotated[Integer | None, Field(ge=-1)] = None
    """Sample from this many likeliest tokens; 0 or −1: from all."""
    min_p: Annotated[float | None, Field(ge=0, le=1)] = 0.0
    """Sample from tokens whose probability is at least this fraction of the likeliest token's."""
    stop: Annotated[
        OneOrMany[Stop, Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]] | None,
        BeforeValidator(lambda stop: None if stop == "" else stop),  # some clients send "" for no stop string
    ] = None
    """The answer ends before any of these texts, up to 16."""
    stop_token_ids: Annotated[TokenList | None, Field(max_length=MAX_BIASES)] = None
    """The answer ends with any of these tokens, in addition to the model's own end tokens."""
    ignore_eos: bool | None = False
    """The model's own end tokens don't end the answer."""
    min_tokens: Count = 0
    """At least this many tokens come before an end token, and before stop texts are looked for."""
    bad_words: Annotated[list[Stop] | None, Field(max_length=MAX_WORDS, fail_fast=True)] = None
    """Words whose token sequences are never written, with and without a space before them."""
    allowed_token_ids: Tokens | None = None
    """Only these tokens are written."""
    seed: Annotated[Integer | None, Field(ge=-(2**63), lt=2**63)] = None
    """The same seed samples the same tokens again."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logit of every token that is in the answer already."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logit of a token once for each time it is in the answer already."""
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = 1.0
    """Logits of tokens that are in the prompt or answer are divided by it (negative ones are multiplied)."""
    logit_bias: Annotated[Biases | None, Field(max_length=MAX_BIASES)] = None
    """Added to the logits of these tokens, up to 1,024."""
    prompt_logprobs: TopLogprobs = None
    """Return the log-probability of each prompt token, and of this many of the likeliest tokens in its place."""
    return_token_ids: bool | None = False
    """Return the token ids of prompt and answer."""
    stream: bool | None = False
    """Send the answer while it is written."""
    stream_options: StreamOptions | None = None
    """include_usage, and continuous_usage_stats: in every chunk. With stream only."""
    phatgoose: Extension | None = None
    """experts: which experts acted."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options needs stream to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs can't be streamed: leave stream out")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: OneOrMany[Text, Annotated[list[TextPart], Field(fail_fast=True)]] | None
    name: Name = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(
                f"content is null, which only an assistant's message may have, not the {self.role}'s"
            )
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(AnswerRequest):
    """A conversation, which the tokenizer's chat template turns into a prompt."""

    messages: Messages
    """The conversation so far."""
    max_tokens: PositiveCount = None
    """The most tokens of an answer."""
    max_completion_tokens: PositiveCount = None
    """The same as max_tokens, by OpenAI's newer name."""
    logprobs: bool | None = False
    """Return each token's log-probability."""
    top_logprobs: TopLogprobs = None
    """With logprobs: also return this many of the likeliest tokens in each place."""

    unsupported: ClassVar[dict[str, Unsupported]] = _unsupported("every", "chat")

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        return self


class CompletionRequest(AnswerRequest):
    """One or several texts to continue, as text or as tokens."""

    prompt: Annotated[
        Annotated[Text, Tag(ONE)]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(MANY_TEXTS)]
        | Annotated[Tokens, Tag(NUMBERS)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag(LISTS)],
        Discriminator(_tag_prompt),
    ]
    """One text or list of tokens, or several."""
    max_tokens: Count = 16
    """The most tokens of an answer; 0 with echo or prompt_logprobs only."""
    echo: bool | None = False
    """Repeat the prompt before the answer."""
    logprobs: Annotated[TopLogprobs, BeforeValidator(lambda top: None if top is False else top)] = None
    """Return each token's log-probability (with echo also the prompt's), and this many likeliest in its place."""
    best_of: Answers = None
    """Must equal n: answers aren't ranked."""

    unsupported: ClassVar[dict[str, Unsupported]] = _unsupported("every", "completions")

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid(
                "best_of", "best_of isn't supported: answers aren't ranked; leave it out, or make it n"
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid(
                "max_tokens", "max_tokens is 0, which makes sense with echo or prompt_logprobs only"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


ChatOrCompletion = ChatRequest | CompletionRequest


class AddExpert(StrictModel):
    """An expert to add: a folder on the server's machine."""

    folder: Text = Field(min_length=1, max_length=4096)
    name: Annotated[Text | None, Field(min_length=1, max_length=256)] = None


class Tokenize(StrictModel):
    """A text, read as /v1/completions reads it, or a conversation, read as /v1/chat/completions reads it."""

    model: Name = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False

    unsupported: ClassVar[dict[str, Unsupported]] = {
        name: rule for name, rule in ChatRequest.unsupported.items() if name in _TABLES["tokenize"]
    }

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "give either a prompt or messages to tokenize")
        if self.messages is not None and self.add_special_tokens:
            raise invalid(
                "add_special_tokens", "add_special_tokens isn't supported: the chat template has them"
            )
        return self


class Detokenize(StrictModel):
    """Tokens to turn into text."""

    model: Name = None
    tokens: TokenList
