"""The scores that a router compares, at every module and token of one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base, decoder_start
from phatgoose.models.trace.recorder import Recorder
from phatgoose.routers.context import RoutingContext


class _ScoreRecorder(Recorder):
    """Keeps scores in place of choices."""

    def __init__(self, experts: int):
        self.experts, self.wants_scores = experts, True
        self.found: dict[str, Tensor] = {}

    def record(
        self,
        context: RoutingContext,
        members: tuple[int, ...],
        chosen: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> None:
        if scores is None:
            return
        table = scores.new_full((len(scores), self.experts), torch.nan, dtype=torch.float32)
        for candidate, expert in enumerate(members):
            if expert >= 0:
                table[:, expert] = scores[:, candidate].float()
        self.found[context.path] = table.cpu()


@torch.no_grad()
def scores_of(base: Base, ids: Tensor) -> dict[str, Tensor]:
    """What the attached router's scores are while the model reads ids [1, T]: module → float32 [tokens, experts].

    An expert without a score at a module has NaN there. Modules whose router compares nothing are left out. An
    encoder–decoder's decoder reads its first token.

    Raises:
        RoutingError: no routing is attached, or a trace is running.
    """
    routing = routing_of(base)
    if routing is None or routing.recorder is not None:
        raise RoutingError("scores are those of a routed model that nobody traces: attach routing first.")
    recorder, ids = _ScoreRecorder(len(routing.pool)), ids.to(base.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.new_full((1, 1), decoder_start(base.model))
    routing.record(recorder)
    try:
        base.model(**batch)
    finally:
        routing.record(None)
    return recorder.found
