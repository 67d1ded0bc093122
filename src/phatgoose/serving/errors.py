"""The server's error, and what clients may be told of any error."""

from __future__ import annotations

import re
from pathlib import Path

from phatgoose.errors import PhatgooseError

SHUTTING_DOWN = "the server ends"
"""The error of answers that aren't finished when the server stops."""


class ServingError(PhatgooseError):
    """The server can't be started as configured, or its engine can't do something."""


# A path begins at the root, the home folder or a drive. In quotes it may hold spaces, otherwise it ends at the first
# one. Not matched: what follows a host name, a word or a < (as in </s>).
_QUOTED_PATH = re.compile(r"""(['"])(?:~?/|[A-Za-z]:[/\\])[^'"\n]*?([^'"/\\\n]*)[/\\]?\1""")
_PATH = re.compile(r"""(?<![\w.:/\\~<-])(?:~?/|[A-Za-z]:[/\\])(?:[^\s'"/\\]+[/\\])*([^\s'"/\\]+)[/\\]?""")


def client_message(error: BaseException) -> str:
    """The message that clients may see.

    Our own messages say what is wrong; only this machine's folders are removed. Others' might repeat what another
    client sent, so of those only the type is told.
    """
    return hide_paths(str(error)) if isinstance(error, PhatgooseError) else type(error).__name__


def hide_paths(text: str, *known: Path | str | None) -> str:
    """Cuts every absolute path down to its last name. `known` paths may hold spaces."""
    for path in sorted(map(str, filter(None, known)), key=len, reverse=True):
        if Path(path).is_absolute():
            text = text.replace(path, Path(path).name)
    return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", text))
