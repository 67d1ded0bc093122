"""Experts and pools from and to the Hub, through huggingface_hub itself, against a stand-in with faults."""

from __future__ import annotations

import pytest

from phatgoose import Expert
from phatgoose.records import HubSource

pytest_plugins = ["hub_stand_in"]


@pytest.fixture
def one(make_base, make_expert, tmp_path):
    """(an expert with gates, its folder)"""
    expert = make_expert(make_base("llama"), "one", rank=3)
    return expert, expert.save(tmp_path / "one")


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_from_hub_is_the_expert_pinned_to_its_commit(hub, one):
    expert, folder = one
    repo = hub.add("org/adapter", folder)
    found = Expert.from_hub("org/adapter")
    assert found.hash == expert.hash
    assert found.equals(expert)
    assert found.origin == HubSource("org/adapter", repo.head, "")
    assert str(found.origin) == f"org/adapter@{repo.head}"
