"""An expert: an adapter, its gates, and where both come from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.card import write_card
from phatgoose.experts.data_signature import SIGNATURE_FILE, DataSignature, StoredSignature
from phatgoose.experts.formats import format_of, read_adapter, to_contents, weights_file
from phatgoose.experts.headers import read_header
from phatgoose.experts.peft import CONFIG_FILE, read_tensors
from phatgoose.experts.peft import WEIGHTS_FILE as PEFT_WEIGHTS
from phatgoose.experts.peft_rules import check_drop
from phatgoose.experts.tensor_files import identical, read_tensor_file
from phatgoose.experts.update import Update, sizes_agree
from phatgoose.files import atomic_folder, inside, read_json, sha256_file, write_bytes, write_json
from phatgoose.records import Fingerprint, HubSource

GATES_FILE = "gates.safetensors"
RECORD_FILE = "expert.json"
FORMAT_VERSION = 1
RECORD_LIMIT_BYTES = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def slug(text: str) -> str:
    """A valid expert name made from any text: "bigbench:tense" → "bigbench-tense"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100]
    return name or "expert"


def check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExpertError(
            f"{brief(name)} can't name an expert: use letters, digits, '.', '_', '-' (at most 100, starting with a letter or digit); "
            f"for example {slug(str(name)[:100])!r}."
        )


@dataclass(frozen=True, eq=False)
class Expert:
    """One contributor's expert. Immutable: training a gate gives a new one.

    Build it with `from_peft`, `load` or `train_expert` rather than by hand.

    Raises (from every way of building one):
        ExpertError: naming the file, the tensor or the setting, what was expected and what was found.
    """

    name: str
    adapter_config: Mapping[str, Any] = field(repr=False)
    """adapter_config.json, untouched: PEFT's or AdapterHub's."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """The adapter's tensors under its format's keys, untouched."""
    gates: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """One float32 vector [d_in] per adapted module, by module path; None if nobody trained them yet."""
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """How it was made: base, task, configs, versions, validation losses, and the gate's own record under "gate"."""
    folder: Path | None = field(default=None, repr=False)
    """Where it was read from, if it was."""
    origin: HubSource | None = None
    """Where on the Hub its adapter was fetched from, if it was; a pool keeps this in its manifest."""
    signature: DataSignature | None = field(default=None, repr=False)
    """What its contributor says about its data: mean activations, text embeddings; None if nothing."""
    updates: Mapping[str, Update] = field(init=False, repr=False)
    """What it does at each adapted module, by the module's path in the base model."""
    base_copies: Mapping[str, Tensor] = field(init=False, repr=False)
    """Weights of the base that PEFT saved along, by parameter name; `route` checks that they are the base's own."""

    def __post_init__(self) -> None:
        check_name(self.name)
        drop = check_drop(self.provenance.get("dropped", ()))
        contents = to_contents(self.adapter_config, self.tensors, self._where(), drop)
        object.__setattr__(self, "updates", contents.updates)
        object.__setattr__(self, "base_copies", contents.base_copies)
        if self.gates is not None:
            object.__setattr__(self, "gates", checked_gates(self.gates, self.updates, self._where()))
        if self.signature is not None:
            self.signature.fits(self.updates, self._where())
        _ = self.base  # refused here if it isn't one, not later

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values()})
        return f"Expert({self.name!r}, modules={len(self.updates)}, ranks={ranks}, gates={'yes' if self.gates is not None else 'no'})"

    def _where(self) -> str:
        return f"expert {self.name!r}" + (f" ({self.folder})" if self.folder else "")

    @property
    def base(self) -> Fingerprint | None:
        """The base it was trained on, if that was recorded (a plain PEFT folder records only a name)."""
        found = self.provenance.get("base")
        if not found:
            return None
        try:
            return Fingerprint.from_json(found)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise ExpertError(
                f"{self._where()}: the recorded base is not a fingerprint: {cause!r}"
            ) from cause

    @property
    def base_name(self) -> str | None:
        """What the adapter's own config calls its base; it may be a path."""
        name = self.adapter_config.get("base_model_name_or_path") or self.adapter_config.get("model_name")
        return name if isinstance(name, str) and name else None

    @cached_property
    def sizes(self) -> Mapping[str, tuple[int, int, bool]]:
        """Module path → d_in, d_out (0: only the base knows), whether it is an embedding; no tensor is touched."""
        return {path: (u.d_in, u.d_out, u.embedding) for path, u in self.updates.items()}

    @cached_property
    def hash(self) -> str:
        """sha256 of what it computes: every update and gate, with names, shapes and dtypes (not of names or records)."""
        digest = hashlib.sha256()
        for path in sorted(self.updates):
            update = self.updates[path]
            digest.update(f"{path}\0{json.dumps(update.numbers(), sort_keys=True)}".encode())
            parts = dict(update.parts()) | ({"gate": self.gates[path]} if self.gates is not None else {})
            for name, tensor in parts.items():
                digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of adapter parameters (gates not counted)."""
        return sum(t.numel() for t in self.tensors.values())

    def with_gates(self, gates: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None) -> Expert:
        """A new expert with these gates ({module path: [d_in]}); `provenance` is kept under provenance["gate"]."""
        record = {**self.provenance, "gate": dict(provenance or {})}
        return replace(self, gates=dict(gates), provenance=record)

    def with_signature(self, signature: DataSignature, provenance: Mapping[str, Any] | None = None) -> Expert:
        """A new expert with this data signature; `provenance` is kept under provenance["signature"]."""
        record = {**self.provenance, "signature": dict(provenance or {})}
        return replace(self, signature=signature, provenance=record)

    def renamed(self, name: str) -> Expert:
        return replace(self, name=name)

    @staticmethod
    def from_peft(
        folder: str | Path,
        *,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        drop: Collection[str] = (),
    ) -> Expert:
        """Reads any PEFT LoRA or (IA)³ folder, without building a PEFT model; gates and records beside it are not read.

        `drop` names what to leave out although the adapter then computes something else ("modules_to_save",
        "trainable_token_indices"); it is recorded in the provenance.
        """
        return _plain(folder, "PEFT", name, provenance, drop)

    @staticmethod
    def from_adapterhub(
        folder: str | Path,
        *,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        drop: Collection[str] = (),
    ) -> Expert:
        """Reads a bottleneck adapter that the `adapters` library saved (with use_safetensors=True), without the library.

        `drop` as in `from_peft`; here it may name "prediction_head".
        """
        return _plain(folder, "AdapterHub", name, provenance, drop)

    @staticmethod
    def from_hub(
        repo: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        name: str | None = None,
        drop: Collection[str] = (),
        max_bytes: int | None = None,
    ) -> Expert:
        """Fetches an expert, or any PEFT adapter, from the Hub. A commit that was fetched before needs no network.

        Args:
            repo: "org/name"; "org/name@revision:subfolder" says it all in one.
            revision: a branch, tag or commit; the main branch if None. The commit found is kept in `origin`.
            subfolder: of the repository, such as "experts/NAME" of a pool.
            token: an access token; if None, the one of `hf auth login` or HF_TOKEN.
            drop: as in `from_peft`.
            max_bytes: refuse larger files, by the size that the Hub lists; 4 GiB if None.

        Raises:
            DownloadError: it can't be fetched, is too large, or isn't what the Hub lists.
        """
        from phatgoose.experts import hub

        place = hub.Place.parse(repo, revision, subfolder)
        limit = hub.MAX_BYTES if max_bytes is None else max_bytes
        return hub.pull_expert(place, name=name, drop=drop, token=token, max_bytes=limit)

    def push(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        message: str | None = None,
        allow_paths: bool = False,
    ) -> HubSource:
        """Publishes the expert on the Hub, in one commit: to a new repository, or in place of the expert that is there.

        Args as of `Pool.push`. Returns: the repository, the new commit, and the subfolder.

        Raises:
            UploadError: it can't be published, its records hold local paths, or the repository holds something else.
        """
        from phatgoose.experts import hub_push

        return hub_push.push_expert(self, repo, private, revision, subfolder, token, message, allow_paths)

    @staticmethod
    def load(
        folder: str | Path,
        *,
        name: str | None = None,
        drop: Collection[str] = (),
        origin: HubSource | None = None,
    ) -> Expert:
        """Reads an expert folder: the adapter, of either format, and, where there, gates.safetensors and expert.json, all verified.

        `drop` as in `from_peft`; `origin` says where on the Hub the folder was fetched from.
        """
        folder = Path(folder)
        config, adapter = read_adapter(folder, drop)
        record, weights, there = (
            read_record(folder),
            folder / weights_file(config),
            f"sha256 in {RECORD_FILE}",
        )
        _same(record.get("adapter_sha256", adapter.sha256), adapter.sha256, weights, there)
        gates = None
        if os.path.lexists(folder / GATES_FILE):
            found = read_tensor_file(inside(folder, GATES_FILE, ExpertError))
            check_gates_metadata(found.metadata, folder / GATES_FILE, adapter.sha256, weights.name)
            _same(record.get("gates_sha256", found.sha256), found.sha256, folder / GATES_FILE, there)
            gates = found.tensors
        elif record.get("gates_sha256"):
            raise ExpertError(f"{folder / GATES_FILE} is missing, although {RECORD_FILE} records it.")
        signature = _read_signature(folder, record.get("signature_sha256"), adapter.sha256)
        name = name or record.get("name") or slug(folder.resolve().name)
        provenance = record.get("provenance", {})
        if drop:
            provenance = {
                **provenance,
                "dropped": sorted({*check_drop(provenance.get("dropped", ())), *check_drop(drop)}),
            }
        return Expert(name, config, adapter.tensors, gates, provenance, folder, origin, signature)

    def save(self, folder: str | Path) -> Path:
        """Writes the expert's folder, whole or not at all; an existing one is replaced.

        Raises:
            StorageError: no space or no permission; what was there is left as it was.
            ExpertError: if `folder` exists and is not an expert's folder.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).exists():
            raise ExpertError(
                f"{folder} exists and holds something else than an expert; choose another folder."
            )
        with atomic_folder(folder) as work:
            self._write_adapter(work)
            record: dict[str, Any] = {
                "format": "phatgoose-expert",
                "version": FORMAT_VERSION,
                "name": self.name,
            }
            record["adapter_sha256"] = sha256_file(work / weights_file(self.adapter_config))
            if self.gates is not None:
                metadata = {
                    "format": "phatgoose-gates",
                    "version": str(FORMAT_VERSION),
                    "adapter_sha256": record["adapter_sha256"],
                }
                if self.provenance.get("base"):
                    metadata["base"] = json.dumps(self.provenance["base"], sort_keys=True)
                self._write_gates(work / GATES_FILE, metadata)
                record["gates_sha256"] = sha256_file(work / GATES_FILE)
            if self.signature is not None:
                self.signature.write(work / SIGNATURE_FILE, record["adapter_sha256"])
                record["signature_sha256"] = sha256_file(work / SIGNATURE_FILE)
            record["provenance"] = dict(self.provenance)
            write_json(work / RECORD_FILE, record)
            write_card(work, self)
        return folder

    def equals(self, other: Expert) -> bool:
        """Whether both would be written as the same folder: name, adapter, gates, data signature and records alike."""
        return (
            other.name == self.name
            and dict(other.adapter_config) == dict(self.adapter_config)
            and dict(other.provenance) == dict(self.provenance)
            and _equal(other.tensors, self.tensors)
            and _equal(other.gates or {}, self.gates or {})
            and (
                other.signature is None if self.signature is None else self.signature.equals(other.signature)
            )
        )

    def _write_adapter(self, work: Path) -> None:
        """The adapter as it was read, to the byte, if its folder is still there; else the same tensors in a new file."""
        weights = weights_file(self.adapter_config)
        if (
            self.folder is not None
            and (self.folder / weights).is_file()
            and (self.folder / CONFIG_FILE).is_file()
        ):
            found = read_tensors(self.folder / weights)
            config = read_json(self.folder / CONFIG_FILE, ExpertError)
            if config == dict(self.adapter_config) and _equal(found, self.tensors):
                for name in (CONFIG_FILE, weights):
                    shutil.copyfile(self.folder / name, work / name)
                return
        write_json(work / CONFIG_FILE, dict(self.adapter_config))
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        write_bytes(work / weights, safetensors.torch.save(tensors, {"format": "pt"}))

    def _write_gates(self, target: Path, metadata: dict[str, str]) -> None:
        """The gates as they were read, to the byte, if their file is still there (safetensors orders metadata at random)."""
        assert self.gates is not None
        there = self.folder / GATES_FILE if self.folder is not None else None
        if there is not None and there.is_file():
            with contextlib.suppress(ExpertError):
                found = read_tensor_file(there)
                if found.metadata == metadata and _equal(found.tensors, self.gates):
                    shutil.copyfile(there, target)
                    return
        gates = {path: gate.contiguous() for path, gate in self.gates.items()}
        write_bytes(target, safetensors.torch.save(gates, metadata))


def _plain(
    folder: str | Path,
    wanted: str,
    name: str | None,
    provenance: Mapping[str, Any] | None,
    drop: Collection[str],
) -> Expert:
    """The adapter in a folder, without what we write beside it."""
    folder = Path(folder)
    config, adapter = read_adapter(folder, drop)
    if (found := format_of(config)) != wanted:
        raise ExpertError(
            f"{folder} holds an adapter in {found}'s format, expected {wanted}'s: use Expert.load, which reads both."
        )
    if drop:
        provenance = {**(provenance or {}), "dropped": list(check_drop(drop))}
    return Expert(
        name or slug(folder.resolve().name),
        config,
        adapter.tensors,
        provenance=dict(provenance or {}),
        folder=folder,
    )


def _read_signature(folder: Path, expected: Any, adapter_sha256: str) -> DataSignature | None:
    """The data signature beside an adapter with this sha256, if there is one: all of it, checked."""
    if not os.path.lexists(folder / SIGNATURE_FILE):
        if expected:
            raise ExpertError(f"{folder / SIGNATURE_FILE} is missing, although {RECORD_FILE} records it.")
        return None
    path = inside(folder, SIGNATURE_FILE, ExpertError)
    digest = sha256_file(path, ExpertError)
    _same(expected or digest, digest, path, f"sha256 in {RECORD_FILE}")
    found = StoredSignature(path, read_header(path)[1], adapter_sha256, digest)
    _ = found.texts  # a damaged one is refused here, not later
    return found


def read_record(folder: Path) -> dict[str, Any]:
    path = inside(folder, RECORD_FILE, ExpertError)
    if not os.path.lexists(path):
        return {}
    record = read_json(path, ExpertError, RECORD_LIMIT_BYTES)
    if not isinstance(record, dict) or record.get("format") != "phatgoose-expert":
        raise ExpertError(f'{path} is not an expert\'s record (no "format": "phatgoose-expert").')
    if record.get("version") != FORMAT_VERSION:
        raise ExpertError(
            f"{path} has format version {brief(record.get('version'))}; this phatgoose reads {FORMAT_VERSION}. Update phatgoose."
        )
    if not isinstance(record.get("provenance", {}), dict):
        raise ExpertError(f"{path}: provenance is not an object.")
    return record


def check_gates_metadata(
    metadata: Mapping[str, str], path: Path, adapter_hash: str, weights: str = PEFT_WEIGHTS
) -> None:
    """Refuses gates of another format, or of another adapter than the one with this sha256."""
    if metadata.get("format") != "phatgoose-gates" or metadata.get("version") != str(FORMAT_VERSION):
        raise ExpertError(
            f"{path} has format {brief(metadata.get('format'))} version {brief(metadata.get('version'))}; "
            f"expected 'phatgoose-gates' version '{FORMAT_VERSION}'."
        )
    _same(
        metadata.get("adapter_sha256"),
        adapter_hash,
        path.parent / weights,
        f"the adapter {GATES_FILE} was trained for",
    )


def checked_gates(
    gates: Mapping[str, Tensor], updates: Mapping[str, Update], where: str
) -> dict[str, Tensor]:
    for path in updates:
        if path not in gates:
            raise ExpertError(f"{where}: no gate for module {path}, which the expert adapts.")
    checked = {}
    for path, gate in gates.items():
        if path not in updates:
            raise ExpertError(f"{where}: there is a gate for module {path}, which the expert doesn't adapt.")
        expected = updates[path].gate_dim
        if gate.ndim != 1 or not sizes_agree(gate.shape[0], expected):
            raise ExpertError(f"{where}: gate of {path} has shape {list(gate.shape)}, expected [{expected}].")
        checked[path] = gate.detach().to("cpu", torch.float32)
        if not torch.isfinite(checked[path]).all():
            raise ExpertError(f"{where}: gate of {path} has values that are NaN or infinite.")
    return checked


def _same(expected: Any, found: str, path: Path, what: str) -> None:
    if expected != found:
        raise ExpertError(
            f"{path} is damaged or was changed: {what} is {brief(expected)}, the file's is {found}."
        )


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
