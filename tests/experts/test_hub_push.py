"""Publishing experts and pools, through huggingface_hub itself, to a stand-in with faults."""

from __future__ import annotations

import json
import traceback

import pytest
import torch

from conftest import files_of
from encoder_fixtures import make_encoder, signed
from phatgoose import Expert, Pool
from phatgoose.errors import PoolError, UploadError
from phatgoose.experts.card.card import MARK
from phatgoose.experts.hub.push import PushOptions
from phatgoose.experts.names import SIGNATURE_FILE
from phatgoose.experts.pool_folder import add_to_folder, push_folder, remove_from_folder
from phatgoose.files import read_json, write_json

pytest_plugins = ["hub_stand_in"]


@pytest.fixture
def pool(made, tmp_path):
    """The folder of a pool of a, with gates, and b, without."""

    def build(make_base, make_expert):
        base = make_base("llama")
        experts = [make_expert(base, n, rank=r, seed=r, gates=n == "a") for n, r in (("a", 2), ("b", 3))]
        return Pool(experts).save(tmp_path / "new")

    return made("two", build)


def there(hub, name, branch="main"):
    repo = hub.repos[name]
    return {n: d for n, d in repo.commits[repo.branches[branch]].items() if n != ".gitattributes"}


def refused(*words, call, kind=UploadError):
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def test_a_pool_that_is_pushed_and_pulled_is_the_same_to_the_byte(login, pool, tmp_path):
    done = push_folder(pool, "org/pool")
    assert there(login, "org/pool") == files_of(pool)
    assert done.revision == login.repos["org/pool"].head
    assert done.repo == "org/pool"
    Pool.pull(str(done), tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(pool)
    expected, found = Pool.load(pool), Pool.load(tmp_path / "pulled")
    assert [e.hash for e in found.experts] == [e.hash for e in expected.experts]


def test_a_pool_in_memory_is_pushed_as_it_would_be_saved(login, pool):
    loaded = Pool.load(pool)
    done = loaded.push("org/pool", message="the second")
    assert there(login, "org/pool") == files_of(pool)
    found = Pool.pull(str(done))
    assert [e.hash for e in found.experts] == [e.hash for e in loaded.experts]


def test_an_expert_is_pushed_and_fetched(login, pool):
    expert = Pool.load(pool)["a"]
    done = expert.push("org/expert", private=True)
    assert login.repos["org/expert"].private
    assert set(there(login, "org/expert")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "gates.safetensors",
        "expert.json",
        "README.md",
    }
    found = Expert.pull("org/expert")
    assert found.equals(expert)
    assert found.hash == expert.hash
    assert found.origin == done


def test_a_data_signature_goes_along(login, make_base, make_expert, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    base = make_base("llama")
    experts = [signed(make_expert(base, n, seed=i), encoder, seed=i) for i, n in enumerate("ab")]
    experts[0].push("org/expert")
    assert SIGNATURE_FILE in there(login, "org/expert")
    assert Expert.pull("org/expert").equals(experts[0])
    Pool(experts).push("org/pool")
    found = Pool.pull("org/pool")
    assert [e.signature.hash for e in found.experts] == [e.signature.hash for e in experts]
    assert torch.equal(found["b"].signature.texts, experts[1].signature.texts)


def test_an_expert_goes_into_a_folder_of_a_repository(login, pool):
    loaded = Pool.load(pool)
    for expert in loaded.experts:
        expert.push("org/experts", subfolder=f"mine/{expert.name}")
    for expert in loaded.experts:
        assert Expert.pull(f"org/experts:mine/{expert.name}").equals(expert)


def test_one_commit_makes_the_repository_the_new_pool(login, pool, make_expert, make_base):
    push_folder(pool, "org/pool")
    repo = login.repos["org/pool"]
    login.add("org/pool", files={**repo.commits[repo.head], "LICENSE": b"mine", "notes/plan.md": b"x"})
    before = len(repo.commits)
    remove_from_folder(pool, "a")
    add_to_folder(pool, make_expert(make_base("llama"), "c", rank=5, seed=9))
    push_folder(pool, "org/pool")
    assert len(repo.commits) == before + 1
    assert there(login, "org/pool") == {**files_of(pool), "LICENSE": b"mine", "notes/plan.md": b"x"}
    assert Pool.pull("org/pool").names == ("b", "c")


def test_an_expert_without_gates_replaces_one_with_gates(login, pool):
    a, b = Pool.load(pool).experts
    a.push("org/expert")
    b.push("org/expert")
    assert "gates.safetensors" not in there(login, "org/expert")
    assert Expert.pull("org/expert").equals(b)


def test_nothing_new_is_no_commit(login, pool):
    first = push_folder(pool, "org/pool")
    assert push_folder(pool, "org/pool") == first
    assert len(login.repos["org/pool"].commits) == 2  # the empty one, and ours


def test_a_branch(login, pool):
    push_folder(pool, "org/pool")
    remove_from_folder(pool, "a")
    done = push_folder(pool, "org/pool", PushOptions(revision="small"))
    assert Pool.pull("org/pool").names == ("a", "b")
    assert Pool.pull("org/pool", revision="small").names == ("b",)
    assert login.repos["org/pool"].branches["small"] == done.revision
    push_folder(pool, "org/pool", PushOptions(revision="small"))
    refused(
        "is a commit; a push needs a branch",
        call=lambda: push_folder(pool, "org/pool", PushOptions(revision="0" * 40)),
    )


def test_a_packed_pool_is_published_unpacked(login, pool, tmp_path):
    from phatgoose.experts.packed.pack import pack

    before = files_of(pool)
    pack(pool)
    done = push_folder(pool, "org/pool")
    assert there(login, "org/pool") == before
    Pool.pull(str(done), tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == before


# Cards


def test_a_card_that_somebody_wrote_on_the_hub_stays(login, pool):
    push_folder(pool, "org/pool")
    repo = login.repos["org/pool"]
    files = dict(repo.commits[repo.head])
    own = files["README.md"].replace(MARK.encode(), b"").replace(b"# A pool", b"# My pool")
    login.add("org/pool", files={**files, "README.md": own})
    remove_from_folder(pool, "a")
    push_folder(pool, "org/pool")
    assert there(login, "org/pool")["README.md"] == own
    (pool / "README.md").write_text("---\nlibrary_name: peft\n---\nmine")
    push_folder(pool, "org/pool")
    assert there(login, "org/pool")["README.md"] == (pool / "README.md").read_bytes()


def test_a_card_of_ours_follows_the_pool(login, pool):
    push_folder(pool, "org/pool")
    assert b"`a`" in there(login, "org/pool")["README.md"]
    remove_from_folder(pool, "a")
    push_folder(pool, "org/pool")
    assert b"`a`" not in there(login, "org/pool")["README.md"]


# What is refused


def test_without_a_login(hub, pool):
    refused(
        "can't publish org/pool", "access token", "hf auth login", call=lambda: push_folder(pool, "org/pool")
    )
    assert hub.repos == {}


def test_without_permission(login, pool):
    refused("no permission for this (403)", call=lambda: push_folder(pool, "foreign/pool"))
    assert not login.asked("/commit/")


def test_private_is_never_published_in_public(login, pool):
    push_folder(pool, "org/pool")
    remove_from_folder(pool, "a")
    before = there(login, "org/pool")
    refused(
        "is there already, and it is public",
        call=lambda: push_folder(pool, "org/pool", PushOptions(private=True)),
    )
    assert there(login, "org/pool") == before
    push_folder(pool, "org/secret", PushOptions(private=True))
    assert login.repos["org/secret"].private
    push_folder(pool, "org/secret", PushOptions(private=True))


def test_things_of_another_kind_are_not_replaced(login, pool):
    expert = Pool.load(pool)["a"]
    push_folder(pool, "org/pool")
    expert.push("org/expert")
    refused("org/pool is a pool", call=lambda: expert.push("org/pool"))
    refused("org/expert is an expert", call=lambda: push_folder(pool, "org/expert"))
    refused("not a Hub id", call=lambda: expert.push("expert"), kind=Exception)
    with pytest.raises(PoolError, match="empty pool"):
        for name in ("a", "b"):
            remove_from_folder(pool, name)
        push_folder(pool, "org/new")


def test_somebody_elses_push_in_between_is_not_undone(login, pool):
    push_folder(pool, "org/pool")
    repo = login.repos["org/pool"]
    remove_from_folder(pool, "a")

    def push(said):
        login.answers.pop("listing")
        login.add("org/pool", files={**repo.commits[repo.head], "new.txt": b"theirs"})

    login.answers["listing"] = push
    refused(
        "can't publish org/pool",
        "was changed meanwhile",
        "try again",
        call=lambda: push_folder(pool, "org/pool"),
    )
    assert there(login, "org/pool")["new.txt"] == b"theirs"
    assert "experts/a/expert.json" in there(login, "org/pool")
    push_folder(pool, "org/pool")
    assert "experts/a/expert.json" not in there(login, "org/pool")


@pytest.mark.parametrize(
    ("file", "change", "where"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/home/me/llama"}, "base_model_name_or_path"),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "C:\\Users\\me\\llama"},
            "base_model_name_or_path",
        ),
        ("adapter_config.json", {"base_model_name_or_path": "~/llama"}, "base_model_name_or_path"),
        (
            "expert.json",
            {"provenance": {"base": {"spec": "/home/me/My models/llama"}}},
            "provenance.base.spec",
        ),
        (
            "expert.json",
            {"provenance": {"task": {"source": {"spec": "jsonl:/data/x.jsonl"}}}},
            "task.source.spec",
        ),
    ],
)
def test_local_paths_are_not_published_unasked(login, pool, tmp_path, file, change, where):
    from phatgoose.files import sha256_file

    path = pool / "experts" / "b" / file
    write_json(path, {**read_json(path, PoolError), **change})
    manifest = read_json(pool / "pool.json", PoolError)
    manifest["experts"][1]["files"][file] = sha256_file(path)
    write_json(pool / "pool.json", manifest)
    refused(f"experts/b/{file}", where, "--allow-paths", call=lambda: push_folder(pool, "org/pool"))
    assert login.requests == []
    push_folder(pool, "org/pool", PushOptions(allow_paths=True))
    assert there(login, "org/pool")[f"experts/b/{file}"] == path.read_bytes()


@pytest.mark.parametrize(
    "text", ["https://host/x", "org/llama", "a/b/c", "./llama", "train at 3/4", "", "hf:org/x", "1: /"]
)
def test_what_is_no_path(text):
    from phatgoose.experts.hub.push import _PATH

    assert not _PATH.fullmatch(text)


# Faults


@pytest.mark.slow(8)
@pytest.mark.parametrize(
    "pattern",
    [
        "^POST /api/repos/create",
        "^GET /api/models/",
        "/preupload/",
        "/objects/batch",
        "^PUT /lfs/",
        "/commit/",
    ],
)
@pytest.mark.parametrize(("kind", "value"), [("status", 500), ("drop", None)])
def test_a_push_that_fails_leaves_what_was_there(login, pool, pattern, kind, value):
    push_folder(pool, "org/pool")
    before = there(login, "org/pool")
    expert = Pool.load(pool)["a"]
    changed = expert.with_gates({p: g * 2 + 1 for p, g in expert.gates.items()})
    Pool([changed]).save(pool)
    login.fault(pattern, kind, value)
    refused("can't publish org/pool", call=lambda: push_folder(pool, "org/pool"))
    assert there(login, "org/pool") == before
    login.faults.clear()
    push_folder(pool, "org/pool")
    assert torch.equal(
        next(iter(Pool.pull("org/pool")["a"].gates.values())), next(iter(changed.gates.values()))
    )


def test_one_failure_in_an_upload_is_got_over(login, pool):
    login.fault("^PUT /lfs/", "status", 500, times=2)
    login.fault("/preupload/", "status", 503, times=1)
    push_folder(pool, "org/pool")
    assert there(login, "org/pool") == files_of(pool)


@pytest.mark.parametrize(
    ("secret", "code"), [("hf_abcdefghijklmnopqrstuvwxyz", 400), ("my-own.secret/token", 418)]
)
@pytest.mark.parametrize(
    "pattern", ["/repos/create", "/api/models/", "/preupload/", "/objects/batch", "/lfs/", "/commit/"]
)
def test_tokens_are_in_no_error(hub, pool, monkeypatch, capfd, secret, code, pattern):
    monkeypatch.setattr("hub_stand_in.TOKEN", secret)
    body = json.dumps({"error": f"Bearer {secret} is not welcome, {secret}"}).encode()
    headers = {"X-Error-Message": f"what is {secret}?", "Content-Type": "application/json"}
    hub.fault(pattern, "say", (code, headers, body))
    error = refused(call=lambda: push_folder(pool, "org/pool", PushOptions(token=secret)))
    assert secret not in "".join(traceback.format_exception(error))
    out, err = capfd.readouterr()
    assert secret not in out + err
