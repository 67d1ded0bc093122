"""A training's folder: its key, its checkpoints, and its finished result.

WORK/KIND-training/training.json      the key: a training with another config, task or base is refused
WORK/KIND-training/checkpoint-N/      whole or absent; manifest.json has the sha256 of every file
WORK/KIND-training/result.json        written last: the record, and the sha256 of the result's files
WORK/adapter/ or WORK/gates/          the result
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.errors import StorageError, TrainingError
from phatgoose.files import atomic_folder, read_json, sha256_file, sha256_json, write_json

TRAINED, BEST, HISTORY, MANIFEST = "trained.safetensors", "best.safetensors", "history.json", "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class History:
    """The training so far; part of every checkpoint."""

    losses: list[float] = field(default_factory=list)
    """Loss of every step: mean over its target tokens, in nats."""
    validation: dict[str, float] = field(default_factory=dict)
    """Step → mean loss over the validation rows' target tokens, in nats."""
    best_step: int | None = None
    seconds: float = 0.0
    """Time in the loop alone, over all its runs, without work that was lost in a kill."""


class RunFolder:
    """The folder of one training. Only the first process writes to it."""

    def __init__(self, work: Path, kind: str, result: str, key: Mapping[str, Any]) -> None:
        """`result`: name of the result's folder in `work`."""
        self.path, self.result, self.key = work / f"{kind}-training", work / result, dict(key)
        self._key_file, self._record_file = self.path / "training.json", self.path / "result.json"

    def claim(self, writes: bool) -> None:
        """Refuses (TrainingError) a folder that holds another training, or other files in the result's place.

        Writes the key if it isn't there, and this process writes.
        """
        if not self._key_file.exists():
            if os.path.lexists(self.result):
                raise TrainingError(
                    f"{self.result} exists, and no training wrote it; it would be replaced. Choose another work_folder."
                )
            if writes:
                write_json(self._key_file, {"sha256": sha256_json(self.key), "key": self.key})
            return
        found = read_json(self._key_file, TrainingError)
        if found.get("sha256") == sha256_json(self.key):
            return
        old = found.get("key", {})
        parts = [part for part in self.key if sha256_json(old.get(part)) != sha256_json(self.key[part])]
        raise TrainingError(
            f"{self.path} holds the training of another {' and another '.join(parts) or 'key'}; it can't be continued "
            "with what was passed. Choose another work_folder, or delete that folder to start afresh."
        )

    def finished(self) -> dict[str, Any] | None:
        """The record of the finished training, None if it isn't finished. A TrainingError if the result was changed."""
        if not self._record_file.exists():
            return None
        found = read_json(self._record_file, TrainingError)
        for name, digest in found["files"].items():
            path = self.result / name
            if not path.is_file() or sha256_file(path) != digest:
                raise TrainingError(
                    f"{path} is no longer what the finished training wrote: restore it, or delete {self.path} to train "
                    "again."
                )
        return dict(found["record"])

    def finish(self, record: Mapping[str, Any]) -> None:
        """Marks the training as finished, then removes its checkpoints."""
        files = {p.name: sha256_file(p) for p in sorted(self.result.iterdir())}
        write_json(self._record_file, {"files": files, "record": dict(record)})
        self._remove_checkpoints()

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint. Checkpoints with missing or damaged files are skipped."""
        return next((folder for _, folder in self._checkpoints() if _is_whole(folder)), None)

    def save_checkpoint(self, step: int, files: Mapping[str, bytes]) -> None:
        """Writes a checkpoint, then removes the older ones. If it can't be written (StorageError), these are kept."""
        with atomic_folder(self.path / f"checkpoint-{step}") as work:
            for name, content in files.items():
                (work / name).write_bytes(content)
            write_json(work / MANIFEST, {name: sha256_file(work / name) for name in files})
        self._remove_checkpoints(but=step)

    def _remove_checkpoints(self, but: int | None = None) -> None:
        for number, folder in self._checkpoints():
            if number != but:
                shutil.rmtree(folder, ignore_errors=True)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Newest first."""
        found = [(_CHECKPOINT.fullmatch(p.name), p) for p in self.path.glob("checkpoint-*") if p.is_dir()]
        return sorted(((int(match[1]), p) for match, p in found if match), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST, StorageError)
        return bool(manifest) and all(sha256_file(folder / n) == digest for n, digest in manifest.items())
    except (StorageError, OSError, AttributeError):
        return False


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})


def state_bytes(state: Any) -> bytes:
    """A torch file that Trainer can read back (with weights_only)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
