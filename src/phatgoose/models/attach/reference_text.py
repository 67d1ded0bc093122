"""Shows routers what their modules see on texts that are the same for every base."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import RoutingError
from phatgoose.models.attach.hooks import Hooks, run_eagerly
from phatgoose.models.base.base import Base, device_of, eval_mode
from phatgoose.models.base.layers import first_argument
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.text.batch import decoder_inputs
from phatgoose.ops import Backend
from phatgoose.routers.router import BoundRouter

PIECE = 64
"""Tokens in a piece. The text is read in pieces of equal length, without padding, that fit into any context."""

Observer = Callable[[Tensor], None]


class Enough(Exception):
    """Raised by a hook, it ends a pass of `show` whose rest nobody needs."""


TEXT: str = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["text"]


@cache
def plain_passages() -> tuple[str, ...]:
    """Passages of plain text, of all kinds, that ask for nothing."""
    text = Path(__file__).with_name("plain_text.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["passages"])


class Read(Protocol):
    """A module whose router needs the reference text, such as a `Site`."""

    @property
    def path(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def embedding(self) -> bool:
        """Whether the router reads the module's output instead of its input."""


def calibrate(base: Base, routers: Sequence[tuple[Read, BoundRouter]], ops: Backend) -> None:
    """Shows each router what its module sees of the reference text. No routing may be attached to the model. Raises
    RoutingError as `show_reference` does, or if an expert of a mixture saw too few tokens of the text."""
    for site, router in routers:
        if router.needs_plain and isinstance(site.module, ExpertLinear):
            raise RoutingError(
                f"{site.path} is inside a mixture's experts and sees some tokens only, but is to be read for "
                "all of them: use experts that adapt attention or the mixture's gate too, or choose another router."
            )
    plain = [
        (site.module, False, partial(_observe_plain, router, ops))
        for site, router in routers
        if router.needs_plain
    ]
    if plain:
        show(base.model, plain_pieces(base.tokenizer), plain)
    observers = [(site.module, site.embedding, partial(router.observe, ops=ops)) for site, router in routers]
    if observers:
        show_reference(base.model, base.tokenizer, observers)
    for site, router in routers:
        if isinstance(site.module, ExpertLinear):  # other modules see all of the text, or never run
            router.check_observed()


def show_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    observers: Sequence[tuple[nn.Module, bool, Observer]],
) -> None:
    """Runs the model once over the reference text and hands each observer what its module saw.

    Args:
        observers: (module, whether its output is wanted instead of its input, what takes the [N, d] tensor).
        tokenizer: the model's. An encoder–decoder reads each piece in its encoder and writes it in its decoder.

    Raises:
        RoutingError: the text has no tokens, or the model computes values that aren't finite.
    """
    show(model, _pieces(tokenizer), observers)


def _observe_plain(router: BoundRouter, ops: Backend, u: Tensor) -> None:
    router.observe_plain(u.reshape(len(plain_passages()), -1, u.shape[-1]), ops)


def show(model: PreTrainedModel, ids: Tensor, observers: Sequence[tuple[nn.Module, bool, Observer]]) -> None:
    """As `show_reference`, with rows of token ids, int64 [rows, T]."""
    ids = ids.to(device_of(model))
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, ids)
    # The head's logits of thousands of tokens may take gigabytes.
    inside = set(model.base_model.modules())
    whole = model if any(module not in inside for module, _, _ in observers) else model.base_model
    with Hooks(_watched(*observer) for observer in observers), eval_mode(model), contextlib.suppress(Enough):
        whole(**inputs)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The text's tokens in rows of equal length, int64 [pieces, PIECE]; a last, shorter piece is left out."""
    ids = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"], dtype=torch.long)
    if not len(ids):
        raise RoutingError(
            "the tokenizer makes no tokens of the reference text, so scores can't be compared."
        )
    size = min(PIECE, len(ids))
    return ids[: len(ids) // size * size].reshape(-1, size)


def plain_pieces(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first PIECE tokens of each plain passage, int64 [passages, T]; fewer, if the shortest has fewer."""
    rows = [tokenizer(text, verbose=False)["input_ids"][:PIECE] for text in plain_passages()]
    size = min(map(len, rows))
    if not size:
        raise RoutingError("the tokenizer makes no tokens of plain text, so nothing can be told from it.")
    return torch.tensor([row[:size] for row in rows], dtype=torch.long)


def _watched(module: nn.Module, wants_output: bool, observe: Observer) -> RemovableHandle:
    """A hook that hands what a module sees to an observer."""

    def hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen = output if wants_output else first_argument(args, kwargs).to(output.device)
        if not seen.isfinite().all():
            raise RoutingError(
                "the base computes values that aren't finite on the reference text; load it in another dtype."
            )
        observe(seen.reshape(-1, seen.shape[-1]))

    return module.register_forward_hook(partial(run_eagerly, hand_over), with_kwargs=True)
