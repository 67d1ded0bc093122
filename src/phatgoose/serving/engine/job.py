"""One sequence to be written: what is asked of the engine, and what it tells while it writes."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.models.batched.version import Route
from phatgoose.serving.engine.sampling import Draw, Likelihood

_numbers = itertools.count()
ENDING = "the server ends"
"""What those are told whose answers aren't finished when it does."""


class ServingError(PhatgooseError):
    """The server can't be started as asked, or its engine can't do something."""


# From the root, the home folder or a drive: quoted with whatever spaces, or up to the next one. Not what follows a host, a word or a < (</s>).
_QUOTED_PATH = re.compile(r"""(['"])(?:~?/|[A-Za-z]:[/\\])[^'"\n]*?([^'"/\\\n]*)[/\\]?\1""")
_PATH = re.compile(r"""(?<![\w.:/\\~<-])(?:~?/|[A-Za-z]:[/\\])(?:[^\s'"/\\]+[/\\])*([^\s'"/\\]+)[/\\]?""")


def told(error: BaseException) -> str:
    """What clients may hear of an error. Ours say what is wrong, without the folders of this machine; others' messages might repeat
    what somebody else asked."""
    return hide_paths(str(error)) if isinstance(error, PhatgooseError) else type(error).__name__


def hide_paths(text: str, *known: Path | str | None) -> str:
    """The text with the last name alone of every absolute path; `known` ones may hold spaces."""
    for path in sorted(map(str, filter(None, known)), key=len, reverse=True):
        if Path(path).is_absolute():
            text = text.replace(path, Path(path).name)
    return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", text))


@dataclass(frozen=True)
class News:
    """What happened since the last one: tokens written, and how it ended, if it did."""

    tokens: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None


@dataclass(eq=False)
class Job:
    """Made on the event loop; an engine reads it in its own thread and calls `tell` on the loop.

    `load` is the engine's: by phase ("prompt", "answer") the weights that each expert of the way's pool had, summed over modules and
    tokens, float64 [experts], and over how many choices.
    """

    prompt: Sequence[int]
    route: Route | None
    """None: the base alone."""
    draw: Draw
    max_new_tokens: int
    ends: frozenset[int]
    """Tokens that end the answer; they belong to it."""
    watch: bool = False
    """Whether `load` is wanted."""
    score: int | None = None
    """How many likeliest tokens to report in place of each token of the prompt; None: the prompt isn't scored."""
    id: str = field(default_factory=lambda: f"job-{next(_numbers)}")
    written: list[int] = field(default_factory=list)
    prompt_likelihoods: list[Likelihood] = field(default_factory=list)
    """Of the prompt's second token and those after it, if it is scored."""
    load: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    counted: int = 0
    """How many of its tokens are in the load."""
    started: bool = False
    """Whether a pass has run over some of it."""
    failure: str | None = None
    """Set by the engine where this one's way or sampling failed."""
    began: float = field(default_factory=time.perf_counter)
    """When the request came, by time.perf_counter()."""
    first_token: float | None = None
    heard: Callable[[Job, int], None] = lambda job, tokens: None
    """Told of new tokens as they come, before they are in `written`."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _news: asyncio.Queue[News] = field(default_factory=asyncio.Queue)

    def __deepcopy__(self, memo: object) -> Job:
        return self  # transformers copies a request's settings when it starts one again

    def tell(self, news: News) -> None:
        """Called on the event loop."""
        if news.tokens and self.first_token is None:
            self.first_token = time.perf_counter()
        if news.tokens:
            self.heard(self, len(news.tokens))
        self.written += news.tokens
        self._news.put_nowait(news)

    async def news(self, deadline: float | None = None) -> AsyncIterator[News]:
        """What happens until it is finished.

        Raises:
            TimeoutError: nothing more had come at `deadline`, a time of the loop's clock.
        """
        while True:
            async with asyncio.timeout_at(deadline):
                one = await self._news.get()
            yield one
            if one.finished:
                return

    def add_load(self, phase: str, weights: Tensor, choices: int) -> None:
        before = self.load.get(phase)
        self.load[phase] = (
            (weights, choices) if before is None else (before[0] + weights, before[1] + choices)
        )
