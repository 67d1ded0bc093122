"""One call of generate() for many jobs, each with its own way, sampling and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from phatgoose.models.base.base import decoder_start
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.text.batch import pad_id, pad_rows
from phatgoose.models.text.generate import generation_settings, use_generation_config
from phatgoose.serving.engine.job import Job, News
from phatgoose.serving.engine.sampling import choose

if TYPE_CHECKING:
    from phatgoose.serving.engine.batched import BatchEngine


class Batch:
    """Rows end one by one: at an end token, at their own length, or when their client has left."""

    def __init__(self, owner: BatchEngine, jobs: list[Job]):
        self.owner, self.jobs = owner, jobs
        self.open = [True] * len(jobs)
        self._written: list[list[int]] = [[] for _ in jobs]
        self.plan = self._plan()
        self.first = True

    def run(self) -> None:
        """Writes all answers; runs in the engine's thread."""
        base = self.owner.base
        # Each job has its own end tokens, which settle() looks for.
        longest = max(job.max_new_tokens for job in self.jobs)
        own = generation_settings(base.model, pad=pad_id(base.tokenizer), max_new_tokens=longest)
        ids, mask = self._inputs()
        call: Any = base.model.generate
        with use_generation_config(base.model, own), self.owner.multi_router.following(self.plan):
            call(
                inputs=ids,
                attention_mask=mask,
                generation_config=own,
                logits_processor=LogitsProcessorList([_Choosing(self)]),
                stopping_criteria=StoppingCriteriaList([_Ending(self)]),
            )

    def settle(self, scores: Tensor) -> Tensor:
        """After a pass: the next token of every open row from scores [B, V], passed on at once; scores that leave no other choice."""
        self._take_loads()
        self._take_failures()
        self.owner.multi_router.plan = (
            None  # what others want done, as calibrating a router, sees the base alone
        )
        self.owner.step()
        self.open = [o and self.owner.wanted(job) for o, job in zip(self.open, self.jobs, strict=True)]
        rows = [i for i, is_open in enumerate(self.open) if is_open]
        tokens, failed = choose(scores[rows].float(), [self.jobs[i].draw for i in rows])
        chosen = torch.zeros(len(self.jobs), 1, dtype=torch.long)
        for place, (i, token) in enumerate(zip(rows, tokens, strict=True)):
            chosen[i] = token
            self._pass_on(i, token, failed.get(place))
        self.plan = self.owner.multi_router.plan = self._plan()  # of the pass to come
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.to(scores.device), 0.0)

    def _pass_on(self, row: int, token: int, failure: Exception | None) -> None:
        job = self.jobs[row]
        self._written[row].append(token)
        over = token in job.ends or len(self._written[row]) >= job.max_new_tokens
        self.open[row] = failure is None and not over
        if failure is not None:
            self.owner.tell(job, News(finished=True, error=str(failure)))
        else:
            self.owner.tell(job, News((token,), over))

    def _plan(self) -> BatchPlan:
        told = None
        if any(job.route is not None and job.route.reads_text for job in self.jobs):
            told = [(tuple(job.prompt), self._before(i)) for i, job in enumerate(self.jobs)]
        # A row that is over goes by the base: what its way was made of may be taken off the model by now.
        routes = [job.route if o else None for o, job in zip(self.open, self.jobs, strict=True)]
        return BatchPlan(routes, count_loads=self.owner.watched(self.jobs), texts=told, failed={})

    def _before(self, row: int) -> tuple[int, ...]:
        """What was read behind a row's prompt before the pass to come; the last token written is read in it."""
        start = (decoder_start(self.owner.base.model),) if self.owner.base.is_encoder_decoder else ()
        return (*start, *self._written[row][:-1]) if self._written[row] else ()

    def _take_loads(self) -> None:
        if self.plan.count_loads:
            phase = "prompt" if self.first else "answer"
            self.owner.take_loads(self.plan, self.jobs, [phase if o else "" for o in self.open])
        self.first = False

    def _take_failures(self) -> None:
        self.owner.take_failures(self.plan, self.jobs)
        for row in self.plan.failed or ():
            self.open[row] = False
            self.owner.tell(self.jobs[row], News(finished=True, error=self.jobs[row].failure))

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """The prompts int64 [B, T], padded on the left (encoder–decoders: on the right), and which tokens are real."""
        base, prompts = self.owner.base, [job.prompt for job in self.jobs]
        ids, mask = pad_rows(prompts, pad_id(base.tokenizer), left=not base.is_encoder_decoder)
        return ids.to(base.device), mask.to(base.device)


class _Choosing(LogitsProcessor):
    def __init__(self, batch: Batch):
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.batch.settle(scores)


class _Ending(StoppingCriteria):
    def __init__(self, batch: Batch):
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ~torch.tensor(self.batch.open, device=input_ids.device)
