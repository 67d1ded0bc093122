"""Types of request parameters, and the parameters that this server doesn't honour."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

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
MAX_PARAMETERS = 64
"""More than any request has. Beyond that, only one unknown parameter is reported."""
ONE, MANY_TEXTS, NUMBERS, LISTS = FORMS = ("as one", "as texts", "as tokens", "as lists of tokens")
"""Tags of a parameter's forms in pydantic's errors. Clients never see them."""


class Unsupported(NamedTuple):
    """A parameter that would change the answer and isn't honoured."""

    neutral: tuple[Any, ...]
    """Values that change nothing, so they are accepted."""
    why: str


def _load_table(table: Mapping[str, Any]) -> dict[str, Unsupported]:
    return {name: Unsupported((None, *rule["neutral"]), rule["why"]) for name, rule in table.items()}


_TABLES = tomllib.loads(files("phatgoose.serving.api").joinpath("unsupported.toml").read_text("utf-8"))
IGNORED = frozenset(_TABLES["ignored"])
"""Parameters that have no effect on the answer."""
UNSUPPORTED = _load_table(_TABLES["every"])
UNSUPPORTED_CHAT = UNSUPPORTED | _load_table(_TABLES["chat"])
UNSUPPORTED_COMPLETION = UNSUPPORTED | _load_table(_TABLES["completions"])
UNSUPPORTED_TOKENIZE = {name: UNSUPPORTED[name] for name in _TABLES["tokenize"]}


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


def _tag_one_or_many(value: Any) -> str:
    return MANY_TEXTS if isinstance(value, list) else ONE


OneOrMany = Annotated[
    Annotated[FIRST, Tag(ONE)] | Annotated[SECOND, Tag(MANY_TEXTS)], Discriminator(_tag_one_or_many)
]
"""One value, or a list of them. The tags keep pydantic's errors to the form that the client used."""


def prompt_form(value: Any) -> str:
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
    unsupported: ClassVar[dict[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, data: Any) -> Any:
        """Keeps only the first unknown parameter of a body that has very many."""
        if not isinstance(data, dict) or len(data) <= MAX_PARAMETERS:
            return data
        first = next(name for name in data if name not in cls.model_fields)
        return {name: data[name] for name in data if name in cls.model_fields or name == first}

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, data: Any) -> Any:
        """Drops unsupported parameters whose values change nothing, and refuses the others."""
        if not isinstance(data, dict):
            return data
        rules = {name: rule for name, rule in cls.unsupported.items() if name not in cls.model_fields}
        for name, (neutral, why) in rules.items():
            if name in data and data[name] not in neutral:
                raise invalid(name, f"{name} isn't supported: {why}")
        return {name: value for name, value in data.items() if name not in rules}
