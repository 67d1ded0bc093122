"""Settings of a data signature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phatgoose.errors import TrainingError

MOST_TEXTS = 1000
"""The same as phatgoose.experts.data_signature's, written again because reading that one would import torch."""


@dataclass(frozen=True, kw_only=True)
class SignatureConfig:
    """What a data signature is made of."""

    rows: int = 1000
    """Training rows over whose tokens each module's inputs are averaged; 0: no activations."""
    texts: int = 1000
    """Training prompts that are embedded, at most 1000 (Jang et al. 2023); 0: none. Embeddings say more about the data than an
    average does: who may not tell what is in it publishes none."""
    encoder: str = "all-minilm-l6-v2"
    """The sentence encoder: all-minilm-l6-v2, a folder, or a Hub id."""
    max_length: int = 512
    """Tokens of a row, as in training; longer prompts are cut at the left."""
    rows_per_batch: int = 16
    """Rows in one forward."""
    seed: int = 0
    """Of the choice of rows, where there are more."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 0), ("texts", 0), ("seed", 0), ("rows_per_batch", 1), ("max_length", 3)):
            if getattr(self, name) < least:
                raise TrainingError(
                    f"SignatureConfig.{name} = {getattr(self, name)!r}: expected at least {least}."
                )
        if self.texts > MOST_TEXTS:
            raise TrainingError(f"SignatureConfig.texts = {self.texts}: expected at most {MOST_TEXTS}.")
        if not self.rows and not self.texts:
            raise TrainingError("SignatureConfig: rows and texts are both 0, so there is nothing to make.")

    def key(self) -> dict[str, Any]:
        """The settings that decide the result, apart from the encoder, which its sha256 names."""
        return {k: v for k, v in asdict(self).items() if k not in ("encoder", "rows_per_batch")}
