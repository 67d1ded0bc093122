"""What names something on the Hub."""

from __future__ import annotations

import pytest

from phatgoose.errors import DownloadError
from phatgoose.experts.hub.place import Place, is_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", Place("org/name")),
        ("org/name@v1", Place("org/name", "v1")),
        ("org/name@refs/pr/3", Place("org/name", "refs/pr/3")),
        ("org/name:experts/a b", Place("org/name", None, "experts/a b")),
        ("0rg_-./n.a-m_e@x:y", Place("0rg_-./n.a-m_e", "x", "y")),
    ],
)
def test_places(text, place):
    assert Place.parse(text) == place
    assert str(place) == text
    assert is_place(text)


def test_revision_and_subfolder_may_be_given_apart():
    assert Place.parse("org/name", "v1", "a/b") == Place.parse("org/name@v1:a/b")
    assert Place.parse("org/name@v1", "v1") == Place("org/name", "v1")
    for text, options in (("org/name@v1", {"revision": "v2"}), ("org/name:a", {"subfolder": "b"})):
        with pytest.raises(DownloadError, match=r"two (revisions|subfolders)"):
            Place.parse(text, **options)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "",
        "a/b/c",
        "/a/b",
        "./a/b",
        "~/a",
        "../a",
        "a b/c",
        "org/é",
        "org/name@",
        "org/name:",
        "-a/b",
        "C:/x",
    ],
)
def test_what_is_no_place(text):
    assert not is_place(text)
    with pytest.raises(DownloadError, match="is not a Hub id"):
        Place.parse(text)


@pytest.mark.parametrize("folder", ["..", "a/../b", "/a", "a/", "a//b", ".", "a\\b", "a\nb", "\x1b[0m"])
def test_folders_stay_inside(folder):
    with pytest.raises(DownloadError, match="is not a folder inside a repository"):
        Place.parse("org/name", subfolder=folder)


def test_only_a_whole_sha_is_a_commit():
    assert Place("a/b", "0" * 40).commit == "0" * 40
    assert Place("a/b", "0" * 39).commit is None
    assert Place("a/b", "main").commit is None
    assert Place("a/b").commit is None
    assert Place("a/b").path("x") == "x"
    assert Place("a/b", None, "c/d").path("x") == "c/d/x"
