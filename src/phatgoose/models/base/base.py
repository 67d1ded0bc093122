"""A base model with its tokenizer and fingerprint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import BaseModelError
from phatgoose.models.attach.hooks import forget_compiled
from phatgoose.records import Fingerprint


@dataclass(eq=False)
class Base:
    """A model that experts are trained on and routed in, with its tokenizer and fingerprint.

    Every function of this library that takes a model takes a `Base` or its bare `PreTrainedModel`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: str
    notes: tuple[str, ...] = field(default=())
    """What a user should know about this copy, e.g. that it was dequantised from 4 bits."""

    def __post_init__(self) -> None:
        self.model = unwrap_model(self.model)
        # Kept on the model and not in a table, so that both live, die and are copied together.
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
        """What results depend on: the fingerprint, whatever name the base was loaded under, and the dtype."""
        return {**self.fingerprint.to_json(), "spec": None, "dtype": str(self.model.dtype)}


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the output head's input contiguous.

    A model asked for its last logits passes a slice to its head. With a frozen head torch then copies the whole head
    once per row: 64 prompts took 8 s in the head of SmolLM2-135M, and 0.01 s with a contiguous input.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def known_base(model: Base | PreTrainedModel | Any) -> Base | None:
    """The `Base` that `model` is or belongs to; None for a model without one."""
    return model if isinstance(model, Base) else unwrap_model(model).__dict__.get("_phatgoose_base")


def as_base(model: Base | PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Base:
    """The `Base` that `model` is or belongs to. A bare model needs its tokenizer the first time (BaseModelError)."""
    known = known_base(model)
    if known is not None and (tokenizer is None or known is model):
        return known
    if tokenizer is not None:
        bare = unwrap_model(model)
        return Base(bare, tokenizer, spec=bare.name_or_path or type(bare).__name__)
    raise BaseModelError(
        "this model was not loaded by load_base(), so its tokenizer is unknown: pass Base(model, tokenizer, spec=...)."
    )


def unwrap_model(model: Base | PreTrainedModel | Any) -> PreTrainedModel:
    """The transformers model itself: that of a `Base`, or the one inside torch.compile's wrapper.

    Anything else, e.g. an exported program, is a BaseModelError that says what to pass.
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
            f"a {kind} holds a fixed computation, to which nothing can be attached: pass the transformers model it was "
            "made of."
        )
    inside = isinstance(getattr(inner, "module", None), nn.Module)
    hint = ": pass the model inside, its .module" if inside else ""
    raise BaseModelError(f"expected a Base or a transformers PreTrainedModel, got {kind}{hint}.")


def model_class(config: Any) -> Any:
    """transformers' class for models with a language-model head, by their configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs. With offloaded weights, the device that the first of them are fetched to."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (found := getattr(one, "execution_device", None)) is not None:
                return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    return device


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: a tensor that the model (or a hook on it) caches under it can't be trained with later.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def context_length(model: PreTrainedModel) -> int | None:
    """The number of positions of a model; None if relative positions have no limit (T5, ALiBi; XLNet says -1)."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def decoder_start(model: PreTrainedModel) -> int:
    """The token that a decoder starts from. A BaseModelError if the checkpoint doesn't say."""
    for source in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(source, name, None)) is not None:
                return int(token)
    raise BaseModelError(
        f"{type(model).__name__} doesn't say which token its decoder starts from: set "
        "model.config.decoder_start_token_id."
    )


def end_tokens(model: PreTrainedModel, own: int | None) -> frozenset[int]:
    """The tokens that end a generation: the checkpoint's, and the one that ends training targets (`own`)."""
    listed = model.generation_config.eos_token_id
    found = listed if isinstance(listed, list) else [listed]
    return frozenset(int(token) for token in [*found, own] if token is not None)
