"""An expert: an adapter, its gates, its data signature, and how they were made."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters.formats import to_contents, weights_file
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.card.card import Facts, write_card
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.files.safetensors_file import all_identical, bytes_of, copied, write_tensors
from phatgoose.experts.folder import RECORD_VERSION, check_replaceable, read_folder, read_plain
from phatgoose.experts.gates import checked_gates, gates_metadata
from phatgoose.experts.names import CONFIG_FILE, GATES_FILE, RECORD_FILE, SIGNATURE_FILE, check_name
from phatgoose.files import atomic_folder, read_json, sha256_file, storage_errors, work_place, write_json
from phatgoose.ops.update import Update
from phatgoose.records import Fingerprint, HubSource


@dataclass(frozen=True, eq=False)
class Expert:
    """One contributor's expert. Immutable: training its gates gives a new one.

    Build it with `from_peft`, `load`, `pull` or `train_expert` rather than by hand.

    Raises (from every way of building one):
        ExpertError: naming the file, the tensor or the setting, what was expected and what was found.
    """

    name: str
    adapter_config: Mapping[str, Any] = field(repr=False)
    """adapter_config.json, untouched: PEFT's or AdapterHub's."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """The adapter's tensors under its format's keys, untouched."""
    gates: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """One float32 vector [d_in] per adapted module, by module path; None if they aren't trained yet."""
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """How it was made: base, task, configs, versions, validation losses, and the gates' own record under "gate"."""
    folder: Path | None = field(default=None, repr=False)
    """The folder that it was read from; None if it wasn't read."""
    origin: HubSource | None = None
    """Where on the Hub its adapter was fetched from, or None; a pool keeps this in its manifest."""
    signature: DataSignature | None = field(default=None, repr=False)
    """Its data signature (mean activations, text embeddings), or None."""
    updates: Mapping[str, Update] = field(init=False, repr=False)
    """What it does at each adapted module, by the module's path in the base model."""
    base_copies: Mapping[str, Tensor] = field(init=False, repr=False)
    """Weights of the base that PEFT saved along, by parameter name; `route` checks that they equal the base's."""

    def __post_init__(self) -> None:
        # object.__setattr__, since the dataclass is frozen: these fields are derived once, here.
        check_name(self.name)
        drop = check_drop(self.provenance.get("dropped", ()))
        contents = to_contents(self.adapter_config, self.tensors, self._where(), drop)
        object.__setattr__(self, "updates", contents.updates)
        object.__setattr__(self, "base_copies", contents.base_copies)
        if self.gates is not None:
            object.__setattr__(self, "gates", checked_gates(self.gates, self.sizes, self._where()))
        if self.signature is not None:
            self.signature.check_fits(self.sizes, self._where())
        _ = self.base  # so that a wrong record is refused here, not later

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values()})
        gates = "no" if self.gates is None else "yes"
        return f"Expert({self.name!r}, modules={len(self.updates)}, ranks={ranks}, gates={gates})"

    def _where(self) -> str:
        return f"expert {self.name!r}" + (f" ({self.folder})" if self.folder else "")

    @property
    def base(self) -> Fingerprint | None:
        """The base that it, or else its gates, was trained on; None if only a name is recorded, or nothing."""
        if not (found := self.recorded_base):
            return None
        try:
            return Fingerprint.from_json(found)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise ExpertError(
                f"{self._where()}: the recorded base is not a fingerprint: {cause!r}"
            ) from cause

    @property
    def recorded_base(self) -> Any:
        """`base` as the records have it, unchecked."""
        gate = self.provenance.get("gate")
        return self.provenance.get("base") or (gate.get("base") if isinstance(gate, dict) else None)

    @property
    def base_name(self) -> str | None:
        """The base's name in the adapter's own config; it may be a path."""
        name = self.adapter_config.get("base_model_name_or_path") or self.adapter_config.get("model_name")
        return name if isinstance(name, str) and name else None

    @cached_property
    def sizes(self) -> Mapping[str, tuple[int, int, bool]]:
        """Module path → (d_in, d_out, whether it is an embedding), with 0 for a size that only the base knows."""
        return {path: (u.d_in, u.d_out, u.embedding) for path, u in self.updates.items()}

    @cached_property
    def hash(self) -> str:
        """sha256 of what it computes: every update and gate by module. Its name and records don't count."""
        digest = hashlib.sha256()
        for path in sorted(self.updates):
            update = self.updates[path]
            digest.update(f"{path}\0{json.dumps(update.numbers(), sort_keys=True)}".encode())
            parts = dict(update.parts()) | ({"gate": self.gates[path]} if self.gates is not None else {})
            for name, tensor in parts.items():
                digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
                digest.update(bytes_of(tensor))
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
        """Reads the PEFT adapter in a folder, without building a PEFT model; gates and records beside it are not read.

        Args:
            drop: what to leave out ("modules_to_save", "trainable_token_indices"), although the adapter then
                computes something else; the provenance records it.
        """
        return Expert(**read_plain(Path(folder), "PEFT", name, provenance, drop))

    @staticmethod
    def from_adapterhub(
        folder: str | Path,
        *,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        drop: Collection[str] = (),
    ) -> Expert:
        """Reads a bottleneck adapter that the `adapters` library saved with use_safetensors=True.

        Args:
            drop: as in `from_peft`; here it may be "prediction_head".
        """
        return Expert(**read_plain(Path(folder), "AdapterHub", name, provenance, drop))

    @staticmethod
    def load(
        folder: str | Path,
        *,
        name: str | None = None,
        drop: Collection[str] = (),
        origin: HubSource | None = None,
    ) -> Expert:
        """Reads an expert folder, of either format, and verifies it all, with gates, signature and record.

        Args:
            drop: as in `from_peft`.
            origin: where on the Hub the folder was fetched from.
        """
        return Expert(**read_folder(Path(folder), name, drop), origin=origin)

    @staticmethod
    def pull(
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
            repo: "org/name", or "org/name@revision:subfolder" in place of the next two arguments.
            revision: a branch, tag or commit; the main branch if None. The commit found is kept in `origin`.
            subfolder: of the repository, such as "experts/NAME" of a pool.
            token: an access token; if None, the one of `hf auth login` or HF_TOKEN.
            drop: as in `from_peft`.
            max_bytes: refuse larger files, by the size that the Hub lists; 4 GiB if None.

        Raises:
            DownloadError: it can't be fetched, is too large, or isn't what the Hub lists.
        """
        from phatgoose.experts.hub.place import Place
        from phatgoose.experts.hub.pull import pull_expert  # here, since it takes long

        pulled = pull_expert(Place.parse(repo, revision, subfolder), drop, token, max_bytes)
        return Expert.load(pulled.folder, name=name or pulled.name, drop=drop, origin=pulled.source)

    @staticmethod
    def from_hub(repo: str, **options: Any) -> Expert:
        """Deprecated: use `Expert.pull`, which takes the same arguments."""
        warnings.warn("Expert.from_hub is now Expert.pull.", DeprecationWarning, stacklevel=2)
        return Expert.pull(repo, **options)

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
        from phatgoose.experts.hub.push import PushOptions, push_expert

        options = PushOptions(private, revision, token, message or f"Expert {self.name}", allow_paths)
        with work_place(None) as work, storage_errors(work):
            return push_expert(self.save(work / self.name), repo, subfolder, options)

    def save(self, folder: str | Path) -> Path:
        """Writes the expert's folder, whole or not at all; an existing one is replaced. Permissions are kept.

        Raises:
            StorageError: no space or no permission; what was there is left as it was.
            ExpertError: `folder` exists and is not an expert's folder, or holds other files, which would be lost.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).exists():
            raise ExpertError(
                f"{folder} exists and holds something else than an expert; choose another folder."
            )
        check_replaceable(folder, keeps_card=self.folder is not None and self.folder == folder)
        with atomic_folder(folder, like=self.folder) as work:
            self._write_files(work)
        return folder

    def equals(self, other: Expert) -> bool:
        """Whether both would be written as the same folder: name, adapter, gates, data signature and records alike."""
        return (
            other.name == self.name
            and dict(other.adapter_config) == dict(self.adapter_config)
            and dict(other.provenance) == dict(self.provenance)
            and all_identical(other.tensors, self.tensors)
            and all_identical(other.gates or {}, self.gates or {})
            and (
                other.signature is None if self.signature is None else self.signature.equals(other.signature)
            )
        )

    def _write_files(self, work: Path) -> None:
        """Writes all files of the expert into an empty folder."""
        self._write_adapter(work)
        record: dict[str, Any] = {"format": "phatgoose-expert", "version": RECORD_VERSION, "name": self.name}
        record["adapter_sha256"] = adapter = sha256_file(work / weights_file(self.adapter_config))
        if self.gates is not None:
            self._write_gates(work / GATES_FILE, gates_metadata(adapter, self.recorded_base))
            record["gates_sha256"] = sha256_file(work / GATES_FILE)
        if self.signature is not None:
            self.signature.write(work / SIGNATURE_FILE, adapter)
            record["signature_sha256"] = sha256_file(work / SIGNATURE_FILE)
        record["provenance"] = dict(self.provenance)
        write_json(work / RECORD_FILE, record)
        facts = Facts(
            self.name,
            self.adapter_config,
            self.provenance,
            self.gates is not None,
            len(self.updates),
            self.parameters,
            str(self.origin or ""),
        )
        write_card(work, facts, self.folder)

    def _write_adapter(self, work: Path) -> None:
        """Writes config and tensors: copies of the files that were read if they still hold the same."""
        weights, source = weights_file(self.adapter_config), self.folder
        if source is not None and (source / weights).is_file() and (source / CONFIG_FILE).is_file():
            same = read_json(source / CONFIG_FILE, ExpertError) == dict(self.adapter_config)
            if same and copied(source / weights, work / weights, self.tensors):
                shutil.copyfile(source / CONFIG_FILE, work / CONFIG_FILE)
                return
        write_json(work / CONFIG_FILE, dict(self.adapter_config))
        write_tensors(work / weights, self.tensors, {"format": "pt"})

    def _write_gates(self, target: Path, metadata: dict[str, str]) -> None:
        """Writes gates.safetensors: a copy of the file that was read, if it still holds the same, else a new file."""
        assert self.gates is not None
        source = self.folder / GATES_FILE if self.folder is not None else None
        if not copied(source, target, self.gates, metadata):
            write_tensors(target, self.gates, metadata)
