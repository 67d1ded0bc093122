"""Find the pools and recipes that come with phatgoose, by name; what the user has there goes first."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE if (_PACKAGE / "pools").is_dir() else _PACKAGE.parents[1]
"""A wheel has them in the package, a clone beside its sources."""


@cache
def pools() -> dict[str, Path]:
    """Name → folder."""
    return {manifest.parent.name: manifest.parent for manifest in sorted(_ROOT.glob("pools/*/pool.json"))}


@cache
def recipes() -> dict[str, Path]:
    """Name → TOML file of an experiment."""
    return {file.stem: file for file in sorted(_ROOT.glob("recipes/*.toml"))}


def pool_folder(place: str | Path, near: Path | None = None) -> Path:
    """The pool that a user means by `place`: what is there, else the pool of that name that comes with phatgoose.

    Args:
        near: where relative paths start, if not in the current folder.

    Returns: its folder, to be read and not written to; `place` as a path, if there is neither.
    """
    return _meant(place, pools(), near or Path())


def own_folder(place: str | Path | None) -> Path | None:
    """`place`, if changes of the pool can be kept there; None without a pool, or for one that comes with phatgoose."""
    return None if place is None or pool_folder(place) != Path(place) else Path(place)


def recipe_file(place: str | Path) -> Path:
    """The recipe that a user means by `place`, as `pool_folder` finds a pool."""
    return _meant(place, recipes(), Path())


def _meant(place: str | Path, shipped: dict[str, Path], near: Path) -> Path:
    path = near / place
    return shipped[str(place)] if str(place) in shipped and not path.exists() else path
