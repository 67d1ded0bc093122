"""What to type where an optional package is missing: phatgoose is on no package index, so `pip install phatgoose[…]` finds nothing."""

from __future__ import annotations

import shlex
import sys


def install(extra: str) -> str:
    """How to install one of phatgoose's extras into the Python that runs, as the end of a sentence in a message.

    It names the packages themselves, with the versions that phatgoose asks for, so it works however phatgoose was installed.
    """
    packages = requirements(extra)
    if not packages:  # run from its source, never installed
        return f'{sys.executable} -m pip install ".[{extra}]" in a clone of phatgoose'
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


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
