"""`phatgoose doctor`: what this machine has, and what is used of it."""

from __future__ import annotations

from phatgoose.cli.measure import show

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")


def command() -> None:
    """Say which versions, processor and cache folder are in use, and what computes the routing and why.

    Compiles the CPU kernel if that wasn't done yet (a C++ compiler is used if there is one, and never required).
    """
    import platform
    import shlex
    import sys
    from importlib.metadata import version

    import torch

    from phatgoose.ops import auto_is
    from phatgoose.ops.cpu import build

    cuda = torch.cuda
    gpus = [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    rows = [
        ("phatgoose", version("phatgoose")),
        ("python", f"{platform.python_version()} ({sys.executable})"),
    ]
    rows += [(name, version(name)) for name in LIBRARIES]
    rows += [
        ("processor", f"{platform.machine()}, torch uses {torch.get_num_threads()} threads"),
        ("GPU", ", ".join(gpus) or "none that torch can use"),
        ("cache", _cache()),
        ("compiler", shlex.join(build.compiler()) or "none"),
    ]
    kind, why = auto_is()
    rows.append(("routing", f"on CPUs, auto is {kind}: {why}"))
    kind, why = auto_is("cuda")
    rows.append(("", f"on GPUs, auto is {kind}: {why}"))
    show.facts(rows)


def _cache() -> str:
    import shutil

    from phatgoose.files import cache_folder

    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{folder}, {shutil.disk_usage(there).free / 1e9:.1f} GB free"
