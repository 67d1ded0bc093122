"""Install phatgoose and what it needs into .venv, pinned, by uv or else by pip. Says first what that takes.

python3 .ci/install.py quickstart: what the main job and the servers need; dev: what tests, linters and pages need too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

GB = 10**9
ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PINS = ["--constraint", str(ROOT / "constraints.txt")]

# The extra, GB to fetch and GB on disk: as measured on Linux with torch for CPUs.
PACKAGES = {"quickstart": ("serve", 0.3, 1.6), "dev": ("dev", 0.9, 3.4)}
# What torch adds that comes with CUDA: the size of the wheels, and what they unpack to.
CUDA_FETCHED, CUDA_KEPT = 2.6, 3.4
# What the quickstart fetches (93 and 358 MB), and its size in the cache: the base in float32; BIG-bench and its tasks.
DATA = {"bases/smollm2-135m-instruct-q4-*": (0.1, 0.6), "bigbench/*": (0.4, 0.8)}
RESULTS = 0.3


def main() -> None:
    extra, fetched, kept = PACKAGES[sys.argv[1]]
    if not PYTHON.exists() and subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode:
        sys.exit(f"{sys.executable} can't make {VENV}; Debian has what it lacks in the package python3-venv.")
    uv = shutil.which("uv")
    if brings_cuda(uv):
        fetched, kept = fetched + CUDA_FETCHED, kept + CUDA_KEPT
        print(
            "torch brings CUDA libraries here: 3.4 GB that a build for CPUs does without. uv looks for the right one."
        )
    there = sum(path.lstat().st_size for path in VENV.rglob("*")) / GB
    missing = max(0.0, kept - there)
    fetched *= missing / kept
    print(f"{VENV}: {fetched:.1f} GB of packages to fetch, {missing:.1f} GB on disk")
    needs = {VENV: fetched + missing, cache(): 0.0}
    if sys.argv[1] == "quickstart":
        data = [sizes for place, sizes in DATA.items() if not any(cache().glob(place))]
        to_fetch, needs[cache()] = (sum(column) for column in zip((0.0, 0.0), *data, strict=True))
        needs[ROOT] = RESULTS
        print(
            f"{cache()}: {to_fetch:.1f} GB of base and tasks to fetch later, {needs[cache()]:.1f} GB on disk"
        )
    check_room(needs)
    install(uv, extra)


def cache() -> Path:
    """The same as phatgoose.files.cache_folder, which can't be imported yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PHATGOOSE_CACHE") or Path(home) / "phatgoose").expanduser()


def brings_cuda(uv: str | None) -> bool:
    """Whether the torch that is there or would be installed comes with CUDA's libraries."""
    if any(VENV.glob("lib/python*/site-packages/torch")):
        return any(VENV.glob("lib/python*/site-packages/nvidia"))
    if uv:
        return shutil.which("nvidia-smi") is not None
    look = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--quiet",
        "--report",
        "-",
        *PINS,
        "torch",
    ]
    found = subprocess.run(look, capture_output=True, text=True)
    try:
        needs = json.loads(found.stdout)["install"][0]["metadata"]["requires_dist"]
    except (ValueError, LookupError):  # no network, for example: installing will say so
        return False
    return sys.platform == "linux" and any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def check_room(needs: dict[Path, float]) -> None:
    """Ends where a disk has less room than what goes to the folders on it, in GB."""
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in needs.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        first, before = disks.get(there.stat().st_dev, (there, 0.0))
        disks[there.stat().st_dev] = (first, before + size)
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free / GB
        print(f"in all {size:.1f} GB on the disk of {folder}, which has {free:.1f} GB free", flush=True)
        if free < size:
            sys.exit(
                "That is too little room, so nothing was installed. Free some, or put base and tasks on another disk "
                "with PHATGOOSE_CACHE=FOLDER."
            )


def install(uv: str | None, extra: str) -> None:
    """Installs the repository, editable, with the pinned versions of what it needs."""
    what = [*PINS, "--editable", f"{ROOT}[{extra}]"]
    if uv:
        by_uv = [uv, "pip", "install", "--python", str(PYTHON), "--torch-backend", "auto", *what]
        if subprocess.run(by_uv).returncode == 0:
            return
        print("uv couldn't install them, so pip does.", file=sys.stderr, flush=True)
    if subprocess.run([str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *what]).returncode:
        sys.exit(
            "The packages could not be installed; the reason stands above. Run the same command again to go on."
        )


main()
