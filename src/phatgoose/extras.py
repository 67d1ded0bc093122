"""Installed packages and their versions, and how to install an optional one."""

from __future__ import annotations

import platform
import shlex
import sys


def install(extra: str) -> str:
    """How to install one of phatgoose's extras into the Python that runs, as the end of a sentence in a message.

    It names the packages and the versions that phatgoose asks for: phatgoose is on no package index, so
    `pip install phatgoose[…]` finds nothing.
    """
    packages = requirements(extra)
    if not packages:  # run from its source, never installed
        return f'{sys.executable} -m pip install ".[{extra}]" in a clone of phatgoose'
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def installed_versions(*packages: str) -> dict[str, str | None]:
    """Package → installed version (None: not installed), and Python's own: what a record says it was made with."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "python": platform.python_version()}


def requirements(extra: str) -> list[str]:
    """The packages of an extra as pip takes them, extras within it resolved; none if phatgoose isn't installed."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in requires("phatgoose") or ()]
    except PackageNotFoundError:
        return []
    found: list[str] = []
    for one in declared:
        if (
            one.marker is None
            or one.marker.evaluate({"extra": ""})
            or not one.marker.evaluate({"extra": extra})
        ):
            continue
        if one.name == "phatgoose":
            found += [package for inner in sorted(one.extras) for package in requirements(inner)]
        else:
            options = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
            found.append(f"{one.name}{options}{one.specifier}")
    return list(dict.fromkeys(found))
