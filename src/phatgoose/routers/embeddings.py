"""A pool's embedded training texts, and how near a text is to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.errors import BaseModelError, RoutingError
from phatgoose.routers.context import Prompt, Texts
from phatgoose.routers.router import Encoder, Setup


class PoolEmbeddings:
    """The training texts of all experts of a pool, embedded by one encoder.

    Raises:
        RoutingError: two encoders, or one that can't be loaded or isn't theirs.
    """

    def __init__(self, setup: Setup, texts: list[Tensor], encoder: str | None):
        """`texts`: of each expert. `encoder`: where to read it; None: by the name that the signatures record."""
        assert setup.decode is not None
        self._decode = setup.decode
        self.encode = _encoder(setup, encoder)
        self.vectors = torch.cat(texts)
        self.owners = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(t) for t in texts]))
        means = torch.stack([t.double().mean(0) for t in texts])
        self.means = torch.nn.functional.normalize(means, dim=1).float()

    def nearest(self, q: Tensor) -> Tensor:
        """max_i q·x_{e,i}: [..., width] → [..., E]."""
        flat = q.reshape(-1, q.shape[-1])
        found = flat.new_full((len(flat), len(self.means)), -torch.inf)
        similarities = flat @ self.vectors.T
        found.scatter_reduce_(1, self.owners.expand(similarities.shape), similarities, "amax")
        return found.reshape(*q.shape[:-1], -1)

    def central(self, q: Tensor) -> Tensor:
        """cos(q, mean_i x_{e,i}): [..., width] → [..., E]."""
        return q @ self.means.T

    def prompts(self, texts: Texts) -> Tensor:
        """The prompts of a pass, embedded: [B, width]."""
        return self.encode([self._text(p) for p in texts.prompts])

    def so_far(self, texts: Texts, every: int) -> Tensor:
        """The text up to each token, embedded: [B, T, width]. Behind the prompt it is embedded anew after
        every `every` tokens (0: never).

        Raises:
            RoutingError: it isn't known what was written so far.
        """
        prompts = self.prompts(texts)
        found = prompts[:, None].repeat(1, texts.fresh.shape[1], 1)
        if not every or not bool(texts.fresh.any()):
            return found
        # Tokens between two embeddings share one: each text is embedded once, then copied to its tokens.
        wanted: dict[tuple[int, int], str] = {}
        places: list[tuple[int, int, tuple[int, int]]] = []
        for row, before in enumerate(texts.written):
            behind = texts.fresh[row].nonzero().flatten().tolist()
            if not behind:
                continue
            if isinstance(before, str) or texts.ids is None:
                raise RoutingError(
                    "what was written behind the prompt is unknown: "
                    f"{before if isinstance(before, str) else 'no token ids were given'}. With every=0 the "
                    "prompt alone decides."
                )
            whole = [*before, *texts.ids[row, behind].tolist()]
            for number, place in enumerate(behind, start=len(before) + 1):
                length = number // every * every
                if length:
                    wanted[row, length] = self._text(texts.prompts[row], whole[:length], texts.apart)
                    places.append((row, place, (row, length)))
        vectors = dict(zip(wanted, self.encode(list(wanted.values())), strict=True))
        for row, place, key in places:
            found[row, place] = vectors[key]
        return found

    def _text(self, prompt: Prompt, written: Sequence[int] = (), apart: bool = False) -> str:
        if isinstance(prompt, str):
            return prompt + (" " * apart + self._decode(written) if written else "")
        if apart or not written:
            return self._decode(prompt) + (" " + self._decode(written) if written else "")
        return self._decode([*prompt, *written])


def _encoder(setup: Setup, wanted: str | None) -> Encoder:
    """The encoder that all experts' texts were embedded with."""
    first = setup.experts[0].signature
    assert first is not None  # the texts are part of it
    for expert in setup.experts[1:]:
        other = expert.signature
        if other is None or other.encoder_sha256 != first.encoder_sha256:
            raise RoutingError(
                f"experts {setup.experts[0].name!r} and {expert.name!r} embedded their texts with two encoders "
                f"({first.encoder}, {other.encoder if other else None}), which can't be compared: make one's "
                "signature again."
            )
    name = wanted or str(first.encoder)
    try:
        found = setup.encoder(name)
    except BaseModelError as cause:
        raise RoutingError(
            f"the experts' texts were embedded with {first.encoder!r}, and {name!r} can't be loaded: {cause} "
            "Give its folder as encoder=FOLDER."
        ) from cause
    if found.sha256 != first.encoder_sha256:
        raise RoutingError(
            f"the experts' texts were embedded with {first.encoder!r} of sha256 {first.encoder_sha256}, and "
            f"{name!r} is another encoder (sha256 {found.sha256})."
        )
    return found
