"""The tokens and routing choices of a growing answer, as events for the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from phatgoose.analysis.prompts import UNSEEN
from phatgoose.errors import RoutingError
from phatgoose.models.base.module_names import ModuleLocation
from phatgoose.models.text.decoding import IncrementalDecoder
from phatgoose.models.trace.choices import Choices


class TokenEvents:
    """Makes an event {"event": "tokens", …} for the tokens that were read since the last event.

    `texts` is what each of these tokens adds. `choices` and `weights` (in thousandths) have `k` values for
    each module and token, in the pool's order of modules, as little-endian int16 in base64; −1 is no expert,
    −2 a filler. `next` is what the newest token adds to the answer. It is read in the next step, or never if
    it is the last.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: Mapping[str, ModuleLocation],
        ids: Tensor,
        encoder_decoder: bool,
    ):
        """`where`: the routed modules, none if the base answers alone. `ids`: the prompt's tokens, int64 [1, T]."""
        self.where, self.rows = where, {path: m for m, path in enumerate(where)}
        self.encoder = ids[0].tolist() if encoder_decoder else []
        self._encoder_texts = IncrementalDecoder(tokenizer, special=True)
        self._texts = IncrementalDecoder(tokenizer, special=True)
        self._unread: list[str] = []  # texts of the decoder's newest tokens, which it hasn't read
        self._read = 0  # how many tokens the decoder has read
        self._k = 0

    def event(self, ids: Tensor, choices: Sequence[Choices]) -> dict[str, Any]:
        """The next event.

        Args:
            ids: all tokens of the decoder so far, int64 [1, n]. It has read all but the last.
            choices: what was recorded since the last event.
        """
        own = ids[0].tolist()
        for token in own[len(self._texts.ids) :]:
            self._unread.append(self._texts.push(token))
        encoder = self.encoder if self._read == 0 else []
        texts = [self._encoder_texts.push(token) for token in encoder] + self._unread[:-1]
        self._unread = self._unread[-1:]
        starts = {"encoder": 0, "decoder": len(encoder) - self._read}
        k, chosen, weights = self._table(choices, starts, len(texts))
        self._read = len(own) - 1
        return {
            "event": "tokens", "texts": texts, "k": k, "choices": _packed(chosen), "weights": _packed(weights),
            "next": self._unread[-1],
        }  # fmt: skip

    def _table(
        self, choices: Sequence[Choices], starts: Mapping[str, int], n: int
    ) -> tuple[int, Tensor, Tensor]:
        """k, which is the same in all events, and the choices and weights of all modules, int16 [M, n, k]."""
        # All modules ran in the first event. Later ones, of a decoder alone, may have fewer candidates than
        # an encoder's.
        self._k = k = max((self._k, *(c.experts.shape[1] for c in choices)))
        chosen = torch.full((len(self.where), n, k), UNSEEN, dtype=torch.int16)
        weights = torch.zeros_like(chosen)
        for c in choices:
            place = starts[self.where[c.path].reads] + c.positions
            if bool((place < 0).any()) or bool((place >= n).any()):
                raise RoutingError(f"{c.path} chose for tokens that aren't the ones just read.")
            row, width = self.rows[c.path], c.experts.shape[1]
            chosen[row, place, :width] = c.experts
            weights[row, place, :width] = (1000 * c.weights.float()).round().to(torch.int16)
        return k, chosen, weights


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<i2").tobytes()).decode()
