"""Task specs: `source:name`, optionally with options as in a URL.

For example `jsonl:data.jsonl?input=question&target=answer`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from phatgoose.errors import TaskError
from phatgoose.registry import unknown


@dataclass(frozen=True)
class TaskSpec:
    """A parsed spec."""

    source: str
    """Which source loads it, e.g. `bigbench`."""
    name: str
    """What the source calls it: a task, a path, a dataset."""
    options: dict[str, str] = field(default_factory=dict)
    """Options after `?`, percent-decoded."""
    text: str = ""
    """The spec as it was written."""

    @property
    def has_path(self) -> bool:
        """Whether its name can only be a path of this machine, whatever the source."""
        return self.name.startswith(("/", ".", "~"))

    def local_path(self, folder: Path | None) -> Path:
        """Its name as a path. A relative one starts at the folder, if there is one."""
        return (folder or Path()) / Path(self.name).expanduser()

    def check_options(self, known: Collection[str]) -> None:
        """Raises UnknownName for an option this source doesn't have."""
        for name in self.options:
            if name not in known:
                raise unknown(f"option of {self.source}: specs", name, known)

    def count(self, option: str, default: int) -> int:
        """The number of at least 1 that an option gives, or `default`. Raises TaskError if it gives something else."""
        text = self.options.get(option, str(default))
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise TaskError(f"{self.text}: {option} must be a number of at least 1, got {text!r}.")
        return int(text)


def split_spec(spec: str) -> TaskSpec:
    """Parses `source:name[?option=value&…]`. In values, write & as %26, % as %25 and a line break as %0A.

    Raises:
        TaskError: if there is no source, no name, or an option without a value.
    """
    source, colon, rest = spec.partition(":")
    name, mark, query = rest.partition("?")
    if not colon or not source.strip() or not name.strip():
        raise TaskError(
            f"task spec {spec!r} should read source:name, e.g. bigbench:social_iqa or jsonl:my.jsonl."
        )
    options: dict[str, str] = {}
    for part in query.split("&") if mark else []:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise TaskError(
                f"task spec {spec!r}: option {part!r} should read name=value (write & in a value as %26)."
            )
        if key in options:
            raise TaskError(f"task spec {spec!r}: option {key!r} is given twice.")
        options[key] = unquote(value)
    return TaskSpec(source.strip(), name.strip(), options, spec)
