"""lm-evaluation-harness's model class, which tells routers where prompts end.

The harness runs prompts and choices in one pass. Imports lm-eval: import it lazily.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phatgoose.errors import EvaluationError
from phatgoose.models.attach.attach import prompted, routing_of
from phatgoose.models.text.batch import decoder_inputs
from phatgoose.models.text.capabilities import supports_left_padding


class RoutedLM(HFLM):
    """HFLM that tells routers which tokens of a row are its prompt, and whose rows don't influence each other.

    Encoder inputs are padded on the right, decoders start as in generation, and a model that reads padding
    generates its rows one at a time. In all other respects it computes what HFLM does.
    """

    _prompts: dict[tuple[int, ...], tuple[int, ...]] | None = None

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        routing = routing_of(self.model)
        if self.backend != "causal" or routing is None or routing.streams.prompt_tracker is None:
            # An encoder is given the prompt alone, and without a router that reads text nothing asks for it.
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        self._prompts = {}
        for _, context, continuation in requests:
            kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
            row, prompt = tuple(kept[:-1]), tuple(kept[: max(len(kept) - len(continuation), 0)])
            if self._prompts.setdefault(row, prompt) != prompt:
                self._prompts[row] = ()  # two prompts for the same tokens: refused if this row is run
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._prompts = None

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        if labels is not None:
            model: Any = self.model
            inputs = {
                "input_ids": inps,
                "attention_mask": attn_mask,
                "decoder_input_ids": decoder_inputs(model, labels),
            }
            with torch.no_grad():
                return model(**inputs, use_cache=False).logits
        if not self._prompts:
            return super()._model_call(inps)
        with prompted(self.model, [self._prompt_of(row) for row in inps.tolist()]):
            return super()._model_call(inps)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", *args: Any, **kwargs: Any
    ) -> Any:
        side = "right" if self.backend == "seq2seq" else padding_side
        return super().tok_batch_encode(strings, side, *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if self.backend != "causal" or mask is None or bool(mask.all()) or supports_left_padding(self.model):
            return super()._model_generate(context, max_length, stop, **kwargs)
        outputs = []
        for row, real in zip(context, mask.bool(), strict=True):
            alone = {**kwargs, "attention_mask": mask.new_ones(1, int(real.sum()))}
            found = super()._model_generate(row[real][None], max_length - int((~real).sum()), stop, **alone)
            outputs.append(torch.cat([row[~real], found[0]]))
        return pad_sequence(outputs, batch_first=True, padding_value=self.tokenizer.pad_token_id)

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
                "two requests of the harness have the same tokens and other prompts, so a router can't tell "
                "what was asked."
            )
        return found
