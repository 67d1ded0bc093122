"""The engine on transformers' continuous batching: at every token, answers join and leave.

The scheduling, the paged cache and the passes are transformers'. What its requests can't say (temperature, seed and the rest, each
its own) comes in through a logits processor, which settles every sequence's next token; the way each goes, through hooks.
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
from phatgoose.serving.engine.continuous_hooks import Passes, Sampler
from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.job import ENDING, Job, News, ServingError
from phatgoose.serving.settings import ServeSettings

PAGE = 32
"""Tokens of a page of the cache."""
SPARE = 2
"""Pages that a sequence may need beyond its tokens, where kinds of attention share the cache."""


def obstacle(base: Base) -> str | None:
    """Why continuous batching can't run this model; None if it can."""
    model = base.model
    if base.is_encoder_decoder:
        return "it knows no encoder–decoders"
    if not model._can_set_attn_implementation() or not hasattr(model, "init_continuous_batching"):
        return f"{type(model).__name__} doesn't take its attention from transformers' AttentionInterface"
    if not supports_left_padding(model):
        return f"{type(model).__name__} keeps more than keys and values of single tokens, or isn't told their positions"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None


class ContinuousEngine(Engine):
    """Jobs that find no room in the cache wait here, first come, first served; so that none is ever put back."""

    def __init__(self, base: Base, settings: ServeSettings):
        super().__init__(base, settings)
        if (why := obstacle(base)) is not None:
            raise ServingError(f'continuous batching can\'t run {base.spec}: {why}. Use engine "batches".')
        self.pages = _pages(base, settings)
        context = context_length(base.model)
        room = (self.pages - SPARE) * PAGE
        self.limit = room if context is None else min(context, room)
        self._attention = base.model.config._attn_implementation
        self._waiting: deque[Job] = deque()
        self._reserved: dict[str, int] = {}
        self._sampler = Sampler()
        self._ended = False
        self._hooks = Hooks()
        self.manager: Any = None
        """transformers' ContinuousBatchingManager, once started."""

    def _manager(self) -> Any:
        model: Any = self.base.model
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=self.pages,
            max_batch_tokens=max(self.settings.batch_tokens, self.settings.max_running),
            max_requests_per_batch=self.settings.max_running,
            # A prompt's keys and values are those of the experts that read it: never another request's.
            allow_block_sharing=False,
            # Hooks decide in Python at every pass, which a captured graph would not repeat.
            use_cuda_graph=False,
            use_async_batching=False,
            safety_margin=0.0,
        )
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=pad_id(self.base.tokenizer)),
            config,
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self._sampler]))
        manager.logit_processor.tensors_required = 1
        if attention.fits(model):
            model.set_attn_implementation(attention.register())
        return manager

    def start(self) -> None:
        model = self.base.model
        disable_progress_bar()
        # Its warnings show the first tokens of prompts.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self.manager = self._manager()
        self._hooks = Passes(self, self.manager).attach(model)
        self.manager.start()

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self._waiting.append(job)
        self._admit()

    def _admit(self) -> None:
        if self._ended or self.manager.background_thread_status.fatal_error is not None:
            while self._waiting:  # nobody will come for them
                job = self._waiting.popleft()
                del self.jobs[job.id]
                job.tell(News(finished=True, error=self.trouble or ENDING))
        while self._waiting and len(self._reserved) < self.settings.max_running:
            job = self._waiting[0]
            need = -(-(len(job.prompt) + job.max_new_tokens) // PAGE) + SPARE
            if self._reserved and sum(self._reserved.values()) + need > self.pages:
                return
            self._waiting.popleft()
            self._reserved[job.id] = need
            self.manager.register_result_handler(job.id, lambda output, job=job: self._take(job, output))
            taken = self.manager.add_request(
                list(job.prompt),
                request_id=job.id,
                max_new_tokens=job.max_new_tokens,
                streaming=True,
                eos_token_id=sorted(job.ends) or [-1],
                job=job,
            )
            # The thread refuses from when it begins to die, and later says so; what came in between it doesn't see.
            if taken is None or self.manager.background_thread_status.can_accept_new_requests() is not None:
                del self.jobs[job.id], self._reserved[job.id]
                self._unhandled(job)
                job.tell(News(finished=True, error=self.trouble or "the engine failed"))

    def _take(self, job: Job, output: Any) -> None:
        """On the event loop: what transformers delivers after each pass."""
        if job.id not in self.jobs:
            return
        error = job.failure or ("the engine failed" if output.error else None)
        new = tuple(output.generated_tokens[len(job.written) :]) if error is None else ()
        finished = error is not None or output.is_finished()
        job.tell(News(new, finished, error))
        if finished:
            self._forget(job, cancel=not output.is_finished())

    def cancel(self, job: Job) -> None:
        if job.id in self.jobs:
            self._forget(job, cancel=True)

    def _forget(self, job: Job, *, cancel: bool) -> None:
        del self.jobs[job.id]
        if job.id not in self._reserved:
            self._waiting.remove(job)
            return
        if cancel:
            self.manager.cancel_request(job.id)
            self._unhandled(job)
        del self._reserved[job.id]
        self._admit()

    def _unhandled(self, job: Job) -> None:
        """Nothing that transformers delivers concerns this job any more."""
        router = self.manager.output_router
        with router._lock:
            router.result_handlers.pop(job.id, None)
        while not router.output_queue.empty():  # what was on its way to the handler
            router.output_queue.get_nowait()

    def between(self, do: Callable[[], Any]) -> Any:
        if self.manager is None or not self.manager.is_running():
            return do()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.manager.pause())
            except RuntimeError:  # it died or ended while we waited
                raise ServingError(f"{self.trouble}.") from None
            return do()

    def stop(self) -> None:
        self._ended = True
        if self.manager is None:
            return
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=30, hard_stop=True)
        self._hooks.remove()
        self.base.model.set_attn_implementation(self._attention)

    @property
    def alive(self) -> bool:
        return self.manager is not None and bool(self.manager.is_running())

    @property
    def fatal(self) -> BaseException | None:
        return None if self.manager is None else self.manager.background_thread_status.fatal_error


def _pages(base: Base, settings: ServeSettings) -> int:
    """How many pages the cache has."""
    context = context_length(base.model) or 2**15
    if settings.cache_tokens is not None:
        tokens = settings.cache_tokens
    else:
        tokens = min(settings.max_running * context, _free(base) // 4 // _bytes_per_token(base))
    pages = tokens // PAGE + SPARE
    if pages < SPARE + 2:
        raise ServingError(f"a cache of {tokens} tokens is too small: raise cache_tokens, or free memory.")
    # The whole cache is written at once: a process that takes more than there is would be killed without a word.
    if (needed := pages * PAGE * _bytes_per_token(base)) > (free := _free(base)):
        raise ServingError(
            f"a cache of {tokens} tokens needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: lower cache_tokens."
        )
    return int(pages)


def _free(base: Base) -> int:
    """Free bytes where the model is."""
    if base.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return int(torch.cuda.mem_get_info(base.device)[0])
    return available_bytes()


def _bytes_per_token(base: Base) -> int:
    """Bytes of keys and values that one token leaves in the cache."""
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * torch.empty(0, dtype=base.model.dtype).element_size()
