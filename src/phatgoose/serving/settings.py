"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from phatgoose.errors import PhatgooseError


@dataclass(frozen=True)
class ServeSettings:
    """Limits and habits of the server."""

    engine: Literal["auto", "continuous", "batches"] = "auto"
    """continuous: transformers' continuous batching, answers join and leave at every token. batches: generate(), one batch after the
    other, for what that can't do: encoder–decoders. auto: the first that fits the model."""
    max_running: int = 32
    """Answers that are written at the same time."""
    max_waiting: int = 128
    """Answers that wait for their turn; more are turned away with status 429."""
    max_answers: int = 64
    """Answers to one request: its prompts times n."""
    max_tokens: int = 1024
    """The most tokens of an answer; a request that asks for more is refused, one that doesn't say gets at most these."""
    max_prompt_tokens: int = 4096
    """The most tokens of a prompt where the model has no limit of its own: encoder–decoders."""
    batch_tokens: int = 512
    """Tokens that a pass of the continuous engine runs over. Long prompts are read in several passes, between which others go on."""
    cache_tokens: int | None = None
    """Tokens that the continuous engine's cache holds; none: what max_running answers can need, in a quarter of the free memory. They
    are allocated when the server starts."""
    timeout_seconds: float = 600.0
    """A request that isn't finished then is broken off with status 504."""
    drain_seconds: float = 60.0
    """How long requests may go on when the server is told to end."""
    body_seconds: float = 30.0
    """How long a client may take to send its request's head, and again its body."""
    max_body_bytes: int = 2 * 2**20
    """Larger requests are refused with status 413."""
    max_routers: int = 8
    """Routers that are kept ready beside the default one; each costs about what the pool's gates do."""
    encoder: str | None = None
    """The sentence encoder for routers that read text (retrieval, centroid): a folder or a Hub id. none: the pinned all-minilm-l6-v2 alone.
    One that an expert's author names is never loaded."""
    follow_seconds: float | None = None
    """Every so many seconds, the pool's folder is looked at, and read again if others changed it; none: at /admin/reload only."""
    watch_every: int = 16
    """Every so many passes, what each expert did is added to the metrics."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 1:
                raise PhatgooseError(f"{field.name} is {value!r}, expected at least 1.")
