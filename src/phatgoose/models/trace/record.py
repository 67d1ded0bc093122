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
from phatgoose.models.context.caches import cache_of
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
        margins: also record how far the last chosen expert was ahead of the next; computes every module's scores once more.
        sample: share of the tokens to keep, drawn at random.
        max_bytes: memory for choices, beside a few MB of what is pending and what one pass chose. When it is full, every second token is let go and
            `Trace.share` is halved, as often as needed: what is left is a random sample of the whole run.

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
    recorder = Recorder(recorded, histogram=histogram, margins=margins, sample=sample, max_bytes=max_bytes)
    recorded._flush = recorder.flush
    routing.record(recorder)
    try:
        with _generate_watched(routing.model, recorder):
            yield recorded
    finally:
        routing.record(None)
        recorder.flush()
        recorded._flush = lambda: None


@contextlib.contextmanager
def _generate_watched(model: Any, recorder: Recorder) -> Iterator[None]:
    """Notes how many rows generate() gives each input; when it moves sequences to other rows of its cache, for which it asks the
    model's `_reorder_cache`, if there is one; and how many drafted tokens it took back (assisted decoding, prompt lookup)."""
    own = getattr(model, "_reorder_cache", None)
    expand = getattr(model, "_expand_inputs_for_generation", None)
    update = getattr(model, "_update_model_kwargs_for_generation", None)
    drafting = getattr(model, "_get_candidate_generator", None)

    def expanded(*args: Any, **kwargs: Any) -> Any:
        assert expand is not None
        found = expand(*args, **kwargs)
        if (times := kwargs.get("expand_size", 1)) > 1:
            recorder.expanded(found[0], times)
        return found

    def reorder(kept: Any, beams: Tensor) -> Any:
        if not torch.equal(beams.cpu(), torch.arange(len(beams))):
            recorder.trace.reordered = True
        if own is not None:
            return own(kept, beams)
        kept.reorder_cache(beams)
        return kept

    def updated(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert update is not None
        if "num_new_tokens" in kwargs:  # drafts were checked, and the cache was cropped to what was accepted
            recorder.take_back(cache_of(outputs))
        return update(outputs, *args, **kwargs)

    def drafts(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        assert drafting is not None
        if generation_config.assistant_early_exit is not None:
            raise RoutingError(
                "with assistant_early_exit the model's first layers also read drafts, which a trace can't tell from the text: "
                "leave it out, or use another model as the assistant."
            )
        return drafting(generation_config, *args, **kwargs)

    watched = {
        "_reorder_cache": reorder,
        "_expand_inputs_for_generation": expand and expanded,
        "_update_model_kwargs_for_generation": update and updated,
        "_get_candidate_generator": drafting and drafts,
    }
    watched = {name: function for name, function in watched.items() if function is not None}
    model.__dict__.update(watched)
    try:
        yield
    finally:
        for name in watched:
            del model.__dict__[name]
