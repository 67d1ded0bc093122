"""Hooks around each pass of the continuous engine: routes, loads, scores, next tokens.

All of it runs in the thread of transformers' ContinuousBatchingManager.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.batched.plan import BatchPlan, TextSoFar
from phatgoose.serving.engine import attention
from phatgoose.serving.engine.engine import Engine, GenerationJob
from phatgoose.serving.engine.sampling import sample_batch, token_logprobs

_NO_MASK = torch.zeros(1, 1, 1, 1)


class _Sequence(NamedTuple):
    """What of one sequence is in the running pass."""

    job: GenerationJob
    request: Any
    """transformers' side of it: a FutureRequestState."""
    start: int
    """The position of its first token in this pass."""
    logits: slice
    """Which of the kept logits are its own."""


class _Pass(NamedTuple):
    """The running pass, with its sequences in the order in which they are packed."""

    plan: BatchPlan
    sequences: list[_Sequence]
    kept: Tensor
    """The tokens whose logits are computed, int64."""


class PassHooks:
    """Hooks on the model. Each request of `manager`, transformers' ContinuousBatchingManager, carries its job."""

    def __init__(self, engine: Engine, manager: Any):
        self.engine, self.manager = engine, manager
        self._pass: _Pass | None = None

    def attach(self, model: PreTrainedModel) -> Hooks:
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        return Hooks([before, model.register_forward_hook(self._after, with_kwargs=True)])

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Sets the pass's plan, and asks the model for the logits of scored prompts."""
        if not isinstance(kwargs.get("cache"), PagedAttentionCache):
            # Somebody else runs the model between two passes, for example to calibrate a router.
            return None
        self._pass = current = self._describe_pass()
        self.engine.multi_router.plan = current.plan
        if self.engine.base.model.config._attn_implementation == attention.NAME:
            # Without one, transformers would build a mask over all pairs of tokens, which packed_attention ignores.
            kwargs["attention_mask"] = _NO_MASK
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = current.kept.to(kwargs["input_ids"].device)
        return args, kwargs

    def _describe_pass(self) -> _Pass:
        sequences: list[_Sequence] = []
        kept: list[int] = []
        packed_start = 0
        for request in self.manager.batch_processor.inputs_and_outputs.requests_in_batch:
            job: GenerationJob = request.state.logit_processor_kwargs["job"]
            job.started = True
            packed_end = packed_start + request.query_length
            # transformers wants the logits of a sequence's last token, and only if a token follows the pass: a long
            # prompt is read in several passes. Scoring a prompt takes the logits of all its tokens.
            scored = job.top_prompt_logprobs is not None
            first = packed_start if scored else packed_end - request.has_new_token
            # At this point transformers has already advanced each request's position to the end of the pass.
            start = request.state.position_offset - request.query_length
            logits = slice(len(kept), len(kept) + packed_end - first)
            sequences.append(_Sequence(job, request, start, logits))
            kept += range(first, packed_end)
            packed_start = packed_end
        jobs, places = [one.job for one in sequences], torch.tensor(kept, dtype=torch.long)
        plan = BatchPlan(
            # A cancelled job falls back to the base: its route's experts may have left the model by now. So does a job
            # whose route failed, until its client is told.
            [job.route if job.id in self.engine.jobs and job.error is None else None for job in jobs],
            [one.request.query_length for one in sequences],
            places,
            self.engine.count_pass(jobs),
            # Tokens that were tracked before: a request that runs out of memory is restarted by transformers.
            [max(s.job.tracked_tokens - s.start, 0) if s.job.track_experts else 0 for s in sequences],
            _texts_so_far(sequences),
            [job.memory for job in jobs],
            failed={},
        )
        return _Pass(plan, sequences, places)

    def _after(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Records what the pass did, and leaves transformers only the logits that it expects."""
        if self._pass is None:
            return None
        (plan, sequences, places), self._pass, self.engine.multi_router.plan = self._pass, None, None
        jobs = [one.job for one in sequences]
        plan.keep_memories()
        self.engine.record_failures(plan, jobs)
        if plan.count_loads:
            phases = ["prompt" if one.start < len(one.job.prompt) else "answer" for one in sequences]
            self.engine.record_loads(plan, jobs, phases)
        for job, request, *_ in sequences:
            job.tracked_tokens = max(job.tracked_tokens, request.state.position_offset)
        if all(job.top_prompt_logprobs is None for job in jobs):
            return None
        # Models without logits_to_keep return the logits of all tokens, of which transformers takes its own.
        sliced = "logits_to_keep" in kwargs
        kept = output.logits[0] if sliced else output.logits[0, places]
        for one in sequences:
            if one.job.top_prompt_logprobs is not None:
                _score_prompt(one.job, one.start, kept[one.logits], one.job.top_prompt_logprobs)
        if sliced:
            last = [one.logits.stop - 1 for one in sequences if one.request.has_new_token]
            output.logits = output.logits[:, last]
        return output


class SamplingProcessor(ContinuousBatchingLogitsProcessor):
    """Chooses each sequence's next token, and leaves transformers no other choice.

    transformers' own processors know one set of sampling parameters for all requests. This one masks every token but
    the chosen one, so that transformers' argmax takes it.
    """

    supported_kwargs = {"job": GenerationJob}  # noqa: RUF012 - transformers' own form
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.jobs: list[GenerationJob] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # Called before each pass. The tensor is transformers' way to pass arguments; the jobs don't fit into one.
        self.jobs = [one.state.logit_processor_kwargs["job"] for one in requests_with_new_token]
        return torch.zeros(len(self.jobs), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        tokens, failed = sample_batch(scores, [job.sampler for job in self.jobs])
        for i, error in failed.items():
            # An exception would end the whole engine. So the job is marked, and fails when its token is delivered.
            self.jobs[i].error = self.jobs[i].error or str(error)
        if not failed and all(job.sampler.params.greedy for job in self.jobs):
            return scores  # transformers takes the argmax, too
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _texts_so_far(sequences: Sequence[_Sequence]) -> list[TextSoFar] | None:
    """Each job's prompt, and what of its answer comes before this pass; None if no route reads text."""
    if not any(job.route is not None and job.route.reads_text for job, *_ in sequences):
        return None
    return [
        (tuple(job.prompt), tuple(request.state.generated_tokens[: max(start - len(job.prompt), 0)]))
        for job, request, start, _ in sequences
    ]


def _score_prompt(job: GenerationJob, start: int, logits: Tensor, top: int) -> None:
    """Adds the log-probabilities of prompt tokens from logits [n, V], those at position `start` and after it."""
    following = list(job.prompt[start + 1 : start + 1 + len(logits)])
    # A restarted request reads its prompt again.
    new = following[max(len(job.prompt_logprobs) - start, 0) :]
    if new:
        rows = logits[len(following) - len(new) : len(following)]
        job.prompt_logprobs += token_logprobs(rows.cpu(), new, top)
