"""The engine on transformers' continuous batching: answers join and leave at every token.

transformers does the scheduling, the paged cache and the passes. This file hands it requests and takes its output;
`continuous_hooks.py` puts in what its requests can't express. README.md says what was missing and how it is put in.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.utils.logging import disable_progress_bar

from phatgoose.memory import available_bytes
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.base.base import Base, context_length
from phatgoose.models.text.batch import pad_id
from phatgoose.models.text.capabilities import supports_left_padding
from phatgoose.serving.engine import attention
from phatgoose.serving.engine.continuous_hooks import PassHooks, SamplingProcessor
from phatgoose.serving.engine.engine import Engine, GenerationJob, JobUpdate
from phatgoose.serving.errors import SHUTTING_DOWN, ServingError
from phatgoose.serving.settings import ServeSettings

PAGE = 32
"""Tokens of a page of the cache."""
SPARE_PAGES = 2
"""Pages that a sequence may need beyond its tokens, where several kinds of attention share the cache."""


def obstacle(base: Base) -> str | None:
    """Why continuous batching can't run this model; None if it can."""
    model = base.model
    if base.is_encoder_decoder:
        return "it knows no encoder–decoders"
    if not model._can_set_attn_implementation() or not hasattr(model, "init_continuous_batching"):
        return f"{type(model).__name__} doesn't take its attention from transformers' AttentionInterface"
    if not supports_left_padding(model):
        # Its state of several sequences can't be packed into one row.
        return f"{type(model).__name__} keeps more than keys and values of single tokens, or isn't told their positions"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None


class ContinuousEngine(Engine):
    """Two threads take part: the event loop (submit, cancel, all queues here) and transformers' own (the passes).

    Jobs that don't fit into the cache wait here, first come, first served. transformers never gets more than fits, so
    it never has to evict a request and start it again.
    """

    def __init__(self, base: Base, settings: ServeSettings):
        super().__init__(base, settings)
        if (why := obstacle(base)) is not None:
            raise ServingError(f'continuous batching can\'t run {base.spec}: {why}. Use engine "batches".')
        self.pages = _count_pages(base, settings)
        context = context_length(base.model)
        capacity = (self.pages - SPARE_PAGES) * PAGE
        self.limit = capacity if context is None else min(context, capacity)
        self._own_attention = base.model.config._attn_implementation
        self._waiting: deque[GenerationJob] = deque()
        self._reserved: dict[str, int] = {}  # job id → pages, of the jobs that transformers has
        self._stopped = False
        self._hooks = Hooks()
        self.manager: Any = None
        """transformers' ContinuousBatchingManager, once started."""

    @property
    def reserved_pages(self) -> int:
        """Pages of the cache that are reserved for the jobs that transformers has."""
        return sum(self._reserved.values())

    def start(self) -> None:
        disable_progress_bar()
        # Its warnings show the first tokens of prompts.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self.manager = self._make_manager()
        self._hooks = PassHooks(self, self.manager).attach(self.base.model)
        self.manager.start()

    def _make_manager(self) -> Any:
        model: Any = self.base.model
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=self.pages,
            max_batch_tokens=max(self.settings.batch_tokens, self.settings.max_running),
            max_requests_per_batch=self.settings.max_running,
            # Keys and values depend on the experts that read the prompt, so requests never share them.
            allow_block_sharing=False,
            # Hooks choose experts in Python at every pass. A captured graph would replay the first choice.
            use_cuda_graph=False,
            # It prepares the next batch while a pass runs, and the hooks read the batch of the running pass.
            use_async_batching=False,
            safety_margin=0.0,
        )
        # No end token here: each request brings its own (add_request).
        own = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=pad_id(self.base.tokenizer))
        manager = model.init_continuous_batching(own, config)
        # The manager has built processors from the GenerationConfig, which is the same for all requests.
        processors = LogitsProcessorList([SamplingProcessor()])
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
        # How many rows of argument tensors transformers allocates: one for each processor with arguments.
        manager.logit_processor.tensors_required = 1
        if attention.is_supported(model):
            model.set_attn_implementation(attention.register())
        return manager

    def submit(self, job: GenerationJob) -> None:
        self.jobs[job.id] = job
        self._waiting.append(job)
        self._admit()

    def _admit(self) -> None:
        """Hands waiting jobs to transformers while the cache has room for all of their tokens."""
        if self._stopped or self.fatal_error is not None:
            # Nobody will process those that wait.
            while self._waiting:
                self._fail(self._waiting.popleft(), self.failure or SHUTTING_DOWN)
        while self._waiting and len(self._reserved) < self.settings.max_running:
            job = self._waiting[0]
            pages = -(-(len(job.prompt) + job.max_new_tokens) // PAGE) + SPARE_PAGES
            if self._reserved and self.reserved_pages + pages > self.pages:
                return
            self._waiting.popleft()
            self._reserved[job.id] = pages
            self._hand_over(job)

    def _hand_over(self, job: GenerationJob) -> None:
        # The handler is registered first: the thread may deliver a token before add_request returns. transformers calls
        # it on the event loop, since it is registered from there.
        self.manager.register_result_handler(job.id, lambda output: self._on_output(job, output))
        taken = self.manager.add_request(
            list(job.prompt),
            request_id=job.id,
            max_new_tokens=job.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(job.end_tokens) or [-1],
            job=job,  # arrives in the request's logit_processor_kwargs, where the hooks look for it
        )
        # A dying thread refuses requests, and only later fails those that it has. It misses what comes in between, so
        # its status is read again after the request was added.
        if taken is None or self.manager.background_thread_status.can_accept_new_requests() is not None:
            del self._reserved[job.id]
            self._drop_outputs(job)
            self._fail(job, self.failure or "the engine failed")

    def _fail(self, job: GenerationJob, error: str) -> None:
        del self.jobs[job.id]
        job.publish(JobUpdate(finished=True, error=error))

    def _on_output(self, job: GenerationJob, output: Any) -> None:
        """Takes what transformers delivers after each pass. Called on the event loop."""
        if job.id not in self.jobs:
            return  # cancelled while the output was on its way
        error = job.error or ("the engine failed" if output.error else None)
        # generated_tokens holds the whole answer so far. A token of a failed job is meaningless.
        new = tuple(output.generated_tokens[len(job.output) :]) if error is None else ()
        finished = error is not None or output.is_finished()
        job.publish(JobUpdate(new, finished, error))
        if finished:
            self._release(job, cancel=not output.is_finished())

    def cancel(self, job: GenerationJob) -> None:
        if job.id in self.jobs:
            self._release(job, cancel=True)

    def _release(self, job: GenerationJob, *, cancel: bool) -> None:
        del self.jobs[job.id]
        if job.id not in self._reserved:
            self._waiting.remove(job)
            return
        if cancel:
            # It takes effect between two passes. Until then PassHooks lets the job fall back to the base.
            self.manager.cancel_request(job.id)
            self._drop_outputs(job)
        del self._reserved[job.id]
        self._admit()

    def _drop_outputs(self, job: GenerationJob) -> None:
        """Makes sure that nothing of this job is delivered or kept any more."""
        router = self.manager.output_router
        with router._lock:  # the other thread looks handlers up under it
            router.result_handlers.pop(job.id, None)
        # An output that found no handler landed in the queue, which nobody reads.
        while not router.output_queue.empty():
            router.output_queue.get_nowait()

    def run_between_passes(self, do: Callable[[], Any]) -> Any:
        if self.manager is None or not self.manager.is_running():
            return do()
        with contextlib.ExitStack() as stack:
            try:
                # Returns once the running pass is over; the requests stay as they are.
                stack.enter_context(self.manager.pause())
            except RuntimeError:  # the thread died or ended while we waited
                raise ServingError(f"{self.failure}.") from None
            return do()

    def stop(self) -> None:
        self._stopped = True
        if self.manager is None:
            return
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=30, hard_stop=True)
        self._hooks.remove()
        self.base.model.set_attn_implementation(self._own_attention)

    @property
    def alive(self) -> bool:
        return self.manager is not None and bool(self.manager.is_running())

    @property
    def fatal_error(self) -> BaseException | None:
        return None if self.manager is None else self.manager.background_thread_status.fatal_error


def _count_pages(base: Base, settings: ServeSettings) -> int:
    """How many pages the cache has."""
    token_bytes = _bytes_per_token(base)
    if settings.cache_tokens is not None:
        tokens = settings.cache_tokens
    else:
        context = context_length(base.model) or 2**15
        tokens = min(settings.max_running * context, _free_bytes(base) // 4 // token_bytes)
    pages = tokens // PAGE + SPARE_PAGES
    if pages < SPARE_PAGES + 2:
        raise ServingError(f"a cache of {tokens} tokens is too small: raise cache_tokens, or free memory.")
    # The whole cache is allocated and written at the start. Without this check the system would kill the process.
    if (needed := pages * PAGE * token_bytes) > (free := _free_bytes(base)):
        raise ServingError(
            f"a cache of {tokens} tokens needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
            "lower cache_tokens."
        )
    return int(pages)


def _free_bytes(base: Base) -> int:
    """Free bytes where the model is."""
    if base.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return int(torch.cuda.mem_get_info(base.device)[0])
    return available_bytes()


def _bytes_per_token(base: Base) -> int:
    """Bytes of the keys and values that one token leaves in the cache."""
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * base.model.dtype.itemsize
