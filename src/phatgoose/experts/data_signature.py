"""An expert's data signature: mean activations and embeddings of training texts.

signature.safetensors holds `activations/MODULE` ([d] float32: the module's input on the expert's own rows, averaged
over tokens), `texts` ([n, width] float32: n ≤ 1000 unit vectors), or both. Its metadata names the adapter by sha256,
and the sentence encoder by name and sha256. expert.json records under "signature" how it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.files.safetensors_file import all_identical, check_finite, holds_same, read_tensor_file
from phatgoose.experts.files.safetensors_header import Header, Item, write_header
from phatgoose.experts.names import PEFT_WEIGHTS, SIGNATURE_FILE
from phatgoose.files import write_bytes
from phatgoose.ops.update import Update, sizes_agree

MOST_TEXTS, MOST_WIDTH = 1000, 8192
ACTIVATIONS, TEXTS = "activations/", "texts"
_FORMAT, _VERSION = "phatgoose-signature", "1"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME_LENGTH = 200
_UNIT = 1e-3
"""How far from 1 the length of an embedding may be."""


class DataSignature:
    """Mean activations and text embeddings of one expert's own data. Immutable; values may be read on first use.

    Raises:
        ExpertError: naming the tensor, what was expected and what was found.
    """

    encoder: str | None
    """The sentence encoder of the texts, an alias or a Hub id; None without texts."""
    encoder_sha256: str | None
    """The encoder's fingerprint, since embeddings of two encoders can't be compared."""

    def __init__(
        self,
        activations: Mapping[str, Tensor] | None = None,
        texts: Tensor | None = None,
        encoder: str | None = None,
        encoder_sha256: str | None = None,
        *,
        where: str = "a data signature",
    ):
        """
        Args:
            activations: float [d] by module path.
            texts: float [n, width], rows of length 1.
            where: what error messages begin with.
        """
        self.path: Path | None = None
        self.encoder, self.encoder_sha256 = encoder, encoder_sha256
        self.has_activations, self.has_texts = activations is not None, texts is not None
        if not (self.has_activations or self.has_texts):
            raise ExpertError(f"{where} holds neither activations nor texts.")
        _check_encoder(self, where)
        self._values = _checked(activations, texts, where)

    @property
    def activations(self) -> Mapping[str, Tensor] | None:
        """Mean input [d_in] float32 of each adapted module (of an embedding: mean output), by module path."""
        return self._values[0]

    @property
    def texts(self) -> Tensor | None:
        """Embeddings of training texts: float32 [n, width], rows of length 1."""
        return self._values[1]

    @cached_property
    def hash(self) -> str:
        """sha256 of every value and of the encoder's fingerprint."""
        digest = hashlib.sha256(str(self.encoder_sha256).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}\0{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, updates: Mapping[str, Update], where: str) -> None:
        """Refuses activations that aren't one vector for each module that the expert adapts, of its size."""
        if not self.has_activations:
            return
        found = self._widths()
        if found.keys() != updates.keys():
            odd = sorted(found.keys() ^ updates.keys())[0]
            raise ExpertError(
                f"{where}: {SIGNATURE_FILE} must have activations of every adapted module and of none else; {odd} "
                "differs."
            )
        for path, width in found.items():
            if not sizes_agree(width, updates[path].gate_dim):
                raise ExpertError(
                    f"{where}: the mean activation of {path} has {width} values, expected {updates[path].gate_dim}."
                )

    def write(self, target: Path, adapter_sha256: str) -> None:
        """Writes signature.safetensors: a copy of the file that was read if it still holds the same."""
        metadata = {"format": _FORMAT, "version": _VERSION, "adapter_sha256": adapter_sha256}
        if self.encoder is not None:
            metadata |= {"encoder": self.encoder, "encoder_sha256": str(self.encoder_sha256)}
        source = self.path
        if source is not None and source.is_file() and holds_same(source, self._tensors(), metadata):
            shutil.copyfile(source, target)
            return
        # Not by safetensors' own writer, which puts metadata in random order: one signature should have one sha256.
        items, end, tensors = {}, 0, self._tensors()
        for name, tensor in tensors.items():
            items[name] = Item(tensor.dtype, tuple(tensor.shape), end, end + 4 * tensor.numel())
            end += 4 * tensor.numel()
        data = b"".join(t.contiguous().numpy().tobytes() for t in tensors.values())
        write_bytes(target, write_header(items, metadata) + data)

    def equals(self, other: DataSignature | None) -> bool:
        return (
            other is not None
            and (self.encoder, self.encoder_sha256) == (other.encoder, other.encoder_sha256)
            and all_identical(self._tensors(), other._tensors())
        )

    def _widths(self) -> dict[str, int]:
        return {path: vector.shape[0] for path, vector in (self.activations or {}).items()}

    def _tensors(self) -> dict[str, Tensor]:
        found = {ACTIVATIONS + path: v for path, v in (self.activations or {}).items()}
        return found | ({} if self.texts is None else {TEXTS: self.texts})


class StoredSignature(DataSignature):
    """A data signature in a file whose header was checked; its values are read, and checked, on first use.

    Args:
        sha256: the file's, to be compared when it is read; None if it isn't known.
    """

    def __init__(self, path: Path, header: Header, adapter_sha256: str, sha256: str | None = None):
        self.path, self._sha256 = path, sha256
        check_metadata(header.metadata, path, adapter_sha256)
        self._shapes = _shapes(header, str(path))
        self.encoder = header.metadata.get("encoder")
        self.encoder_sha256 = header.metadata.get("encoder_sha256")
        self.has_texts, self.has_activations = TEXTS in header.items, any(n != TEXTS for n in header.items)
        _check_encoder(self, str(path))

    @cached_property
    def _values(self) -> tuple[Mapping[str, Tensor] | None, Tensor | None]:  # type: ignore[override]
        assert self.path is not None
        found = read_tensor_file(self.path)
        if self._sha256 is not None and found.sha256 != self._sha256:
            raise ExpertError(
                f"{self.path} is damaged or was changed: expected sha256 {self._sha256}, found {found.sha256}."
            )
        if {n: tuple(t.shape) for n, t in found.tensors.items()} != self._shapes:
            raise ExpertError(f"{self.path} was changed while it was in use.")
        tensors = dict(found.tensors)
        texts = tensors.pop(TEXTS, None)
        activations = {name.removeprefix(ACTIVATIONS): t for name, t in tensors.items()}
        return _checked(activations or None, texts, str(self.path))

    def _widths(self) -> dict[str, int]:
        shapes = {n.removeprefix(ACTIVATIONS): s for n, s in self._shapes.items() if n != TEXTS}
        return {path: shape[0] for path, shape in shapes.items()}


def check_metadata(metadata: Mapping[str, str], path: Path, adapter_sha256: str) -> None:
    """Refuses a signature of another format, or of another adapter than the one with this sha256."""
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ExpertError(
            f"{path} has format {brief(metadata.get('format'))} version {brief(metadata.get('version'))}; "
            f"expected {_FORMAT!r} version {_VERSION!r}."
        )
    if metadata.get("adapter_sha256") != adapter_sha256:
        raise ExpertError(
            f"{path} was made with another adapter: it says sha256 {brief(metadata.get('adapter_sha256'))}, and "
            f"{PEFT_WEIGHTS} has {adapter_sha256}."
        )


def _check_encoder(signature: DataSignature, where: str) -> None:
    name, digest = signature.encoder, signature.encoder_sha256
    if not signature.has_texts:
        if name is not None or digest is not None:
            raise ExpertError(f"{where} names an encoder, but holds no texts.")
        return
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH or not name.isprintable():
        raise ExpertError(f"{where}: its texts' encoder is {brief(name)}, expected a name.")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ExpertError(f"{where}: the encoder's sha256 is {brief(digest)}, expected 64 hex digits.")


def _shapes(header: Header, where: str) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape; refuses wrong names, dtypes and dimensions."""
    if not header.items:
        raise ExpertError(f"{where} holds neither activations nor texts.")
    for name, item in header.items.items():
        if name != TEXTS and not name.startswith(ACTIVATIONS):
            raise ExpertError(
                f"{where}: there is a tensor {name!r}, expected {TEXTS!r} or {ACTIVATIONS}MODULE."
            )
        if item.dtype != torch.float32:
            raise ExpertError(f"{where}: {name} is in {item.dtype}, expected float32.")
        _check_shape(name, item.shape, where)
    return {name: item.shape for name, item in header.items.items()}


def _check_shape(name: str, shape: tuple[int, ...], where: str) -> None:
    if name == TEXTS:
        if len(shape) != 2 or not 1 <= shape[0] <= MOST_TEXTS or not 1 <= shape[1] <= MOST_WIDTH:
            raise ExpertError(
                f"{where}: texts have shape {list(shape)}, expected [1 to {MOST_TEXTS}, 1 to {MOST_WIDTH}]."
            )
    elif len(shape) != 1 or not shape[0]:
        raise ExpertError(f"{where}: {name} has shape {list(shape)}, expected one vector.")


def _checked(
    activations: Mapping[str, Tensor] | None, texts: Tensor | None, where: str
) -> tuple[Mapping[str, Tensor] | None, Tensor | None]:
    found = None
    if activations is not None:
        found = {path: v.detach().to("cpu", torch.float32) for path, v in activations.items()}
        for path, vector in found.items():
            _check_shape(ACTIVATIONS + path, tuple(vector.shape), where)
            check_finite(vector, f"{where}: the mean activation of {path}")
    if texts is not None:
        texts = texts.detach().to("cpu", torch.float32)
        _check_shape(TEXTS, tuple(texts.shape), where)
        check_finite(texts, f"{where}: {TEXTS}")
        lengths = texts.double().norm(dim=1)
        if bool(((lengths - 1).abs() > _UNIT).any()):
            odd = int((lengths - 1).abs().argmax())
            raise ExpertError(f"{where}: text {odd} has length {lengths[odd]:.4g}, expected 1.")
    return found, texts


def describe(record: Any) -> str:
    """A data signature in a few words, from its record in expert.json, which may be anything; "" if there is none."""
    if not isinstance(record, dict):
        return ""
    parts = []
    if isinstance(rows := record.get("rows"), int) and rows > 0:
        parts.append(f"mean activations of {rows:,} rows")
    texts, encoder = record.get("texts"), record.get("encoder")
    if isinstance(texts, int) and texts > 0:
        parts.append(
            f"{texts:,} texts"
            + (f" embedded by {json.dumps(encoder)[1:-1]}" if isinstance(encoder, str) else "")
        )
    return ", ".join(parts)
