"""Compiles the CPU kernel on first use and keeps it in the cache folder; no build step, no Python or torch headers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
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
"""Instruction sets and the compiler's options for them. One that the compiler doesn't know is left out, but for the last."""
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
    """The kernel, compiled if the cache folder hasn't got it: some seconds, once.

    Raises:
        RoutingError: it can't be compiled, kept or loaded here; says why.
    """
    path = cache_folder() / "kernels" / f"phatgoose-{_key()}.so"
    try:
        if not path.is_file():
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


def _key() -> str:
    """Whatever the compiled file depends on. Two processes that compile at once write the same file, each whole."""
    parts = [
        torch.__version__,
        platform.machine(),
        os.path.basename(_openmp() or ""),
        repr((FLAGS, VARIANTS)),
    ]
    parts += [f"{p.name}\0{p.read_text(encoding='utf-8')}" for p in sorted(SOURCES.iterdir()) if p.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, or the first one found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def _openmp() -> str | None:
    """The OpenMP library that torch has loaded. A second one would have threads of its own, fighting for the same cores."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and "/" in line}
    except OSError:
        return None
    known = [f for f in sorted(files) if os.path.basename(f).startswith(("libgomp", "libiomp5", "libomp"))]
    # Other packages (scikit-learn, sentencepiece) bring their own, in folders named NAME.libs, and may be loaded as well.
    torchs = os.path.dirname(torch.__file__) + os.sep
    return min(known, key=lambda f: (not f.startswith(torchs), ".libs/" in f, f), default=None)


def _compiled() -> bytes:
    cxx = compiler()
    if cxx is None:
        raise RoutingError(f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)}).")
    log.info("compiling the CPU kernel with %s, once", cxx)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
        x86 = platform.machine() in ("x86_64", "AMD64")
        jobs = {
            name: subprocess.Popen(
                [cxx, *FLAGS, *options, f"-DVARIANT={name}", "-c", str(SOURCES / "update.cpp"), "-o", f"{folder}/{name}.o"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, options in VARIANTS.items()
            if x86 or name == "portable"
        }  # fmt: skip
        errors = {name: job.communicate(timeout=SECONDS)[1] for name, job in jobs.items()}
        built = [name for name, job in jobs.items() if job.returncode == 0]
        if "portable" not in built:
            raise RoutingError(f"{cxx} failed: {_end(errors['portable'])}")
        has = [f"-DHAS_{name.upper()}" for name in built]
        runtime = _openmp()
        _call(cxx, *FLAGS, *has, "-c", str(SOURCES / "dispatch.cpp"), "-o", f"{folder}/dispatch.o")
        # Of symbols that several objects define, the linker keeps the first. There should be none; if there are, every processor
        # can run the portable one.
        objects = [f"{folder}/{name}.o" for name in ("dispatch", *reversed(built))]
        _call(cxx, "-shared", *objects, runtime or "-fopenmp", "-o", f"{folder}/kernel.so")
        log.info("compiled for %s in %.0f s", ", ".join(built), time.monotonic() - started)
        return Path(folder, "kernel.so").read_bytes()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RoutingError(f"{command[0]} failed: {_end(done.stderr)}")


def _end(text: str) -> str:
    return " ".join(text.split())[-300:]


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
