"""Which specs read files of this machine, and specs and records without the paths of these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import PluginError, UnknownName
from phatgoose.tasks.load import find_source
from phatgoose.tasks.spec import TaskSpec


def without_paths(source: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `source` as it may be published: local paths are cut to their last part and folders left out,
    in its parts too."""
    kept = {key: value for key, value in source.items() if key != "folder"}
    if "spec" in kept:
        kept["spec"] = " + ".join(without_path(part) for part in str(kept["spec"]).split(" + "))
    if "parts" in kept:
        kept["parts"] = [without_paths(part) for part in kept["parts"]]
    return kept


def without_path(spec: str) -> str:
    """A task's spec as it may be published: of a local file only the name."""
    source, _, rest = spec.partition(":")
    name, mark, query = rest.partition("?")
    return f"{source}:{Path(name).name}{mark}{query}" if is_local(spec) else spec


def is_local(spec: str) -> bool:
    """True if a spec reads a file or folder of this machine: always for a source whose specs name paths
    (`TaskSource.local`), for others if it names a path.

    Only this spec's source is imported. One that isn't installed, or that is broken, can't be asked: then the
    name alone decides.
    """
    source, _, rest = spec.partition(":")
    parsed = TaskSpec(source.strip(), rest.partition("?")[0].strip())
    if parsed.has_path:
        return True
    try:
        return find_source(parsed.source).local
    except (UnknownName, PluginError):
        return False
