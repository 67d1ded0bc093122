"""Read an expert's folder: the adapter, and gates, data signature and record beside it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.formats import format_of, read_adapter, weights_file
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.card.card import own_card
from phatgoose.experts.data_signature import DataSignature, StoredSignature
from phatgoose.experts.files import tokenizer_files
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.files.safetensors_file import check_sha256
from phatgoose.experts.gates import FORMAT, check_made_for
from phatgoose.experts.names import CARD_FILE, EXPERT_FILES, GATES_FILE, RECORD_FILE, SIGNATURE_FILE, slug
from phatgoose.files import as_json

RECORD_VERSION = 1
RECORD_LIMIT_BYTES = 16 * 2**20
_RECORDED = f"sha256 in {RECORD_FILE}"


def read_plain(
    folder: Path,
    wanted: str,
    name: str | None,
    provenance: Mapping[str, Any] | None,
    drop: Collection[str],
) -> dict[str, Any]:
    """The arguments of `Expert` for an adapter alone; gates, signature and record beside it are not read.

    Args:
        wanted: the format that the adapter must have.
    """
    config, adapter = read_adapter(folder, drop)
    if (found := format_of(config)) != wanted:
        raise ExpertError(
            f"{folder} holds an adapter in {found}'s format, expected {wanted}'s: use Expert.load, which reads both."
        )
    if drop:
        provenance = {**(provenance or {}), "dropped": list(check_drop(drop))}
    return {
        "name": name or slug(folder.resolve().name),
        "adapter_config": config,
        "tensors": adapter.tensors,
        "provenance": _with_tokenizer(provenance or {}, folder),
        "folder": folder,
    }


def read_folder(path: Path, name: str | None, drop: Collection[str]) -> dict[str, Any]:
    """The arguments of `Expert` for its folder, every file verified."""
    config, adapter = read_adapter(path, drop)
    folder = SafeFolder(path)
    record, weights = read_record(folder), path / weights_file(config)
    check_sha256(record.get("adapter_sha256", adapter.sha256), adapter.sha256, weights, _RECORDED)
    gates = None
    if _is_there(folder, GATES_FILE, record.get("gates_sha256")):
        found = folder.read_tensors(GATES_FILE)
        check_made_for(FORMAT, found.metadata, path / GATES_FILE, adapter.sha256, weights.name)
        check_sha256(record.get("gates_sha256", found.sha256), found.sha256, path / GATES_FILE, _RECORDED)
        gates = found.tensors
    provenance = _with_tokenizer(record.get("provenance", {}), path)
    if drop:
        dropped = {*check_drop(provenance.get("dropped", ())), *check_drop(drop)}
        provenance = {**provenance, "dropped": sorted(dropped)}
    return {
        "name": name or record.get("name") or slug(path.resolve().name),
        "adapter_config": config,
        "tensors": adapter.tensors,
        "gates": gates,
        "provenance": provenance,
        "folder": path,
        "signature": _read_signature(folder, record.get("signature_sha256"), adapter.sha256, weights.name),
    }


def read_record(folder: SafeFolder) -> dict[str, Any]:
    """expert.json, or {} if there is none."""
    folder.file(RECORD_FILE)  # refuses a link out of the folder, also one that leads nowhere
    if not folder.has(RECORD_FILE):
        return {}
    return parse_record(folder, folder.read_bytes(RECORD_FILE, RECORD_LIMIT_BYTES))


def parse_record(folder: SafeFolder, data: bytes) -> dict[str, Any]:
    """The record in the bytes of an expert.json that was read."""
    path = folder.path / RECORD_FILE
    record = as_json(data, path, folder.error)
    if not isinstance(record, dict) or record.get("format") != "phatgoose-expert":
        raise ExpertError(f'{path} is not an expert\'s record (no "format": "phatgoose-expert").')
    if record.get("version") != RECORD_VERSION:
        raise ExpertError(
            f"{path} has format version {brief(record.get('version'))}; this phatgoose reads {RECORD_VERSION}. "
            "Update phatgoose."
        )
    if not isinstance(record.get("provenance", {}), dict):
        raise ExpertError(f"{path}: provenance is not an object.")
    return record


def check_replaceable(folder: Path, keeps_card: bool = False) -> None:
    """Refuses to replace a folder that holds anything but an expert: replacing deletes all that is in it.

    Args:
        keeps_card: a README.md that somebody wrote may be there, since the expert was read from this very folder.
    """
    if not folder.is_dir():
        return
    own = {*EXPERT_FILES, *([CARD_FILE] if keeps_card or own_card(folder) is None else [])}
    others = sorted(p.name for p in folder.iterdir() if p.name not in own)
    if others:
        raise ExpertError(
            f"{folder} holds files that are no expert's "
            f"({', '.join(others[:4])}{', …' if len(others) > 4 else ''}), which would be lost: choose another "
            "folder with --out."
        )


def _is_there(folder: SafeFolder, name: str, recorded: Any) -> bool:
    """Whether an optional file is there; it must be if expert.json records its sha256."""
    if not folder.has(name) and recorded:
        raise ExpertError(f"{folder.path / name} is missing, although {RECORD_FILE} records it.")
    return folder.has(name)


def _with_tokenizer(provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The provenance with a record of tokenizer files beside the adapter; a new record gives a warning."""
    found = None if tokenizer_files.KEY in provenance else tokenizer_files.read_tokenizer_record(folder)
    if found is None:
        return dict(provenance)
    warnings.warn(f"{folder}: {tokenizer_files.load_warning(found)}", stacklevel=4)
    return {**provenance, tokenizer_files.KEY: found}


def _read_signature(
    folder: SafeFolder, recorded: Any, adapter_sha256: str, weights: str
) -> DataSignature | None:
    """The data signature beside the adapter with this sha256, if there is one: all of it, checked."""
    if not _is_there(folder, SIGNATURE_FILE, recorded):
        return None
    path, digest = folder.file(SIGNATURE_FILE), folder.sha256(SIGNATURE_FILE)
    check_sha256(recorded or digest, digest, path, _RECORDED)
    found = StoredSignature(path, folder.read_header(SIGNATURE_FILE)[1], digest, adapter_sha256, weights)
    _ = found.texts  # read now, so that a damaged one is refused here
    return found
