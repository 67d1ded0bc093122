"""What routers that read text need of a model, and `prompted`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base, unwrap_model
from phatgoose.models.context.prompts import Announced
from phatgoose.models.text.encoding import decode_text
from phatgoose.routers.router import Encoder, Setup

ATTRIBUTE = "_phatgoose_routing"
"""The key in a model's `__dict__` of the routing that is attached to it."""


@contextlib.contextmanager
def prompted(
    model: Base | PreTrainedModel,
    prompts: Sequence[str | Sequence[int]],
    written: Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """Inside, the rows of every call of the model in this thread work on these prompts, one each (beams repeat them).

    Only routers that read text (Retrieval, Centroid, SoftCentroid) need it. For them, the prompt is everything that a
    call without a cache is given to read. Announce prompts if that is more than the prompt (an answer stands behind
    it), or isn't what should be compared (a chat's template).

    Args:
        prompts: texts, or token ids. If ids are given, what follows them in a row counts as written.
        written: for a key-value cache that was filled before routing was attached: what stands in it behind each
            prompt.
    """
    bare = unwrap_model(model)
    routing = bare.__dict__.get(ATTRIBUTE)
    if routing is None or not prompts:
        yield
        return
    read = tuple(p if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts)
    behind = None if written is None else tuple(tuple(int(i) for i in w) for w in written)
    before = routing.streams.announce(Announced(read, behind))
    try:
        yield
    finally:
        routing.streams.announce(before)


def setup_of(model: PreTrainedModel, pool: Pool) -> Setup:
    """What a router may look at of a model and a pool before it is bound."""
    base: Base | None = model.__dict__.get("_phatgoose_base")

    def decode(ids: Sequence[int]) -> str:
        assert base is not None
        return decode_text(base.tokenizer, ids)

    signature = pool.experts[0].signature
    expected = None if signature is None else signature.encoder_sha256

    def encoder(name: str) -> Encoder:
        from phatgoose.models.base.sentence_encoder import load_encoder

        return load_encoder(name, str(model.device) if model.device.type == "cuda" else "cpu", expected)

    return Setup(pool.experts, decode if base is not None else None, encoder)
