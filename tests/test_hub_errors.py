"""What the Hub's errors are said as, and that no token is ever in it."""

from __future__ import annotations

import types

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phatgoose.hub_errors import explain, hide_tokens


def http_error(kind, code=None):
    """The Hub's error without the response object of its HTTP library, which changes between versions."""
    error = kind.__new__(kind)
    error.args = ("said by the Hub",)
    if code is not None:
        error.response = types.SimpleNamespace(status_code=code)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(GatedRepoError, 403), ["the pool is gated", "/org/name", "hf auth login"]),
        (
            http_error(RepositoryNotFoundError, 404),
            ["no such pool on the Hub, or it is private", "Or a folder?"],
        ),
        (http_error(RevisionNotFoundError, 404), ["no such revision", "/org/name/tree/main"]),
        (HFValidationError("x"), ["not a Hub id", "Or a folder?"]),
        (http_error(HfHubHTTPError, 401), ["doesn't accept the access token (401)"]),
        (http_error(HfHubHTTPError, 403), ["no permission for this (403)"]),
        (http_error(HfHubHTTPError, 412), ["was changed meanwhile"]),
        (http_error(HfHubHTTPError, 429), ["too often (429)"]),
        (http_error(HfHubHTTPError, 502), ["the Hub failed (502)"]),
        (OfflineModeIsEnabled("x"), ["isn't in the Hub cache", "HF_HUB_OFFLINE"]),
        (LocalEntryNotFoundError("x"), ["HF_HUB_OFFLINE"]),
        (TimeoutError("x"), ["HF_HUB_OFFLINE"]),
    ],
)
def test_every_kind_of_answer(error, words):
    text = explain(error, "org/name", "pool", "Or a folder?")
    assert all(word in text for word in words), text
    assert text == text.strip()


def test_what_the_hub_answered_goes_before_that_it_is_not_in_the_cache():
    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = http_error(HfHubHTTPError, 503)
    assert "the Hub failed (503)" in explain(error, "org/name")


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), http_error(RemoteEntryNotFoundError, 404)])
def test_other_errors_are_left_to_the_caller(error):
    assert explain(error, "org/name") is None


def test_an_answer_is_not_taken_for_a_lack_of_network():
    """huggingface_hub raises its errors from its HTTP library's."""
    raw = type("HTTPStatusError", (Exception,), {"__module__": "httpx"})("404")
    raw.response = types.SimpleNamespace(status_code=404)
    error = http_error(RemoteEntryNotFoundError, 404)
    error.__cause__ = raw
    assert explain(error, "org/name") is None


def test_tokens_are_hidden():
    text = "a hf_abcdefghijklmnop b\nhf_oauth_eyJ.x-y_z c Bearer abc.def d my-secret e hf_hub_download"
    hidden = hide_tokens(text, ["my-secret"])
    assert hidden == "a hf_… b hf_… c Bearer hf_… d hf_… e hf_hub_download"
