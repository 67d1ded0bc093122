"""Which tokens a model is running over right now: seen by hooks on its encoder and decoder, asked for by routers and traces."""

from __future__ import annotations

import re
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.readings import Pass, Readings, Told
from phatgoose.ops.running import Running
from phatgoose.routers.context import Sequences, Texts, positions_from

# Cross-attention keys and values read the encoder's states: T5's EncDecAttention, BART's and others' encoder_attn.
_CROSS = re.compile(
    r"(?:^|\.)(?:EncDecAttention\.[kv]|encoder_attn\.[kv]_proj|crossattention\..*(?:key|value|c_attn))$"
)


class _Now(Running):
    """The arguments of each stack's running pass, and what was built from them once it was asked for."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[dict[str, Any], int]] = {}
        self.built: dict[str, Sequences] = {}


class Streams:
    """Remembers the arguments of the running pass of each stack; builds `Sequences` from them only when asked.

    Where a router reads text, it also follows which key-value cache continues which prompt (`readings.py`).
    """

    def __init__(self, model: PreTrainedModel, reads_text: bool = False):
        self.model = model
        encoder_decoder = bool(model.config.is_encoder_decoder)
        self.readings = Readings(encoder_decoder, self._sequences_of) if reads_text else None
        if model.config.is_encoder_decoder:
            self.stacks: dict[str, nn.Module] = {
                "encoder": model.get_encoder(),
                "decoder": model.get_decoder(),
            }
        else:
            self.stacks = {"decoder": model.base_model}
        self.prefixes = {
            name: path + "."
            for path, module in model.named_modules()
            for name, stack in self.stacks.items()
            if module is stack
        }
        self._now = _Now()

    @property
    def built(self) -> dict[str, Sequences]:
        """Of the passes that this thread runs, those that were asked for."""
        return self._now.built

    def attach(self) -> list[RemovableHandle]:
        # partial, and no closures: a copied or pickled model's hooks must be the copy's own.
        handles = [
            stack.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            for name, stack in self.stacks.items()
        ]
        if self.readings is not None:
            handles += [
                stack.register_forward_hook(partial(self._leave, name)) for name, stack in self.stacks.items()
            ]
        return handles

    def texts_of(self, path: str) -> Texts:
        """What the sequences of the pass that the module at `path` runs in were given to read.

        Raises:
            RoutingError: it can't be known.
        """
        if self.readings is None:
            raise RoutingError("this routing doesn't follow texts: attach the router with route().")
        return self.readings.of(self.stream_of(path))

    def tell(self, told: Told | None) -> Told | None:
        """Says what the rows of the passes to come were given to read, instead of finding out; returns what was said before."""
        if self.readings is None:
            return None
        before, self.readings.told_all = self.readings.told_all, told
        return before

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.readings is not None:
            self.readings.leave(name, output)

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        # The cache grows while the pass runs, so its length is taken now.
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        keep = {k: kwargs.get(k) for k in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")}
        encoded = kwargs.get("encoder_hidden_states")
        keep["encoded"] = weakref.ref(encoded) if isinstance(encoded, Tensor) else None
        if kwargs.get("cu_seq_lens_q") is not None and getattr(keep["attention_mask"], "ndim", 0) != 2:
            keep["attention_mask"] = (
                None  # continuous batching: sequences in one row, behind caches of their own, without padding
            )
        if args and keep["input_ids"] is None:
            keep["input_ids"] = args[0]
        now = self._now
        now.seen[name] = (keep, past)
        now.built.pop(name, None)
        if self.readings is not None:
            self.readings.enter(name, Pass(cache, kwargs.get("attention_mask"), encoded))

    def stream_of(self, path: str) -> str:
        """ "encoder" or "decoder": whose tokens the module at `path` sees."""
        if "encoder" not in self.stacks:
            return "decoder"
        if _CROSS.search(path) or path.startswith(self.prefixes["encoder"]):
            return "encoder"
        return "decoder"

    def seen_by(self, path: str) -> Sequences | None:
        """The tokens of the pass the module at `path` runs in, None if no pass was seen."""
        return self._sequences_of(self.stream_of(path))

    def _sequences_of(self, name: str) -> Sequences | None:
        now = self._now
        if name not in now.built:
            if name not in now.seen:
                return None
            now.built[name] = _sequences(*now.seen[name])
        return now.built[name]


def _sequences(arguments: dict[str, Any], past: int) -> Sequences:
    ids, embeds, mask = arguments["input_ids"], arguments["inputs_embeds"], arguments["attention_mask"]
    source = ids if ids is not None else embeds
    batch, length = source.shape[:2]
    problem = None
    try:
        positions, real = positions_from(mask, batch, length, past, source.device)
    except RoutingError as error:  # for those who ask: most routers look at activations alone
        problem = str(error)
        positions, real = positions_from(None, batch, length, past, source.device)
    given = arguments["position_ids"]
    if isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == length:
        positions = given.expand(batch, length).to(torch.long)
    return Sequences(ids, positions, real, past, arguments["encoded"], problem)
