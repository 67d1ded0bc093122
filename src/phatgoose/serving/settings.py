"""The server's settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from phatgoose.errors import PhatgooseError


@dataclass(frozen=True)
class ServeSettings:
    """The server's limits, and how it works."""

    engine: Literal["auto", "continuous", "batches"] = "auto"
    """continuous: transformers' continuous batching, where answers join and leave at every token. batches: generate(),
    one batch after the other, for models that the former can't run (encoder–decoders). auto: the first that can run
    the model."""
    max_running: int = 32
    """Answers that are written at the same time."""
    max_waiting: int = 128
    """Answers that may wait for their turn; further ones get status 429."""
    max_answers: int = 64
    """The most answers to one request: its prompts times n."""
    max_tokens: int = 1024
    """The most tokens of an answer, and the default. A request for more is refused."""
    max_prompt_tokens: int = 4096
    """The most tokens of a prompt, for models that have no limit of their own (encoder–decoders)."""
    batch_tokens: int = 512
    """The most tokens of a pass of the continuous engine. A longer prompt takes several passes; others continue."""
    cache_tokens: int | None = None
    """Tokens that the continuous engine's cache holds, allocated at the start; none: what max_running answers can need,
    at most a quarter of the free memory."""
    timeout_seconds: float = 600.0
    """A request that isn't finished by then ends with status 504."""
    drain_seconds: float = 60.0
    """How long running requests may continue when the server is told to stop."""
    body_seconds: float = 30.0
    """How long a client may take to send its request's head, and again its body."""
    max_body_bytes: int = 2 * 2**20
    """Larger requests get status 413."""
    max_routers: int = 8
    """Routers that are kept ready besides the default one; each costs about as much memory as the pool's gates."""
    encoder: str | None = None
    """The sentence encoder for routers that read text (retrieval, centroid): a folder or a Hub id. none: only the
    pinned all-minilm-l6-v2. An encoder that an expert's author names is never loaded."""
    follow_seconds: float | None = None
    """Every so many seconds, check the pool's folder and read it if others changed it; none: only at /admin/reload."""
    watch_every: int = 16
    """Add what each expert did to the metrics once in so many passes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 1:
                raise PhatgooseError(f"{field.name} is {value!r}, expected at least 1.")
