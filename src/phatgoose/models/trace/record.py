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
from phatgoose.models.trace.recorder import Recorder
from phatgoose.models.trace.trace import Trace

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
    routing.record(recorder)
    try:
        with _watch_generate(routing.model, recorder):
            yield recorded
    finally:
        routing.record(None)
        recorder.flush()
        recorded._flush = lambda: None


@contextlib.contextmanager
def _watch_generate(model: Any, recorder: Recorder) -> Iterator[None]:
    """Tells the recorder what generate() does to rows and drafts, which no forward hook sees.

    transformers calls these methods on the model, so they are wrapped on the instance: inputs are repeated for beams,
    beams move to other rows of the cache, and drafted tokens are taken back (assisted decoding, prompt lookup).
    """
    wrapped = _wrapped_methods(model, recorder)
    model.__dict__.update(wrapped)
    try:
        yield
    finally:
        for name in wrapped:
            del model.__dict__[name]


def _wrapped_methods(model: Any, recorder: Recorder) -> dict[str, Any]:
    own_reorder = getattr(model, "_reorder_cache", None)
    own_expand = getattr(model, "_expand_inputs_for_generation", None)
    own_update = getattr(model, "_update_model_kwargs_for_generation", None)
    own_drafts = getattr(model, "_get_candidate_generator", None)

    def expand(*args: Any, **kwargs: Any) -> Any:
        assert own_expand is not None
        found = own_expand(*args, **kwargs)
        if (times := kwargs.get("expand_size", 1)) > 1:
            recorder.expand(found[0], times)
        return found

    def reorder(cache: Any, beams: Tensor) -> Any:
        if not torch.equal(beams.cpu(), torch.arange(len(beams))):
            recorder.trace.reordered = True
        if own_reorder is not None:
            return own_reorder(cache, beams)
        cache.reorder_cache(beams)
        return cache

    def update(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert own_update is not None
        # Then drafts were checked, and the cache was cropped to what was accepted.
        if "num_new_tokens" in kwargs:
            recorder.reject_drafts(cache_of(outputs))
        return own_update(outputs, *args, **kwargs)

    def drafts(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        assert own_drafts is not None
        if generation_config.assistant_early_exit is not None:
            raise RoutingError(
                "with assistant_early_exit the model's first layers also read drafts, which a trace can't tell from "
                "the text: leave it out, or use another model as the assistant."
            )
        return own_drafts(generation_config, *args, **kwargs)

    # Without a `_reorder_cache` of its own, generate() reorders the cache itself, so that one is always wrapped.
    wrapped: dict[str, Any] = {"_reorder_cache": reorder}
    for name, own, wrapper in (
        ("_expand_inputs_for_generation", own_expand, expand),
        ("_update_model_kwargs_for_generation", own_update, update),
        ("_get_candidate_generator", own_drafts, drafts),
    ):
        wrapped |= {} if own is None else {name: wrapper}
    return wrapped
