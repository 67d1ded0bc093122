"""Where a model's sequences begin and end, as its checkpoint says; and generating by other settings than the checkpoint's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import GenerationConfig, PreTrainedModel

from phatgoose.errors import BaseModelError


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model knows; None where positions are relative without a limit (T5, ALiBi; XLNet says -1)."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None


def decoder_start(model: PreTrainedModel) -> int:
    """The token a decoder starts from.

    Raises:
        BaseModelError: if the checkpoint doesn't say.
    """
    for source in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(source, name, None)) is not None:
                return int(token)
    raise BaseModelError(
        f"{type(model).__name__} doesn't say which token its decoder starts from: set model.config.decoder_start_token_id."
    )


def end_tokens(model: PreTrainedModel, own: int | None) -> frozenset[int]:
    """The tokens at which a generation ends: the checkpoint's, and the one that ends training targets (`own`)."""
    listed = model.generation_config.eos_token_id
    found = listed if isinstance(listed, list) else [listed]
    return frozenset(int(token) for token in [*found, own] if token is not None)


@contextlib.contextmanager
def settings_are_own(model: PreTrainedModel, own: GenerationConfig) -> Iterator[None]:
    """generate() fills what its settings leave open from the model's own; so these must be ours while it runs."""
    kept = model.generation_config
    model.generation_config = own
    try:
        yield
    finally:
        model.generation_config = kept
