"""A base model with its tokenizer and fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import BaseModelError
from phatgoose.models.attach.hooks import forget_compiled
from phatgoose.records import Fingerprint


@dataclass(eq=False)
class Base:
    """A model that experts are trained on and routed in, with what belongs to it.

    Every function of this library that takes a model takes a `Base` or the bare `PreTrainedModel` of one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: str
    notes: tuple[str, ...] = field(default=())
    """What a user should know about this copy, e.g. that it was dequantised from 4 bits."""

    def __post_init__(self) -> None:
        self.model = bare_of(self.model)
        # On the model, not in a table: the two then live and die (and are copied) together.
        if (
            "_phatgoose_base" not in self.model.__dict__
            and (head := self.model.get_output_embeddings()) is not None
        ):
            head.register_forward_pre_hook(_contiguous)
            forget_compiled()
        self.model.__dict__["_phatgoose_base"] = self

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        from phatgoose.models.base.fingerprint import fingerprint

        return fingerprint(self.model, self.spec)

    def facts(self) -> dict[str, Any]:
        """What results computed with it depend on: its fingerprint, under whatever name it was loaded, and its dtype."""
        return {**self.fingerprint.to_json(), "spec": None, "dtype": str(self.model.dtype)}


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where it runs, if its first weights are offloaded and only come for their turn."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (found := getattr(one, "execution_device", None)) is not None:
                return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    return device


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a head is given, in one piece.

    A model asked for its last logits hands its head a slice, for which torch copies the whole head once for each row if it is frozen:
    64 prompts took 8 s in the head of SmolLM2-135M, and 0.01 s in one piece.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def bare_of(model: Base | PreTrainedModel | Any) -> PreTrainedModel:
    """The transformers model itself: a `Base`'s, or the one that torch.compile has wrapped.

    Raises:
        BaseModelError: it is something else, as an exported program; says what to pass.
    """
    if isinstance(model, Base):
        return model.model
    inner = model
    while "_orig_mod" in getattr(inner, "_modules", ()):
        inner = inner._orig_mod
    if isinstance(inner, PreTrainedModel):
        return inner
    kind = type(inner).__name__
    if isinstance(inner, torch.jit.ScriptModule | torch.fx.GraphModule | torch.export.ExportedProgram):
        raise BaseModelError(
            f"a {kind} holds a fixed computation, to which nothing can be attached: pass the transformers model it was made of."
        )
    if isinstance(getattr(inner, "module", None), nn.Module):
        raise BaseModelError(
            f"expected a Base or a transformers PreTrainedModel, got a {kind}: pass the model inside, its .module."
        )
    raise BaseModelError(f"expected a Base or a transformers PreTrainedModel, got {kind}.")


def as_base(model: Base | PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Base:
    """The `Base` that `model` is or belongs to; a bare model needs its tokenizer the first time.

    Raises:
        BaseModelError: if `model` was not loaded by `load_base` and no tokenizer is given.
    """
    if isinstance(model, Base):
        return model
    bare = bare_of(model)
    if tokenizer is None and (known := bare.__dict__.get("_phatgoose_base")) is not None:
        return known
    if tokenizer is not None:
        return Base(bare, tokenizer, spec=bare.name_or_path or type(bare).__name__)
    raise BaseModelError(
        "this model was not loaded by load_base(), so its tokenizer is unknown: pass Base(model, tokenizer, spec=...)."
    )
