"""Answers as JSON in OpenAI's forms, with vLLM's additions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phatgoose.models.text.decoding import REPLACEMENT
from phatgoose.serving.api.schema import ChatOrCompletion, ChatRequest
from phatgoose.serving.engine.engine import GenerationJob
from phatgoose.serving.engine.sampling import TokenLogprob
from phatgoose.serving.engine.text import Delta, TextStream, token_offsets
from phatgoose.serving.service import Generation

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""
MAX_EXPERTS = 32
"""The most experts in an answer's list."""


@dataclass(frozen=True)
class ResponseFormat:
    """What all parts of one response share."""

    id: str
    model: str
    created: int
    request: ChatOrCompletion
    tokenizer: Any
    generation: Generation
    echo: Sequence[str] = ()
    """The text of each answer's prompt, if the request wants it repeated."""
    _token_texts: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, delta: Delta, *, chunk: bool = False, first: bool = True) -> dict[str, Any]:
        """An answer, or with `chunk` the next part of one, as a stream sends it."""
        job = self.generation.streams[index].job
        choice: dict[str, Any] = {"index": index}
        if not self.chat:
            choice["text"] = (self._echo_text(index) if first else "") + delta.text
        elif not chunk:
            choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        else:
            choice["delta"] = {"role": "assistant"} if first else {}
            if delta.text or first:
                choice["delta"]["content"] = delta.text
        has_logprobs = not chunk or delta.logprobs or (first and self.echo)
        wanted = job.sampler.params.logprobs is not None
        choice["finish_reason"] = delta.finish_reason
        choice["logprobs"] = self._logprobs(index, delta, first) if wanted and has_logprobs else None
        if first and not self.chat:
            choice |= self.prompt_fields(index)
        if self.request.return_token_ids:
            choice["token_ids"] = list(delta.tokens)
        return choice | (expert_shares(job) if delta.finish_reason else {})

    def prompt_fields(self, index: int) -> dict[str, Any]:
        """vLLM's fields about the prompt, which are beside a chat's choices, and inside a completion's."""
        job = self.generation.streams[index].job
        fields: dict[str, Any] = {}
        if self.request.return_token_ids:
            fields["prompt_token_ids"] = list(job.prompt)
        if (top := self.request.prompt_logprobs) is not None:
            ranked = (self._ranked(one, top) for one in job.prompt_logprobs)
            fields["prompt_logprobs"] = [None, *ranked]
        return fields

    def _ranked(self, one: TokenLogprob, top: int) -> dict[str, dict[str, Any]]:
        """A prompt token and the likeliest ones in its place, by their ids."""
        rows = [(one.token, one.logprob, one.rank)]
        rows += [(t, lp, rank) for rank, (t, lp) in enumerate(one.top[:top], 1) if t != one.token]
        return {
            str(t): {"logprob": _finite(lp), "rank": rank, "decoded_token": self._token_text(t)}
            for t, lp, rank in rows
        }

    def _echo_text(self, index: int) -> str:
        return self.echo[index] if self.echo else ""

    def _logprobs(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._chat_logprob(one) for _, one in delta.logprobs], "refusal": None}
        job, echo = self.generation.streams[index].job, self._echo_text(index)
        rows: list[tuple[int, int, TokenLogprob | None]] = []  # (offset, token, log-probability)
        if self.echo and first:
            prompt = list(job.prompt)
            offsets = token_offsets(self.tokenizer, prompt, echo)
            # Nothing predicts the first token.
            rows = list(zip(offsets, prompt, [None, *job.prompt_logprobs], strict=True))
        rows += [(start + len(echo), one.token, one) for start, one in delta.logprobs]
        top = job.sampler.params.logprobs
        return {
            "tokens": [self._token_text(token) for _, token, _ in rows],
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, _, one in rows],
            "top_logprobs": [None if one is None else self._top_logprobs(one, top) for _, _, one in rows],
            "text_offset": [offset for offset, _, _ in rows],
        }

    def _top_logprobs(self, one: TokenLogprob, top: int | None) -> dict[str, float]:
        best: dict[str, float] = {}
        # Best first: of several tokens with the same text, the best is shown.
        for token, logprob in one.top[:top]:
            best.setdefault(self._token_text(token), _finite(logprob))
        best.setdefault(self._token_text(one.token), _finite(one.logprob))
        return best

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._token_text(token)
            known = None if REPLACEMENT in text else list(text.encode())
            return {"token": text, "logprob": _finite(logprob), "bytes": known}

        return {**entry(one.token, one.logprob), "top_logprobs": [entry(t, lp) for t, lp in one.top]}

    def usage(self, index: int | None = None) -> dict[str, Any]:
        """Tokens read and written so far, by one answer or all. A prompt counts once, however many answers it has."""
        prompts, streams = self.generation.prompts, self.generation.streams
        if index is not None:
            prompts, streams = [prompts[index // (self.request.n or 1)]], [streams[index]]
        read, written = sum(map(len, prompts)), sum(stream.token_count for stream in streams)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _token_text(self, token: int) -> str:
        if token not in self._token_texts:
            text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
            self._token_texts[token] = text
        return self._token_texts[token]


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def count_logprobs(streams: Sequence[TextStream]) -> int:
    """How many log-probabilities these answers have so far."""
    jobs = [stream.job for stream in streams]
    return sum(1 + len(one.top) for job in jobs for one in (*job.sampler.logprobs, *job.prompt_logprobs))


def expert_shares(job: GenerationJob) -> dict[str, Any]:
    """Which experts acted, if the request wants to know: their shares of the routing weight in each phase."""
    if not job.track_experts:
        return {}
    names = () if job.route is None else job.route.version.pool.names
    shares: dict[str, list[dict[str, Any]]] = {"prompt": [], "answer": []}
    for phase, (weights, choices) in job.expert_loads.items():
        share = weights / max(choices, 1)
        best = share.argsort(descending=True)[:MAX_EXPERTS].tolist()
        shares[phase] = [{"name": names[i], "share": round(float(share[i]), 6)} for i in best if share[i] > 0]
    return {"phatgoose": {"experts": shares}}
