"""An expert's folder: an adapter as PEFT or AdapterHub has it, and beside it gates.safetensors, signature and expert.json."""

from __future__ import annotations

import os
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
from phatgoose.experts.files.safetensors_file import check_sha256, read_tensor_file
from phatgoose.experts.files.safetensors_header import read_header
from phatgoose.experts.gates import check_gates_metadata
from phatgoose.experts.names import (
    CARD_FILE,
    EXPERT_FILES,
    GATES_FILE,
    RECORD_FILE,
    SIGNATURE_FILE,
    slug,
)
from phatgoose.files import inside, read_json, sha256_file

OWN_FILES = frozenset(EXPERT_FILES)
RECORD_VERSION = 1
RECORD_LIMIT_BYTES = 16 * 2**20


def read_plain(
    folder: Path,
    wanted: str,
    name: str | None,
    provenance: Mapping[str, Any] | None,
    drop: Collection[str],
) -> dict[str, Any]:
    """What makes an `Expert` of an adapter's folder, without what we write beside it; `wanted`: the adapter's format."""
    config, adapter = read_adapter(folder, drop)
    if (found := format_of(config)) != wanted:
        raise ExpertError(
            f"{folder} holds an adapter in {found}'s format, expected {wanted}'s: use Expert.load, which reads both."
        )
    if drop:
        provenance = {**(provenance or {}), "dropped": list(check_drop(drop))}
    return {
        "name": name or slug(folder.resolve().name), "adapter_config": config, "tensors": adapter.tensors,
        "provenance": _with_tokenizer(provenance or {}, folder), "folder": folder,
    }  # fmt: skip


def read_folder(folder: Path, name: str | None, drop: Collection[str]) -> dict[str, Any]:
    """What makes an `Expert` of its folder, every file verified.

    Raises:
        ExpertError: naming the file, what was expected and what was found.
    """
    config, adapter = read_adapter(folder, drop)
    record, weights, there = (
        read_record(folder),
        folder / weights_file(config),
        f"sha256 in {RECORD_FILE}",
    )
    check_sha256(record.get("adapter_sha256", adapter.sha256), adapter.sha256, weights, there)
    gates = None
    if os.path.lexists(folder / GATES_FILE):
        found = read_tensor_file(inside(folder, GATES_FILE, ExpertError))
        check_gates_metadata(found.metadata, folder / GATES_FILE, adapter.sha256, weights.name)
        check_sha256(record.get("gates_sha256", found.sha256), found.sha256, folder / GATES_FILE, there)
        gates = found.tensors
    elif record.get("gates_sha256"):
        raise ExpertError(f"{folder / GATES_FILE} is missing, although {RECORD_FILE} records it.")
    signature = _read_signature(folder, record.get("signature_sha256"), adapter.sha256)
    name = name or record.get("name") or slug(folder.resolve().name)
    provenance = _with_tokenizer(record.get("provenance", {}), folder)
    if drop:
        provenance = {
            **provenance,
            "dropped": sorted({*check_drop(provenance.get("dropped", ())), *check_drop(drop)}),
        }
    return {
        "name": name, "adapter_config": config, "tensors": adapter.tensors, "gates": gates, "provenance": provenance,
        "folder": folder, "signature": signature,
    }  # fmt: skip


def _with_tokenizer(provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The provenance with what tokenizer files beside the adapter say, which is told once: when they are first met."""
    found = None if tokenizer_files.KEY in provenance else tokenizer_files.brought(folder)
    if found is None:
        return dict(provenance)
    warnings.warn(f"{folder}: {tokenizer_files.at_load(found)}", stacklevel=4)
    return {**provenance, tokenizer_files.KEY: found}


def check_replaceable(folder: Path, keeps_card: bool = False) -> None:
    """Refuses a folder that can't be an expert's without something being lost: replacing it deletes whatever else is in it.

    A README.md that somebody wrote may be there only if it `keeps_card`: if the expert was read from this very folder.

    Raises:
        ExpertError: it holds other files.
    """
    if not folder.is_dir():
        return
    own = OWN_FILES | ({CARD_FILE} if keeps_card or own_card(folder) is None else set())
    others = sorted(p.name for p in folder.iterdir() if p.name not in own)
    if others:
        raise ExpertError(
            f"{folder} holds files that are no expert's ({', '.join(others[:4])}{', …' if len(others) > 4 else ''}), which "
            "would be lost: choose another folder with --out."
        )


def read_record(folder: Path) -> dict[str, Any]:
    """expert.json, or {} if there is none."""
    path = inside(folder, RECORD_FILE, ExpertError)
    if not os.path.lexists(path):
        return {}
    record = read_json(path, ExpertError, RECORD_LIMIT_BYTES)
    if not isinstance(record, dict) or record.get("format") != "phatgoose-expert":
        raise ExpertError(f'{path} is not an expert\'s record (no "format": "phatgoose-expert").')
    if record.get("version") != RECORD_VERSION:
        raise ExpertError(
            f"{path} has format version {brief(record.get('version'))}; this phatgoose reads {RECORD_VERSION}. Update phatgoose."
        )
    if not isinstance(record.get("provenance", {}), dict):
        raise ExpertError(f"{path}: provenance is not an object.")
    return record


def _read_signature(folder: Path, expected: Any, adapter_sha256: str) -> DataSignature | None:
    """The data signature beside an adapter with this sha256, if there is one: all of it, checked."""
    if not os.path.lexists(folder / SIGNATURE_FILE):
        if expected:
            raise ExpertError(f"{folder / SIGNATURE_FILE} is missing, although {RECORD_FILE} records it.")
        return None
    path = inside(folder, SIGNATURE_FILE, ExpertError)
    digest = sha256_file(path, ExpertError)
    check_sha256(expected or digest, digest, path, f"sha256 in {RECORD_FILE}")
    found = StoredSignature(path, read_header(path)[1], adapter_sha256, digest)
    _ = found.texts  # a damaged one is refused here, not later
    return found
