"""What requests may say: OpenAI's parameters and vLLM's as far as they can be honoured, the others refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from phatgoose.serving.api.parameters import (
    IGNORED,
    LISTS,
    MANY_TEXTS,
    MAX_BIASES,
    MAX_STOPS,
    MAX_TOP,
    MAX_WORDS,
    NUMBERS,
    ONE,
    REFUSED,
    REFUSED_CHATS,
    REFUSED_COMPLETIONS,
    Stop,
    Strict,
    Text,
    TokenList,
    Tokens,
    Whole,
    few,
    form,
    none_if,
    one_or_many,
    refused,
    supported,
)


class Extension(Strict):
    """What is asked for beyond OpenAI's interface."""

    experts: bool = Field(
        False, description="Return how much each expert acted on the prompt and on the answer."
    )


class StreamOptions(Strict):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = None


class Common(Strict):
    """What both kinds of completion take."""

    model: Text | None = Field(
        None,
        max_length=256,
        description="The routed pool, base, the name of an expert, or a router (phatgoose:top_k=3). The pool, if it isn't given.",
    )
    n: Whole | None = Field(1, ge=1, le=128, description="How many answers to each prompt.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: the likeliest token.")
    top_p: float | None = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw among the fewest likeliest tokens that have this probability together.",
    )
    top_k: Whole | None = Field(
        None, ge=-1, description="Draw among this many likeliest tokens; 0 or −1: among all."
    )
    min_p: float | None = Field(
        0.0,
        ge=0,
        le=1,
        description="Draw among tokens that are at least this part as likely as the likeliest.",
    )
    stop: (
        Annotated[
            Annotated[Stop, Tag(ONE)]
            | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag(MANY_TEXTS)],
            Discriminator(one_or_many),
        ]
        | None
    ) = Field(None, description="The answer ends before any of these texts, up to 16.")
    stop_token_ids: TokenList | None = Field(
        None,
        max_length=MAX_BIASES,
        description="The answer ends with any of these tokens, beside the model's own ends.",
    )
    ignore_eos: bool | None = Field(False, description="The model's own end tokens don't end the answer.")
    min_tokens: Whole | None = Field(
        0,
        ge=0,
        description="At least this many tokens come before an end token, and before stop texts are looked for.",
    )
    bad_words: list[Stop] | None = Field(
        None,
        max_length=MAX_WORDS,
        fail_fast=True,
        description="Words whose tokens, with and without a space before them, aren't written one after the other.",
    )
    allowed_token_ids: Annotated[TokenList, Field(min_length=1)] | None = Field(
        None, description="Only these tokens are written."
    )
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63, description="Draws the same tokens again.")
    presence_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken off the logit of tokens that the answer has."
    )
    frequency_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken off the logit of a token for each time that the answer has it."
    )
    repetition_penalty: float | None = Field(
        1.0,
        gt=0,
        le=100,
        description="Logits of tokens that prompt or answer have are divided by it (negative ones multiplied).",
    )
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(few),
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = Field(None, description="Added to the logits of these tokens, up to 1,024.")
    prompt_logprobs: Whole | None = Field(
        None,
        ge=0,
        le=MAX_TOP,
        description="Return the log-probability of each of the prompt's tokens, and this many of the likeliest in its place.",
    )
    return_token_ids: bool | None = Field(False, description="Return the tokens of prompt and answer.")
    stream: bool | None = Field(False, description="Send the answer as it is written.")
    stream_options: StreamOptions | None = Field(
        None, description="include_usage, and continuous_usage_stats: in every part. With stream only."
    )
    phatgoose: Extension | None = Field(None, description="experts: who acted.")

    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = REFUSED

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        data = supported(data, cls.refused, cls.model_fields)
        if not isinstance(data, dict):
            return data
        kept = {key: value for key, value in data.items() if key not in IGNORED}
        if kept.get("stop") == "":  # some clients' way to say nothing
            del kept["stop"]
        return kept

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options needs stream to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise refused("prompt_logprobs", "prompt_logprobs can't be streamed: leave stream out")
        return self

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
    content: (
        Annotated[
            Annotated[Text, Tag(ONE)] | Annotated[list[TextPart], Field(fail_fast=True), Tag(MANY_TEXTS)],
            Discriminator(one_or_many),
        ]
        | None
    )
    name: Text | None = Field(None, max_length=256)
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _said(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(
                f"content is null, which it may be of the assistant's messages only, not of {self.role}'s"
            )
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common):
    """A conversation; the tokenizer's chat template makes a prompt of it."""

    messages: list[Message] = Field(
        min_length=1, max_length=4096, fail_fast=True, description="The conversation so far."
    )
    max_tokens: Whole | None = Field(None, ge=1, description="The most tokens of an answer.")
    max_completion_tokens: Whole | None = Field(
        None, ge=1, description="The same as max_tokens, by OpenAI's newer name."
    )
    logprobs: bool | None = Field(False, description="Return each token's log-probability.")
    top_logprobs: Whole | None = Field(
        None,
        ge=0,
        le=MAX_TOP,
        description="With logprobs: also return this many of the likeliest tokens in each place.",
    )

    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = REFUSED | REFUSED_CHATS

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs to be true")
        return self


class CompletionRequest(Common):
    """A text to go on with, or several; as text or as tokens."""

    prompt: Annotated[
        Annotated[Text, Tag(ONE)]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(MANY_TEXTS)]
        | Annotated[Tokens, Tag(NUMBERS)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag(LISTS)],
        Discriminator(form),
    ] = Field(description="One text or list of tokens, or several.")
    max_tokens: Whole | None = Field(
        16, ge=0, description="The most tokens of an answer; 0 with echo or prompt_logprobs only."
    )
    echo: bool | None = Field(False, description="Repeat the prompt before the answer.")
    logprobs: Whole | None = Field(
        None,
        ge=0,
        le=MAX_TOP,
        description="Return each token's log-probability, with echo the prompt's too, and this many of the likeliest in its place.",
    )
    best_of: Whole | None = Field(None, ge=1, le=128, description="Must equal n: answers aren't ranked.")

    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = REFUSED | REFUSED_COMPLETIONS

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return none_if(value, False)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused(
                "best_of", "best_of isn't supported: answers aren't ranked; leave it out, or make it n"
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise refused(
                "max_tokens", "max_tokens is 0, which makes sense with echo or prompt_logprobs only"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
