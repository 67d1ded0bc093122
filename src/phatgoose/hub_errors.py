"""The Hugging Face Hub's errors in one line, with what to do, and without access tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_TOKEN = re.compile(r"hf_(?:oauth|jwt|app)_[\w.-]+|hf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")
_LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"
_ANSWERS = {
    401: "the Hub doesn't accept the access token (401). Get one at {tokens}, then {login}.",
    403: "the account that is logged in has no permission for this (403): {login} with a token that has.",
    412: "the repository was changed meanwhile: look at what is there now, and try again.",
    429: "the Hub was asked too often (429): wait a few minutes and try again.",
}
"""By HTTP status."""


def hide_tokens(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` on one line, without access tokens: those in `secrets`, and whatever looks like one."""
    for secret in secrets:
        text = text.replace(secret, "hf_…")
    return _TOKEN.sub("hf_…", " ".join(text.split()))


def explain(error: BaseException, repository: str, what: str = "model", tried: str = "") -> str | None:
    """The cause of `error` and what to do, or None if it isn't about the Hub.

    Args:
        repository: its id on the Hub, "organisation/name".
        what: what was looked for, as a noun: "model", "repository".
        tried: another sentence, where the name may have meant something else.
    """
    errors = list(chain(error))
    page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
    if any(isinstance(e, GatedRepoError) for e in errors):
        return f"the {what} is gated. Ask for access at {page}, then {_LOGIN}."
    if any(isinstance(e, RepositoryNotFoundError) for e in errors):
        return f"there is no such {what} on the Hub, or it is private: then {_LOGIN}. {tried}".strip()
    if any(isinstance(e, RevisionNotFoundError) for e in errors):
        return f"the {what} has no such revision; see {page}/tree/main for its branches."
    if any(isinstance(e, HFValidationError) for e in errors):
        return f'this is not a Hub id ("organisation/name"). {tried}'.strip()
    if answer := _answer(errors):
        return answer
    if any(isinstance(e, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or is_network(e) for e in errors):
        return f"{why_offline(what)} {tried}".strip()
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its stated causes; not its context, where an optional file that wasn't found may linger."""
    while error is not None:
        yield error
        error = error.__cause__


def is_network(error: BaseException) -> bool:
    """Whether the Hub couldn't be reached or stopped answering. An answer of the Hub is none of these."""
    if getattr(error, "response", None) is not None:
        return False
    module = type(error).__module__.partition(".")[0]
    named = isinstance(error, (ConnectionError, TimeoutError)) or module.startswith(
        ("httpx", "httpcore", "requests")
    )
    return named and not isinstance(error, HfHubHTTPError)


def status(error: BaseException) -> int | None:
    """The HTTP status in an answer of the Hub."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def is_offline() -> bool:
    """Whether the user has forbidden requests to the Hub."""
    variable = os.environ.get("TRANSFORMERS_OFFLINE")
    return huggingface_hub.constants.HF_HUB_OFFLINE or variable in ("1", "true", "True")


def why_offline(what: str = "model") -> str:
    if is_offline():
        why = "it isn't in the Hub cache, and HF_HUB_OFFLINE is set"
        return f"{why}: unset it, or fetch the {what} where there is a network."
    return (
        "the Hub can't be reached, or a transfer broke off, and the files aren't in its cache: check the network, or "
        "load a local folder."
    )


def look_up(repository: str, revision: str | None, file: str) -> None:
    """Asks the Hub, once, for a repository of which `file` isn't in the cache; returns at once if it is.

    transformers asks six times for each file of a model, which is half a minute where there is no network or
    the name is mistyped.

    Raises:
        Exception: whatever huggingface_hub raises if it isn't there or can't be reached; `explain` puts it into words.
    """
    if is_offline() or isinstance(
        huggingface_hub.try_to_load_from_cache(repository, file, revision=revision), str
    ):
        return
    huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=10)


def _answer(errors: list[BaseException]) -> str | None:
    """The cause, if the Hub has refused."""
    code = next((s for e in errors if isinstance(e, HfHubHTTPError) and (s := status(e))), 0)
    if code >= 500:
        return f"the Hub failed ({code}): try again later."
    text = _ANSWERS.get(code)
    return text and text.format(tokens=f"{huggingface_hub.constants.ENDPOINT}/settings/tokens", login=_LOGIN)
