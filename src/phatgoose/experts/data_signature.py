"""An expert's data signature: mean activations, mean prompts, and embeddings of training texts.

signature.safetensors holds `activations/MODULE` ([d] float32: the module's input on the expert's own rows, averaged
over tokens), `prompts/MODULE` ([d] float32: the standardised input of the bare base's module, averaged over the tokens
of these rows' prompts), `texts` ([n, width] float32: n ≤ 1000 unit vectors), or some of them. Its metadata names the
adapter by sha256, and the sentence encoder by name and sha256. expert.json records under "signature" how it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.files.safetensors_file import (
    Header,
    all_identical,
    check_finite,
    check_sha256,
    copied,
    read_tensor_file,
    write_in_order,
)
from phatgoose.experts.gates import check_made_for, check_vectors
from phatgoose.experts.names import PEFT_WEIGHTS

MOST_TEXTS, MOST_WIDTH = 1000, 8192
ACTIVATIONS, PROMPTS, TEXTS = "activations/", "prompts/", "texts"
_FORMAT = {"format": "phatgoose-signature", "version": "1"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME_LENGTH = 200
_UNIT = 1e-3
"""How far from 1 the length of an embedding may be."""
_Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors by their names in the file."""


class DataSignature:
    """Mean activations and text embeddings of one expert's own data. Immutable; values may be read on first use."""

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
        prompts: Mapping[str, Tensor] | None = None,
        where: str = "a data signature",
    ):
        """
        Args:
            activations, prompts: float [d] by module path.
            texts: float [n, width], rows of length 1.
            where: what error messages begin with.
        """
        self.path: Path | None = None
        given = {ACTIVATIONS + path: vector for path, vector in (activations or {}).items()}
        given |= {PROMPTS + path: vector for path, vector in (prompts or {}).items()}
        given |= {} if texts is None else {TEXTS: texts}
        self._tensors = {name: t.detach().to("cpu", torch.float32) for name, t in given.items()}
        self._set({name: tuple(t.shape) for name, t in given.items()}, encoder, encoder_sha256, where)
        _check_values(self._tensors, where)

    def _set(self, shapes: _Shapes, encoder: str | None, digest: str | None, where: str) -> None:
        """Sets what is known without the values, and checks it."""
        self.encoder, self.encoder_sha256, self._shapes = encoder, digest, shapes
        self.has_texts = TEXTS in shapes
        self.has_activations, self.has_prompts = (
            any(name.startswith(part) for name in shapes) for part in (ACTIVATIONS, PROMPTS)
        )
        if not shapes:
            raise ExpertError(f"{where} holds neither means nor texts.")
        for name, shape in shapes.items():
            if name == TEXTS and not (
                len(shape) == 2 and 1 <= shape[0] <= MOST_TEXTS and 1 <= shape[1] <= MOST_WIDTH
            ):
                raise ExpertError(
                    f"{where}: texts have shape {list(shape)}, expected [1 to {MOST_TEXTS}, 1 to {MOST_WIDTH}]."
                )
            if name != TEXTS and not (len(shape) == 1 and shape[0]):
                raise ExpertError(f"{where}: {name} has shape {list(shape)}, expected one vector.")
        if not self.has_texts:
            if encoder is not None or digest is not None:
                raise ExpertError(f"{where} names an encoder, but holds no texts.")
        elif (
            not isinstance(encoder, str) or not 0 < len(encoder) <= _NAME_LENGTH or not encoder.isprintable()
        ):
            raise ExpertError(f"{where}: its texts' encoder is {brief(encoder)}, expected a name.")
        elif not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ExpertError(f"{where}: the encoder's sha256 is {brief(digest)}, expected 64 hex digits.")

    @cached_property
    def activations(self) -> Mapping[str, Tensor] | None:
        """Mean input [d_in] float32 of each adapted module (of an embedding: mean output), by module path."""
        return _under(ACTIVATIONS, self._tensors) or None

    @cached_property
    def prompts(self) -> Mapping[str, Tensor] | None:
        """Mean standardised input ū [d_in] float32 of modules of the bare base over the tokens of training prompts, by
        module path. Embeddings, modules inside a mixture's experts, and those that read no prompt have none."""
        return _under(PROMPTS, self._tensors) or None

    @property
    def texts(self) -> Tensor | None:
        """Embeddings of training texts: float32 [n, width], rows of length 1."""
        return self._tensors.get(TEXTS)

    @cached_property
    def hash(self) -> str:
        """sha256 of every value and of the encoder's fingerprint."""
        digest = hashlib.sha256(str(self.encoder_sha256).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}\0{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, sizes: Mapping[str, tuple[int, int, bool]], where: str) -> None:
        """Refuses activations that aren't one vector for each module that the expert adapts, of its size, and means of
        prompts of other modules or sizes."""
        if self.has_activations:
            check_vectors(_under(ACTIVATIONS, self._shapes), sizes, "mean activation", where)
        if prompts := _under(PROMPTS, self._shapes):
            check_vectors(
                prompts, {p: size for p, size in sizes.items() if p in prompts}, "mean of prompts", where
            )

    def write(self, target: Path, adapter_sha256: str) -> None:
        """Writes signature.safetensors: a copy of the file that was read if it still holds the same."""
        metadata = {**_FORMAT, "adapter_sha256": adapter_sha256}
        if self.encoder is not None:
            metadata |= {"encoder": self.encoder, "encoder_sha256": str(self.encoder_sha256)}
        if copied(self.path, target, self._tensors, metadata):
            return
        write_in_order(target, self._tensors, metadata)

    def equals(self, other: DataSignature | None) -> bool:
        return (
            other is not None
            and (self.encoder, self.encoder_sha256) == (other.encoder, other.encoder_sha256)
            and all_identical(self._tensors, other._tensors)
        )


class StoredSignature(DataSignature):
    """A data signature in a file whose header was checked; its values are read, and checked, on first use.

    Args:
        sha256: the file's, to be compared when it is read.
        weights: the name of the adapter's file, whose sha256 is `adapter_sha256`.
    """

    def __init__(
        self, path: Path, header: Header, sha256: str, adapter_sha256: str, weights: str = PEFT_WEIGHTS
    ):
        self.path, self._sha256 = path, sha256
        check_made_for(_FORMAT, header.metadata, path, adapter_sha256, weights)
        for name, item in header.items.items():
            if name != TEXTS and not name.startswith((ACTIVATIONS, PROMPTS)):
                raise ExpertError(
                    f"{path}: there is a tensor {name!r}, expected {TEXTS!r}, {ACTIVATIONS}MODULE or {PROMPTS}MODULE."
                )
            if item.dtype != torch.float32:
                raise ExpertError(f"{path}: {name} is in {item.dtype}, expected float32.")
        encoder, digest = (header.metadata.get(key) for key in ("encoder", "encoder_sha256"))
        self._set({name: item.shape for name, item in header.items.items()}, encoder, digest, str(path))

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        assert self.path is not None
        found = read_tensor_file(self.path)
        check_sha256(self._sha256, found.sha256, self.path)
        if {n: tuple(t.shape) for n, t in found.tensors.items()} != self._shapes:
            raise ExpertError(f"{self.path} was changed while it was in use.")
        _check_values(found.tensors, str(self.path))
        return found.tensors


_T = TypeVar("_T")


def _under(part: str, named: Mapping[str, _T]) -> dict[str, _T]:
    """By module path, what is named as this part's."""
    return {name.removeprefix(part): one for name, one in named.items() if name.startswith(part)}


def _check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        check_finite(tensor, f"{where}: {name}")
    if TEXTS in tensors:
        lengths = tensors[TEXTS].double().norm(dim=1)
        odd = int((lengths - 1).abs().argmax())
        if abs(lengths[odd] - 1) > _UNIT:
            raise ExpertError(f"{where}: text {odd} has length {lengths[odd]:.4g}, expected 1.")


def describe(record: Any) -> str:
    """A data signature in a few words, from its record in expert.json, which may be anything; "" if there is none."""
    if not isinstance(record, dict):
        return ""
    parts = []
    if isinstance(rows := record.get("rows"), int) and rows > 0:
        parts.append(
            f"mean activations of {rows:,} rows{' and their prompts' if record.get('prompts') else ''}"
        )
    texts, encoder = record.get("texts"), record.get("encoder")
    if isinstance(texts, int) and texts > 0:
        parts.append(
            f"{texts:,} texts"
            + (f" embedded by {json.dumps(encoder)[1:-1]}" if isinstance(encoder, str) else "")
        )
    return ", ".join(parts)
