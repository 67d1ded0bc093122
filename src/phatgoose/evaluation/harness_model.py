"""lm-evaluation-harness's own model class, told by us where prompts end: it lays choices behind them in one pass.

Imports lm-eval: import it lazily.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from phatgoose.errors import EvaluationError
from phatgoose.models.prompted import prompted
from phatgoose.models.routed import routing_of


class RoutedLM(HFLM):
    """HFLM that says which tokens of a row are its prompt, for routers that read text. It computes the same."""

    _prompts: dict[tuple[int, ...], tuple[int, ...]] | None = None

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        routing = routing_of(self.model)
        if self.backend != "causal" or routing is None or routing.streams.readings is None:
            # An encoder reads the prompt and nothing else; and nobody else asks for it.
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        self._prompts = {}
        for _, context, continuation in requests:
            kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
            row, prompt = tuple(kept[:-1]), tuple(kept[: max(len(kept) - len(continuation), 0)])
            if self._prompts.setdefault(row, prompt) != prompt:
                self._prompts[row] = ()
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._prompts = None

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._prompts:
            return super()._model_call(inps, *args, **kwargs)
        with prompted(self.model, [self._prompt_of(row) for row in inps.tolist()]):
            return super()._model_call(inps, *args, **kwargs)

    def _prompt_of(self, row: list[int]) -> tuple[int, ...]:
        """The prompt of a row that the harness has padded on the right."""
        assert self._prompts
        end = len(row)
        while tuple(row[:end]) not in self._prompts:
            end -= 1
            if not end:
                return tuple(row)  # no request: the harness is trying how large a batch may be
        found = self._prompts[tuple(row[:end])]
        if not found:
            raise EvaluationError(
                "two requests of the harness have the same tokens and other prompts, so a router can't tell what was asked."
            )
        return found
