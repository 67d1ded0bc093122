"""Answers in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phatgoose.serving.api.schema import ChatRequest, CompletionRequest
from phatgoose.serving.engine.sampling import Likelihood
from phatgoose.serving.engine.text import UNFINISHED, offsets
from phatgoose.serving.engine.text_stream import Piece, Writer
from phatgoose.serving.service import Ask

LOWEST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON doesn't have."""
LISTED = 32
"""Experts that an answer's list shows at most, heaviest first."""


@dataclass(frozen=True)
class Form:
    """What all parts of one answer share."""

    id: str
    model: str
    created: int
    request: ChatRequest | CompletionRequest
    tokenizer: Any
    echo: Sequence[str] = ()
    """Of each prompt its text, if it is to be repeated."""
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, piece: Piece, writer: Writer) -> dict[str, Any]:
        """A whole choice."""
        if self.chat:
            text = {"role": "assistant", "content": piece.text, "refusal": None}
            found: dict[str, Any] = {"index": index, "message": text}
        else:
            found = {"index": index, "text": self.echoed(index, writer) + piece.text}
        found["finish_reason"] = piece.finish
        found["logprobs"] = self.logprobs(index, piece, writer) if shown(writer) else None
        if not self.chat:
            found |= self.of_prompt(writer, whole=False)
        return found | self.token_ids(piece) | acted(writer)

    def chunk(self, index: int, piece: Piece, writer: Writer, *, first: bool) -> dict[str, Any]:
        """A piece of a choice as the server sends it while it writes."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if piece.text or first:
                delta["content"] = piece.text
            found: dict[str, Any] = {"index": index, "delta": delta}
        else:
            found = {"index": index, "text": (self.echoed(index, writer) if first else "") + piece.text}
        found["finish_reason"] = piece.finish
        found["logprobs"] = None
        if shown(writer) and (piece.likelihoods or (first and self.echo)):
            found["logprobs"] = self.logprobs(index, piece, writer, first=first)
        if first and not self.chat:
            found |= self.of_prompt(writer, whole=False)
        return found | self.token_ids(piece) | (acted(writer) if piece.finish else {})

    def token_ids(self, piece: Piece) -> dict[str, Any]:
        return {"token_ids": list(piece.tokens)} if self.request.return_token_ids else {}

    def of_prompt(self, writer: Writer, *, whole: bool = True) -> dict[str, Any]:
        """What was asked of the prompt, in vLLM's form: beside a chat's choices, and in a completion's."""
        found: dict[str, Any] = {}
        if whole and not self.chat:
            return found
        if self.request.return_token_ids:
            found["prompt_token_ids"] = list(writer.job.prompt)
        if (top := self.request.prompt_logprobs) is not None:
            known = writer.job.prompt_likelihoods
            found["prompt_logprobs"] = [None, *(self._ranked(one, top) for one in known)]
        return found

    def _ranked(self, one: Likelihood, top: int) -> dict[str, dict[str, Any]]:
        """A prompt's token and the likeliest in its place, by their ids."""
        rows = [(one.token, one.logprob, one.rank)]
        rows += [(t, lp, rank) for rank, (t, lp) in enumerate(one.top[:top], 1) if t != one.token]
        return {
            str(t): {"logprob": finite(lp), "rank": rank, "decoded_token": self.text(t)}
            for t, lp, rank in rows
        }

    def reported(self, writers: Sequence[Writer]) -> int:
        """Log-probabilities of these answers so far."""
        jobs = [writer.job for writer in writers]
        rows = [one for job in jobs for one in (*job.draw.likelihoods, *job.prompt_likelihoods)]
        return sum(1 + len(one.top) for one in rows)

    def echoed(self, index: int, writer: Writer) -> str:
        return self.echo[index] if self.echo else ""

    def logprobs(self, index: int, piece: Piece, writer: Writer, *, first: bool = True) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._of_chat(one) for _, one in piece.likelihoods], "refusal": None}
        offset, rows = len(self.echoed(index, writer)), []
        if self.echo and first:
            rows = self._of_prompt(writer, self.echoed(index, writer))
        rows += [(at + offset, one.token, one) for at, one in piece.likelihoods]
        return {
            "tokens": [self.text(token) for _, token, _ in rows],
            "token_logprobs": [None if one is None else finite(one.logprob) for _, _, one in rows],
            "top_logprobs": [self._top(one, writer.job.draw.settings.logprobs) for _, _, one in rows],
            "text_offset": [at for at, _, _ in rows],
        }

    def _of_prompt(self, writer: Writer, text: str) -> list[tuple[int, int, Likelihood | None]]:
        """(offset, token, likelihood) of the prompt's tokens; nothing predicts the first."""
        prompt, job = list(writer.job.prompt), writer.job
        known: list[Likelihood | None] = [None, *job.prompt_likelihoods]
        return list(zip(offsets(self.tokenizer, prompt, text), prompt, known, strict=True))

    def _top(self, one: Likelihood | None, most: int | None) -> dict[str, float] | None:
        if one is None:
            return None
        best: dict[str, float] = {}
        for token, logprob in one.top[:most]:  # the best first: of tokens that look alike it is shown
            best.setdefault(self.text(token), finite(logprob))
        best.setdefault(self.text(one.token), finite(one.logprob))
        return best

    def _of_chat(self, one: Likelihood) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.text(token)
            known = None if UNFINISHED in text else list(text.encode())
            return {"token": text, "logprob": finite(logprob), "bytes": known}

        return {**entry(one.token, one.logprob), "top_logprobs": [entry(t, lp) for t, lp in one.top]}

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self._texts[token]


def shown(writer: Writer) -> bool:
    """Whether log-probabilities were asked for."""
    return writer.job.draw.settings.logprobs is not None


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def usage(ask: Ask) -> dict[str, Any]:
    """Tokens read and written; a prompt counts once, however many answers it has."""
    return _usage(sum(map(len, ask.prompts)), sum(writer.tokens for writer in ask.writers))


def usage_so_far(writer: Writer) -> dict[str, Any]:
    """Of one answer and its prompt, while it is written."""
    return _usage(len(writer.job.prompt), writer.tokens)


def _usage(read: int, written: int) -> dict[str, Any]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def acted(writer: Writer) -> dict[str, Any]:
    """Which experts acted, if that was asked for: of each phase, the share of the routing weight over modules and tokens."""
    job = writer.job
    if not job.watch:
        return {}
    names = () if job.route is None else job.route.version.pool.names
    shares = {}
    for phase in ("prompt", "answer"):
        found = []
        if phase in job.load:
            weights, choices = job.load[phase]
            part = weights / max(choices, 1)
            best = part.argsort(descending=True)[:LISTED].tolist()
            found = [{"name": names[i], "share": round(float(part[i]), 6)} for i in best if part[i] > 0]
        shares[phase] = found
    return {"phatgoose": {"experts": shares}}
