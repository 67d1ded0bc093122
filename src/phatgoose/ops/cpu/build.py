"""Compiles the CPU kernel on first use, without Python or torch headers, and keeps it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import PhatgooseError, RoutingError
from phatgoose.files import cache_folder, write_bytes

SOURCES = Path(__file__).parent / "kernel"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-w",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""Instruction sets, best first, and the compiler's options. What it doesn't know is left out; the last must compile."""
COMPILERS = ("g++", "c++", "clang++")
SECONDS = 600
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Library:
    """The compiled kernel. `run` is kernel/dispatch.cpp's phatgoose_run."""

    path: Path
    variants: tuple[str, ...]
    """What this processor can run, best first; run's first argument is an index into it."""
    run: Any


@functools.cache
def library() -> Library:
    """The kernel, compiled if the cache hasn't got it: some seconds, once. Raises RoutingError if it can't be."""
    path = kernel_path()
    try:
        if path.is_file():
            try:
                return _loaded(path)
            except OSError as error:
                log.info("compiling the CPU kernel again, because the kept one can't be loaded: %s", error)
        write_bytes(path, _compiled())
        return _loaded(path)
    except (PhatgooseError, OSError) as error:
        raise RoutingError(f'the "cpu" backend can\'t be used: {error}') from error


@functools.cache
def reason() -> str | None:
    """Why the kernel can't be used here; None if it can."""
    try:
        library()
    except RoutingError as error:
        return str(error)
    return None


def kernel_path() -> Path:
    """Where the kernel is kept. Its name is a hash of all that the file depends on.

    So two processes that compile at once write the same file. Of the compiler, only $CXX counts: a kept file
    is used even if there is no compiler any more.
    """
    parts = [
        torch.__version__,
        os.environ.get("CXX", ""),
        platform.machine(),
        os.path.basename(_openmp() or ""),
        repr((FLAGS, VARIANTS)),
    ]
    parts += [f"{p.name}\0{p.read_text(encoding='utf-8')}" for p in sorted(SOURCES.iterdir()) if p.is_file()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"phatgoose-{key}.so"


def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX (maybe several words: ccache g++), or the first one found; empty if none is."""
    asked = os.environ.get("CXX")
    if not asked:
        return next(((found,) for name in COMPILERS if (found := shutil.which(name))), ())
    if found := shutil.which(asked):  # its path may have spaces
        return (found,)
    with suppress(ValueError):  # a quotation mark is missing
        words = shlex.split(asked)
        if words and (found := shutil.which(words[0])):
            return (found, *words[1:])
    return ()


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded. Threads of a second one would compete for the same cores."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and "/" in line}
    except OSError:
        return None
    known = [f for f in sorted(files) if os.path.basename(f).startswith(("libgomp", "libiomp5", "libomp"))]
    # Other packages (scikit-learn, sentencepiece) may have loaded their own, from folders named NAME.libs.
    torchs = os.path.dirname(torch.__file__) + os.sep
    return min(known, key=lambda f: (not f.startswith(torchs), ".libs/" in f, f), default=None)


def _compiled() -> bytes:
    """The compiled kernel's file. Raises RoutingError if there is no compiler, or what it makes can't be loaded."""
    cxx = compiler()
    if not cxx:
        asked = os.environ.get("CXX")
        looked = f"$CXX is {asked!r}" if asked else f"looked for $CXX, {', '.join(COMPILERS)}"
        raise RoutingError(f"no C++ compiler was found ({looked}).")
    log.info("compiling the CPU kernel with %s, once", shlex.join(cxx))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        x86 = platform.machine() in ("x86_64", "AMD64")
        source, kernel = str(SOURCES / "update.cpp"), Path(folder, "kernel.so")
        variants = {name: options for name, options in VARIANTS.items() if x86 or name == "portable"}
        errors = _run(
            [*cxx, *FLAGS, *options, f"-DVARIANT={name}", "-c", source, "-o", f"{folder}/{name}.o"]
            for name, options in variants.items()
        )
        failed = {name: error for name, error in zip(variants, errors, strict=True) if error is not None}
        if "portable" in failed:
            raise RoutingError(f"{shlex.join(cxx)} failed: {failed['portable']}")
        built = [name for name in variants if name not in failed]
        has = [f"-DHAS_{name.upper()}" for name in built]
        # If several objects define a symbol, the linker keeps the first. There should be none; but if there are, every
        # processor can run the portable one, so that comes first.
        objects = [f"{folder}/{name}.o" for name in ("dispatch", *reversed(built))]
        for command in (
            [*cxx, *FLAGS, *has, "-c", str(SOURCES / "dispatch.cpp"), "-o", objects[0]],
            [*cxx, "-shared", *objects, _openmp() or "-fopenmp", "-o", str(kernel)],
        ):
            if (error := _run([command])[0]) is not None:
                raise RoutingError(f"{shlex.join(cxx)} failed: {error}")
        try:  # a file that can't be loaded isn't kept
            _loaded(kernel)
        except OSError as error:
            why = str(error)
            if "__kmpc" in why:
                why += "; this compiler's OpenMP isn't torch's. Install g++."
            raise RoutingError(f"what {shlex.join(cxx)} compiled can't be loaded: {why}") from error
        log.info("compiled for %s in %.0f s", ", ".join(built), time.monotonic() - started)
        return kernel.read_bytes()


def _run(commands: Iterable[list[str]]) -> list[str | None]:
    """Runs commands in parallel. For each, returns None, or the end of its error output if it failed.

    Raises RoutingError if they take longer than SECONDS, OSError if one can't be started. None is left running.
    """
    until, jobs = time.monotonic() + SECONDS, []
    try:
        for command in commands:
            # A compiler starts further processes. A new session lets all of them be ended together.
            jobs.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                )
            )
        said = [job.communicate(timeout=max(0, until - time.monotonic()))[1] for job in jobs]
    except subprocess.TimeoutExpired as error:
        raise RoutingError(f"{error.cmd[0]} was not done after {SECONDS} seconds.") from error
    finally:
        for job in jobs:
            if job.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            if job.stderr is not None:
                job.stderr.close()
    return [
        " ".join(text.split())[-300:] if job.returncode else None
        for job, text in zip(jobs, said, strict=True)
    ]


def _loaded(path: Path) -> Library:
    loaded = ctypes.CDLL(str(path))
    name = loaded.phatgoose_variant
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    found: list[str] = []
    while (text := name(len(found))) is not None:
        found.append(text.decode())
    run = loaded.phatgoose_run
    run.restype = ctypes.c_int
    run.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 4,
        ctypes.c_int64,
        *[ctypes.c_void_p] * 2,
        ctypes.c_int64,
    ]
    return Library(path, tuple(found), run)
