"""The commands that speak with the Hub, against a stand-in."""

from __future__ import annotations

import shutil

import pytest

from conftest import files_of
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool

pytest_plugins = ["cli_fixtures", "hub_stand_in"]


@pytest.fixture
def two(made, tmp_path, monkeypatch):
    """The folders of two experts, in the working folder."""

    def build(make_base, make_expert):
        base = make_base("llama")
        for i, name in enumerate(("one", "two")):
            make_expert(base, name, rank=2, seed=i).save(tmp_path / "new" / name)
        return tmp_path / "new"

    folder = made("here", build)
    monkeypatch.chdir(folder)
    return folder


def ok(result):
    assert result.code == 0, result.err
    return result


def refused(result, *words):
    assert result.code == 1, (result.out, result.err)
    assert result.err.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.err, result.err
    assert "Traceback" not in result.err


def test_publish_one_add_it_publish_the_pool_and_fetch_it(run, login, two, tmp_path):
    pushed = ok(run("push", "one", "org/one", "--private", "--message", "first"))
    head = login.repos["org/one"].head
    assert f"org/one@{head}: one, gates: yes" in pushed.out
    assert f"phatgoose pool add POOL org/one@{head}" in pushed.out
    assert login.repos["org/one"].private
    made = ok(run("pool", "create", tmp_path / "pool", "org/one", "./two"))
    assert "one, two" in made.out
    assert "no folder org/one here: fetching it from the Hub" in made.err
    listed = ok(run("pool", "list", tmp_path / "pool")).out.splitlines()
    assert listed[0].endswith("from the Hub")
    assert listed[1].endswith(f"org/one@{head}")
    assert listed[2].endswith("-")
    done = ok(run("pool", "push", tmp_path / "pool", "org/pool", "--branch", "v1"))
    assert f"phatgoose pool pull org/pool@{login.repos['org/pool'].branches['v1']} POOL" in done.out
    ok(run("pool", "pull", "org/pool@v1", tmp_path / "pulled"))
    assert files_of(tmp_path / "pulled") == files_of(tmp_path / "pool")
    ok(run("pool", "verify", tmp_path / "pulled"))
    assert f"org/one@{head}" in ok(run("pool", "list", tmp_path / "pulled")).out
    assert login.token not in "".join(r.out + r.err for r in (pushed, made, done))


def test_add_by_revision_folder_and_name(run, login, two, tmp_path):
    ok(run("pool", "create", tmp_path / "pool", "one", "two"))
    ok(run("pool", "push", tmp_path / "pool", "org/pool"))
    head = login.repos["org/pool"].head
    ok(run("pool", "create", tmp_path / "mine", f"org/pool@{head}:experts/two"))
    ok(run("pool", "add", tmp_path / "mine", "org/pool@main:experts/one", "--name", "uno"))
    assert [str(e.origin) for e in Pool.load(tmp_path / "mine").experts] == [
        f"org/pool@{head}:experts/two",
        f"org/pool@{head}:experts/one",
    ]
    refused(run("pool", "add", tmp_path / "mine", "org/pool:experts/two"), "'two'")
    assert Pool.load(tmp_path / "mine").names == ("two", "uno")


def test_a_folder_goes_before_a_repository_of_its_name(run, login, two, tmp_path):
    shutil.copytree("one", "org/one")
    ok(run("pool", "create", tmp_path / "pool", "org/one"))
    assert Pool.load(tmp_path / "pool")["one"].origin is None
    assert login.requests == []


def test_what_is_neither_is_said(run, hub, two, tmp_path):
    refused(
        run("pool", "create", tmp_path / "pool", "experts/oen"),
        "no such repository on the Hub",
        "no folder experts/oen here",
    )
    hub.requests.clear()
    refused(run("pool", "create", tmp_path / "pool", "oen"), "oen is not a folder")
    refused(run("pool", "create", tmp_path / "pool", "./experts/oen"), "is not a folder")
    refused(run("pool", "pull", "oen", tmp_path / "pool"), "is not a Hub id")
    assert hub.requests == []
    assert not (tmp_path / "pool").exists()


def test_sizes_and_droppings(run, login, two, tmp_path):
    ok(run("push", "one", "org/one"))
    refused(run("pool", "create", tmp_path / "pool", "org/one", "--max-gb", "0.000001"), "--max-gb")
    refused(run("pool", "create", tmp_path / "pool", "org/one", "--drop", "everything"), "everything")
    ok(run("pool", "create", tmp_path / "pool", "org/one", "--drop", "modules_to_save"))
    assert Pool.load(tmp_path / "pool")["one"].provenance["dropped"] == ["modules_to_save"]


def test_nothing_damaged_is_published(run, login, two, tmp_path):
    ok(run("pool", "create", tmp_path / "pool", "one"))
    weights = tmp_path / "pool" / "experts" / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(run("pool", "push", tmp_path / "pool", "org/pool"), str(weights))
    refused(run("push", weights.parent, "org/one"), str(weights))
    assert login.requests == []


def test_pulling_over_something(run, login, two, tmp_path):
    ok(run("pool", "create", tmp_path / "pool", "one"))
    ok(run("pool", "push", tmp_path / "pool", "org/pool"))
    ok(run("pool", "add", tmp_path / "pool", "two"))
    refused(run("pool", "pull", "org/pool", tmp_path / "pool"), "--overwrite")
    ok(run("pool", "pull", "org/pool", tmp_path / "pool", "--overwrite"))
    assert Pool.load(tmp_path / "pool").names == ("one",)
    refused(run("pool", "pull", "org/pool", two, "--overwrite"), "something else")
    assert Expert.load(two / "one").name == "one"


def test_without_login_or_network(run, hub, two, tmp_path, monkeypatch):
    refused(run("push", "one", "org/one"), "can't publish org/one", "hf auth login")
    hub.add("org/one", two / "one", private=True)
    refused(run("pool", "create", tmp_path / "pool", "org/one"), "private", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    ok(run("pool", "create", tmp_path / "pool", "org/one"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ok(run("pool", "create", tmp_path / "again", "org/one"))
    refused(run("pool", "pull", "org/pool", tmp_path / "x"), "HF_HUB_OFFLINE")
    refused(run("push", "one", "org/one"), "HF_HUB_OFFLINE")


def test_a_local_base_is_not_published_unasked(run, login, ready, tmp_path):
    """What the commands train on a base in a folder records its path."""
    folder, _ = ready
    refused(run("push", folder / "one", "org/one"), "local path", "--allow-paths")
    refused(run("pool", "push", folder / "pool", "org/pool"), "local path", "--allow-paths")
    assert login.requests == []
    ok(run("push", folder / "one", "org/one", "--allow-paths"))
    card = login.repos["org/one"].commits[login.repos["org/one"].head]["README.md"].decode()
    assert str(folder) not in card
    assert "/tmp" not in card
