"""Whatever huggingface_hub raises while experts are fetched or published, as one error of ours."""

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

    Raises:
        `kind`; StorageError: no space or permission to keep what is fetched.
    """
    try:
        with storage_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            yield
    except PhatgooseError:
        raise
    except (
        Exception
    ) as error:  # its own errors, its HTTP library's, ValueError, RuntimeError: they have no common type
        secrets = [s for s in (token, huggingface_hub.get_token()) if isinstance(s, str) and s]
        said = explain(error, repo, "repository") or f"{type(error).__name__}: {error}"
        text = hide_tokens(f"can't {doing}: {said}", secrets)
        # What the Hub answered stays attached for whoever wants it, unless a token is in there.
        raise kind(text[:1000]) from (None if _leaks(error, secrets) else error)


def _leaks(error: BaseException | None, secrets: Sequence[str]) -> bool:
    """Whether a token is in an error, or in one that would be printed with it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if _leaks_itself(error, secrets):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leaks_itself(error: BaseException, secrets: Sequence[str]) -> bool:
    text = " ".join(str(error).split())
    return hide_tokens(text, secrets) != text
