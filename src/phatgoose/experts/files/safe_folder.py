"""A stranger's folder: every file in it is read through one object, within bounds."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.files.safetensors_file import (
    Header,
    TensorFile,
    check_sha256,
    read_header,
    read_tensor_file,
)
from phatgoose.files import as_json, inside, is_folder, read_bytes, sha256_file


@dataclass(frozen=True)
class SafeFolder:
    """Reads files of one folder without trusting them.

    Links are followed within the folder only (of a download also within the Hub's cache), only ordinary files are
    opened, and none is read beyond a bound. Whatever is wrong is raised as an error of the type `error`, which names
    the file.
    """

    path: Path
    error: type[PhatgooseError] = ExpertError
    links_checked: bool = False
    """The caller has checked where links lead: a pool's may lead anywhere within the pool."""

    def exists(self) -> bool:
        """Whether it is a folder."""
        return is_folder(self.path, self.error)

    def has(self, name: str) -> bool:
        """Whether there is something of this name, even a link that leads nowhere."""
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """The path of a file, which may be missing, but is no link out of the folder."""
        return self.path / name if self.links_checked else inside(self.path, name, self.error)

    def read_bytes(self, name: str, limit: int, sha256: str | None = None) -> bytes:
        """A file's bytes, which have this sha256 if one is given."""
        data = read_bytes(self.file(name), self.error, limit)
        if sha256 is not None:
            check_sha256(sha256, hashlib.sha256(data).hexdigest(), self.path / name, error=self.error)
        return data

    def read_json(self, name: str, limit: int) -> Any:
        """A file's JSON, as strict as `parse_json`."""
        return as_json(self.read_bytes(name, limit), self.path / name, self.error)

    def read_object(self, name: str, limit: int) -> dict[str, Any]:
        """A file's JSON, which must be an object."""
        return self.parse_object(name, self.read_bytes(name, limit))

    def parse_object(self, name: str, data: bytes) -> dict[str, Any]:
        """A JSON object in the bytes of a file that was read."""
        found = as_json(data, self.path / name, self.error)
        if not isinstance(found, dict):
            raise self.error(f"{self.path / name} holds {type(found).__name__}, expected an object.")
        return found

    def read_tensors(self, name: str, *, empty: bool = False) -> TensorFile:
        """All of a safetensors file: see `read_tensor_file`."""
        return read_tensor_file(self.file(name), self.error, empty=empty)

    def read_header(self, name: str) -> tuple[bytes, Header]:
        """A safetensors file up to its tensors: see `read_header`."""
        return read_header(self.file(name), self.error)

    def sha256(self, name: str, limit: int | None = None) -> str:
        """Hex sha256 of a file, which has at most `limit` bytes."""
        return sha256_file(self.file(name), self.error, limit)
