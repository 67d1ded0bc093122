"""Answer a few prompts with the pool that comes with phatgoose, before the quickstart trains anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from phatgoose.analysis.measures import expert_shares
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import encode_prompt
from phatgoose.models.text.generate import greedy_answer
from phatgoose.models.trace.record import trace_answer
from phatgoose.routers import Gander

POOL = "bigbench-t0"
PROMPTS = (
    "Today I sing. Yesterday I",
    "This is a mouse. Now there is another one. There are two",
    "The capital of Portugal is",
    "John thinks the goose can fly, but",
)
"""In the form of the tasks that four of the pool's experts were trained on; none is told which."""
NEW_TOKENS = 12


@dataclass(frozen=True)
class FirstAnswer:
    """A prompt, what the base alone and the pool answer, and the expert that acted most."""

    prompt: str
    base: str
    pool: str
    expert: str


def first_answers(base: Base) -> Iterator[FirstAnswer]:
    """Each prompt's answers, as soon as they are there. The base has to be the pool's; it is unrouted in the end."""
    pool = Pool.load(POOL)
    encoded = [encode_prompt(base, f"{prompt}\nAnswer:") for prompt in PROMPTS]
    alone = [_line(base, greedy_answer(base, ids, NEW_TOKENS)[0, ids.shape[1] :]) for ids in encoded]
    route(base, pool, Gander())
    try:
        for prompt, ids, before in zip(PROMPTS, encoded, alone, strict=True):
            recorded, answer = trace_answer(base, ids, NEW_TOKENS)
            shares = expert_shares(recorded)
            yield FirstAnswer(prompt, before, _line(base, answer), max(shares, key=lambda name: shares[name]))
    finally:
        unroute(base)


def _line(base: Base, tokens: Tensor) -> str:
    """The answer's first line."""
    text = str(base.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return text.partition("\n")[0]
