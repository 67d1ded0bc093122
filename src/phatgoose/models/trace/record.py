"""`trace`: record the routing of a model's calls, and follow what generate() does meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import locate_modules
from phatgoose.models.context.runs import cache_of
from phatgoose.models.text.generate import greedy_answer
from phatgoose.models.trace.recorder import Recorder
from phatgoose.models.trace.result import Trace

MAX_BYTES = 2**29


@contextlib.contextmanager
def trace(
    model: Base | PreTrainedModel,
    *,
    histogram: bool = False,
    margins: bool = True,
    sample: float = 1.0,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Trace]:
    """Records the routing of every call of `model` inside the with block. Outside of one, tracing costs nothing.

    Args:
        histogram: keep only sums per module and expert (`Trace.loads`): memory doesn't grow, and it costs least.
        margins: also record how far the last chosen expert was ahead of the next; computes every module's scores once
            more.
        sample: share of the tokens to keep, drawn at random.
        max_bytes: memory for choices, beside a few MB of what is pending and what one pass chose. When it is full,
            every second token is let go and `Trace.share` is halved, as often as needed: what is left is a random
            sample of the whole run.

    Raises:
        RoutingError: if no routing is attached, a trace is already running, or an argument is out of its range.
    """
    routing = routing_of(model)
    if routing is None:
        raise RoutingError("there is nothing to trace: attach routing first, with route(model, pool).")
    if routing.recorder is not None:
        raise RoutingError("a trace of this model is already running.")
    if not 0 < sample <= 1:
        raise RoutingError(f"sample is {sample!r}, expected a share above 0 and at most 1.")
    if max_bytes < 2**20:
        raise RoutingError(f"max_bytes is {max_bytes!r}, expected at least {2**20} (1 MiB).")
    paths = [site.path for site in routing.sites]
    where = locate_modules(paths, [routing.streams.stream_of(path) for path in paths])
    recorded = Trace(routing.pool.names, where, "encoder" in routing.streams.stacks, sums_only=histogram)
    recorder = Recorder(recorded, margins=margins, sample=sample, max_bytes=max_bytes)
    recorded._flush = recorder.flush
    # generate() calls these methods on the model, so they are wrapped on the instance.
    wrapped = _wrapped_methods(routing.model, recorder)
    routing.model.__dict__.update(wrapped)
    routing.record(recorder)
    try:
        yield recorded
    finally:
        for name in wrapped:
            del routing.model.__dict__[name]
        routing.record(None)
        recorder.flush()
        recorded._flush = lambda: None


def trace_answer(base: Base, ids: Tensor, new_tokens: int) -> tuple[Trace, Tensor]:
    """The trace of a greedy answer to the prompt `ids` [1, T], without margins, and the answer's tokens [A]."""
    with trace(base, margins=False) as recorded:
        out = greedy_answer(base, ids, new_tokens)
    return recorded, out[0, 1 if base.is_encoder_decoder else ids.shape[1] :]


def _wrapped_methods(model: Any, recorder: Recorder) -> dict[str, Any]:
    """Methods of the model that tell the recorder what generate() does to rows and drafts, which no forward hook sees.

    Inputs are repeated for beams, beams move to other rows of the cache, and drafted tokens are taken back (assisted
    decoding, prompt lookup).
    """

    def expand(*args: Any, **kwargs: Any) -> Any:
        found = own["_expand_inputs_for_generation"](*args, **kwargs)
        if (times := kwargs.get("expand_size", 1)) > 1:
            recorder.expand(found[0], times)
        return found

    def reorder(cache: Any, beams: Tensor) -> Any:
        if not torch.equal(beams.cpu(), torch.arange(len(beams))):
            recorder.trace.reordered = True
        if own["_reorder_cache"] is not None:
            return own["_reorder_cache"](cache, beams)
        cache.reorder_cache(beams)
        return cache

    def update(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Then drafts were checked, and the cache was cropped to what was accepted.
        if "num_new_tokens" in kwargs:
            recorder.reject_drafts(cache_of(outputs))
        return own["_update_model_kwargs_for_generation"](outputs, *args, **kwargs)

    def drafts(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise RoutingError(
                "with assistant_early_exit the model's first layers also read drafts, which a trace can't tell from "
                "the text: leave it out, or use another model as the assistant."
            )
        return own["_get_candidate_generator"](generation_config, *args, **kwargs)

    wrappers = {
        "_reorder_cache": reorder,
        "_expand_inputs_for_generation": expand,
        "_update_model_kwargs_for_generation": update,
        "_get_candidate_generator": drafts,
    }
    own: dict[str, Any] = {name: getattr(model, name, None) for name in wrappers}
    # Without a `_reorder_cache` of its own, generate() reorders the cache itself, so that one is always wrapped.
    return {name: wrapper for name, wrapper in wrappers.items() if own[name] or wrapper is reorder}
