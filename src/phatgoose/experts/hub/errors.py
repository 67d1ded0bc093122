"""Turn whatever huggingface_hub raises into one error of ours, without access tokens in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants

from phatgoose.errors import DownloadError, PhatgooseError
from phatgoose.files import storage_errors
from phatgoose.hub_errors import explain, hide_tokens


@contextlib.contextmanager
def hub_errors(
    doing: str, repo: str, token: str | bool | None, kind: type[PhatgooseError] = DownloadError
) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one error that says what to do, and has no access token in it.

    Args:
        doing: what was tried, as in "fetch org/name".

    Raises:
        `kind`; StorageError: no space or permission to keep what is fetched.
    """
    try:
        with storage_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            yield
    except PhatgooseError:
        raise
    except Exception as error:  # huggingface_hub's errors and its HTTP library's have no common type
        secrets = [s for s in (token, huggingface_hub.get_token()) if isinstance(s, str) and s]
        said = explain(error, repo, "repository") or f"{type(error).__name__}: {error}"
        text = hide_tokens(f"can't {doing}: {said}", secrets)
        # The Hub's own error stays attached, unless a token is in it.
        raise kind(text[:1000]) from (None if _leaks(error, secrets) else error)


def _leaks(error: BaseException | None, secrets: Sequence[str]) -> bool:
    """Whether a token is in an error, or in one that would be printed with it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        text = " ".join(str(error).split())
        if hide_tokens(text, secrets) != text:
            return True
        error = error.__cause__ or error.__context__
    return False
