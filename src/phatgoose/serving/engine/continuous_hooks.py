"""What happens around each pass of the continuous engine, in its thread: ways, loads, scores, and every sequence's next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.batched.plan import BatchPlan, TextSoFar
from phatgoose.serving.engine import attention
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.job import Job
from phatgoose.serving.engine.sampling import choose, likelihoods

_NO_MASK = torch.zeros(1, 1, 1, 1)


class Passes:
    """Hooks on the model. `manager` is transformers' ContinuousBatchingManager, whose requests carry their jobs."""

    def __init__(self, engine: Engine, manager: Any):
        self.engine, self.manager = engine, manager
        self._running: tuple[BatchPlan, list[Job], list[Any], list[slice]] | None = None

    def attach(self, model: PreTrainedModel) -> Hooks:
        return Hooks(
            [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, with_kwargs=True),
            ]
        )

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a pass: says which way each sequence goes."""
        if not isinstance(kwargs.get("cache"), PagedAttentionCache):
            return None  # a pass of somebody else's, between two of ours
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        jobs = [one.state.logit_processor_kwargs["job"] for one in batch]
        lengths = [one.query_length for one in batch]
        places: list[int] = []
        rows: list[slice] = []
        at = 0
        for one, job in zip(batch, jobs, strict=True):
            job.started = True
            first = at if job.score is not None else at + one.query_length - one.has_new_token
            rows.append(slice(len(places), len(places) + at + one.query_length - first))
            places += range(first, at + one.query_length)
            at += one.query_length
        kept = torch.tensor(places, dtype=torch.long)
        starts = [one.state.position_offset - one.query_length for one in batch]
        skip = [
            max(job.counted - start, 0) if job.watch else 0 for job, start in zip(jobs, starts, strict=True)
        ]
        told = None
        if any(job.route is not None and job.route.reads_text for job in jobs):
            told = [
                _told(job, one.state.generated_tokens, s)
                for job, one, s in zip(jobs, batch, starts, strict=True)
            ]
        # One that was cancelled just now goes by the base: what its way was made of may be taken off the model by now. So does one whose
        # way failed, until it is told.
        routes = [job.route if job.id in self.engine.jobs and job.failure is None else None for job in jobs]
        plan = BatchPlan(routes, lengths, kept, self.engine.watched(jobs), skip, told, failed={})
        self._running, self.engine.multi_router.plan = (plan, jobs, batch, rows), plan
        if self.engine.base.model.config._attn_implementation == attention.NAME:
            kwargs["attention_mask"] = _NO_MASK  # or one would be made, to be ignored
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = kept.to(kwargs["input_ids"].device)
        return args, kwargs

    def _after(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After a pass: takes the prompts' scores, and leaves the logits that transformers expects."""
        if self._running is None:
            return None
        (plan, jobs, batch, rows), self._running, self.engine.multi_router.plan = self._running, None, None
        starts = [one.state.position_offset - one.query_length for one in batch]
        self.engine.take_failures(plan, jobs)
        if plan.count_loads:
            phases = ["prompt" if s < len(j.prompt) else "answer" for j, s in zip(jobs, starts, strict=True)]
            self.engine.take_loads(plan, jobs, phases)
        for one, job in zip(batch, jobs, strict=True):
            job.counted = max(job.counted, one.state.position_offset)
        if all(job.score is None for job in jobs):
            return None
        logits, sliced = output.logits, "logits_to_keep" in kwargs
        for job, start, place in zip(jobs, starts, rows, strict=True):
            if job.score is not None:
                own = logits[0, place] if sliced else logits[0, plan.kept][place]
                _score(job, start, own)
        if sliced:
            last = [place.stop - 1 for one, place in zip(batch, rows, strict=True) if one.has_new_token]
            output.logits = logits[:, last]
        return output


class Sampler(ContinuousBatchingLogitsProcessor):
    """Settles each sequence's next token, and leaves transformers no choice but it."""

    supported_kwargs = {"job": Job}  # noqa: RUF012 - transformers' own form
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self.jobs = [one.state.logit_processor_kwargs["job"] for one in requests_with_new_token]
        return torch.zeros(len(self.jobs), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        tokens, failed = choose(scores, [job.draw for job in self.jobs])
        for i, error in failed.items():
            self.jobs[i].failure = self.jobs[i].failure or str(error)
        if not failed and all(job.draw.settings.plain for job in self.jobs):
            return scores  # transformers takes the highest, too
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _told(job: Job, written: Sequence[int], start: int) -> TextSoFar:
    """A job's prompt, and what of its answer was read before the token at `start`."""
    return tuple(job.prompt), tuple(written[: max(start - len(job.prompt), 0)])


def _score(job: Job, start: int, logits: Tensor) -> None:
    """Takes the likelihoods of the prompt's tokens after those at `start` and on, from logits [n, V]."""
    assert job.score is not None
    known = len(job.prompt_likelihoods)
    following = list(job.prompt[start + 1 : start + 1 + len(logits)])
    new = following[max(known - start, 0) :]
    if new:
        rows = logits[len(following) - len(new) : len(following)]
        job.prompt_likelihoods += likelihoods(rows.cpu(), new, job.score)
