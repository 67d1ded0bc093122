"""Parse places on the Hub: "org/name", "org/name@revision", "org/name@revision:folder"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phatgoose.errors import DownloadError

_PLACE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@:]+))?(:(?P<subfolder>.+))?",
    re.ASCII,
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Place:
    """A repository on the Hub, a revision of it, and a folder in it."""

    repo: str
    revision: str | None = None
    """A branch, tag or commit; None is the main branch."""
    subfolder: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"@{self.revision}" if self.revision else "")
        return text + (f":{self.subfolder}" if self.subfolder else "")

    @property
    def commit(self) -> str | None:
        """The revision, if it is a commit's full sha."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def path(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    @staticmethod
    def parse(text: str, revision: str | None = None, subfolder: str | None = None) -> Place:
        """The place that `text` names, with the revision and subfolder from the text or from the other arguments.

        Raises:
            DownloadError: `text` is no Hub id, or names another revision or subfolder than the arguments.
        """
        match = _PLACE.fullmatch(text)
        if match is None:
            raise DownloadError(
                f'{text!r} is not a Hub id: expected "org/name", "org/name@revision" or "org/name@revision:folder".'
            )
        for what, inside, given in (
            ("revisions", match["revision"], revision),
            ("subfolders", match["subfolder"], subfolder),
        ):
            if inside and given and inside != given:
                raise DownloadError(f"two {what}: {inside!r} in {text!r}, and {given!r}. Give one.")
        folder = match["subfolder"] or subfolder or ""
        parts = folder.split("/") if folder else []
        if any(part in ("", ".", "..") for part in parts) or "\\" in folder or not folder.isprintable():
            raise DownloadError(
                f"{folder!r} is not a folder inside a repository: expected names separated by '/'."
            )
        return Place(match["repo"], match["revision"] or revision, folder)


def is_place(text: str) -> bool:
    """Whether `text` could name something on the Hub."""
    return _PLACE.fullmatch(text) is not None
