"""Experts and pools from the Hub, through huggingface_hub itself, against a stand-in with faults."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import files_of
from phatgoose import Expert, Pool
from phatgoose.errors import DownloadError, ExpertError, PoolError
from phatgoose.experts.hub import fetch as hub_files
from phatgoose.files import read_json, write_json
from phatgoose.records import HubSource

pytest_plugins = ["hub_stand_in"]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def one(made, tmp_path):
    """(an expert with gates, its folder)"""
    folder = made("one", lambda base, expert: expert(base("llama"), "one", rank=3).save(tmp_path / "new"))
    return Expert.load(folder), folder


@pytest.fixture
def plain(made):
    """The folder of an adapter as PEFT's save_pretrained leaves it."""
    return made("plain", lambda base, expert: expert(base("llama"), "plain", gates=False).folder)


@pytest.fixture
def three(made, tmp_path):
    """The folder of a pool of a, b and c; c has no gates."""

    def build(make_base, make_expert):
        base = make_base("llama")
        ranks = {"a": 2, "b": 3, "c": 4}
        experts = [make_expert(base, n, rank=r, seed=r, gates=n != "c") for n, r in ranks.items()]
        return Pool(experts).save(tmp_path / "new")

    return made("three", build)


def refused(*words, call=lambda: Expert.pull("org/adapter"), kind=DownloadError):
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# What is fetched


def test_a_pulled_expert_is_pinned_to_its_commit(hub, one):
    expert, folder = one
    repo = hub.add("org/adapter", folder)
    found = Expert.pull("org/adapter")
    assert found.hash == expert.hash
    assert found.equals(expert)
    assert found.origin == HubSource("org/adapter", repo.head, "")
    assert str(found.origin) == f"org/adapter@{repo.head}"
    assert found.renamed("two").origin == found.origin
    assert found.with_gates(found.gates).origin == found.origin


def test_from_hub_is_pull_under_its_old_name(hub, one):
    hub.add("org/adapter", one[1])
    with pytest.warns(DeprecationWarning, match=r"Expert\.pull"):
        found = Expert.from_hub("org/adapter", name="two")
    assert found.name == "two"
    assert found.hash == one[0].hash


def test_a_revision_stays_what_it_was(hub, one, plain):
    expert, folder = one
    repo = hub.add("org/adapter", folder)
    old = repo.head
    repo.branches["v1"] = old
    hub.add("org/adapter", plain)
    assert repo.head != old
    for text, revision in (("org/adapter", old), (f"org/adapter@{old}", None), ("org/adapter@v1", None)):
        found = Expert.pull(text, revision=revision)
        assert found.hash == expert.hash
        assert found.origin.revision == old
    newest = Expert.pull("org/adapter")
    assert newest.gates is None
    assert newest.origin.revision == repo.head


def test_a_plain_adapter_is_called_after_its_repository(hub, plain):
    hub.add("org/my-lora.v2", plain)
    found = Expert.pull("org/my-lora.v2")
    assert found.name == "my-lora.v2"
    assert found.gates is None
    assert Expert.pull("org/my-lora.v2", name="other").name == "other"


def test_an_expert_of_a_pool_is_fetched_by_its_folder(hub, three):
    repo = hub.add("org/pool", three)
    expected = Pool.load(three)["b"]
    for found in (
        Expert.pull("org/pool", subfolder="experts/b"),
        Expert.pull("org/pool@main:experts/b"),
    ):
        assert found.equals(expected)
        assert found.origin == HubSource("org/pool", repo.head, "experts/b")
        assert str(found.origin) == f"org/pool@{repo.head}:experts/b"
    assert not hub.asked("experts/a")
    assert not hub.asked("resolve.*pool.json")


def test_only_an_experts_own_files_are_fetched(hub, one):
    _, folder = one
    others = {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04.",
        "../../escaped.txt": b"x",
        "/etc/absolute": b"x",
        "training_args.bin": b"\x80\x04.",
    }
    hub.add("org/adapter", folder, others)
    Expert.pull("org/adapter")
    fetched = {path.rpartition("/")[2] for path in hub.asked("^GET.*/resolve/")}
    assert fetched <= {"adapter_config.json", WEIGHTS, "gates.safetensors", "expert.json", "README.md"}
    assert len(fetched) == 5
    assert not hub.asked("xet")


def test_an_adapterhub_adapter(hub, tmp_path, monkeypatch):
    """Its weights have a name of their own, and a head that lies beside them is neither fetched nor passed over."""
    folder = tmp_path / "bottleneck"
    folder.mkdir()
    source = Path(__file__).parents[1] / "data" / "adapterhub"
    found = sorted(p.parent for p in source.rglob("adapter_config.json"))
    if not found:
        pytest.skip("no fixture in AdapterHub's format")
    shutil.copytree(found[0], folder, dirs_exist_ok=True)
    expected = Expert.load(folder)
    files = files_of(folder)
    hub.add("org/bottleneck", files=files)
    assert Expert.pull("org/bottleneck", name=expected.name).hash == expected.hash
    head = hub.repos["org/bottleneck"].head
    offline(monkeypatch)
    assert Expert.pull("org/bottleneck", revision=head).hash == expected.hash
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.add("org/bottleneck", files={**files, "pytorch_model_head.bin": b"\x80\x04."})
    refused("prediction head", "--drop", call=lambda: Expert.pull("org/bottleneck"), kind=ExpertError)
    dropped = Expert.pull("org/bottleneck", drop=("prediction_head",))
    assert dropped.tensors.keys() == expected.tensors.keys()
    assert not hub.asked("^GET .*pytorch_model_head.bin")


def test_credentials_do_not_go_to_the_cdn(hub, one):
    hub.add("org/adapter", one[1], private=True)
    Expert.pull("org/adapter", token=hub.token)
    cdn = [token for _, path, token in hub.requests if path.startswith("/lfs/")]
    assert cdn
    assert not any(cdn)
    assert all(token for _, path, token in hub.requests if not path.startswith("/lfs/"))


@pytest.mark.slow(4)
def test_plain_peft_loads_it_from_the_hub_too(hub, one, make_base, tmp_path):
    """In a process of its own, with the environment that a user sets."""
    expert, folder = one
    hub.add("org/adapter", folder)
    make_base("llama").model.save_pretrained(tmp_path / "base")
    code = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
from phatgoose import Expert

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), "org/adapter")
expert = Expert.pull("org/adapter")
for path, update in expert.updates.items():
    delta = model.get_base_model().get_submodule(path).get_delta_weight("default")
    assert (update.weight() - delta).abs().max() < 1e-6
print(expert.hash, expert.origin)
"""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expert.hash, f"org/adapter@{hub.repos['org/adapter'].head}"]


# Without a network


def test_what_was_fetched_needs_no_network(hub, one, monkeypatch):
    expert, folder = one
    head = hub.add("org/adapter", folder).head
    Expert.pull("org/adapter")
    hub.requests.clear()
    assert Expert.pull("org/adapter", revision=head).equals(expert)  # a commit is what it is
    offline(monkeypatch)
    found = Expert.pull("org/adapter")
    assert found.equals(expert)
    assert found.origin.revision == head
    assert hub.requests == []


def test_tokenizer_files_beside_an_adapter_are_looked_at(hub, plain, monkeypatch):
    """The small ones are fetched, once; a whole tokenizer isn't."""
    files = {"chat_template.jinja": b"{{ messages }}", "tokenizer.json": b"x" * 2**20}
    hub.add("org/adapter", plain, files=files)
    with pytest.warns(UserWarning, match="brings tokenizer files"):
        found = Expert.pull("org/adapter")
    assert found.provenance["tokenizer"]["files"] == ["chat_template.jinja"]
    assert not hub.asked("tokenizer.json")
    hub.requests.clear()
    offline(monkeypatch)
    with pytest.warns(UserWarning, match="brings tokenizer files"):
        assert Expert.pull("org/adapter").provenance == found.provenance
    assert hub.requests == []


def test_a_plain_adapter_without_a_network(hub, plain, monkeypatch):
    hub.add("org/adapter", plain)
    Expert.pull("org/adapter")
    offline(monkeypatch)
    assert Expert.pull("org/adapter").gates is None


def test_what_was_not_fetched_is_said(hub, one, monkeypatch):
    hub.add("org/adapter", one[1])
    offline(monkeypatch)
    refused("adapter_config.json isn't in the Hub cache", "HF_HUB_OFFLINE is set")
    refused("pool.json isn't in the Hub cache", call=lambda: Pool.pull("org/adapter"))
    refused("adapter_config.json", call=lambda: Expert.pull("org/adapter@" + "0" * 40))
    assert hub.requests == []


def test_a_cache_that_does_not_know_whether_there_are_gates_is_not_trusted(hub, one, monkeypatch):
    """Plain PEFT fetches the two files it knows: the rest must not count as missing."""
    from huggingface_hub import hf_hub_download

    hub.add("org/adapter", one[1])
    for name in ("adapter_config.json", WEIGHTS):
        hf_hub_download("org/adapter", name)
    offline(monkeypatch)
    refused("gates.safetensors isn't in the Hub cache")
    monkeypatch.undo()


def test_a_branch_is_not_looked_up_in_the_cache_unasked(hub, one):
    head = hub.add("org/adapter", one[1]).head
    Expert.pull("org/adapter")
    hub.stop()
    refused("the Hub can't be reached", "check the network")
    assert Expert.pull("org/adapter", revision=head).gates is not None


def test_damage_in_the_cache_is_found_and_mended(hub, one, tmp_path):
    expert, folder = one
    head = hub.add("org/adapter", folder).head
    Expert.pull("org/adapter")
    for name in (WEIGHTS, "adapter_config.json"):
        blob = next((tmp_path / "hub-cache").rglob(f"snapshots/*/{name}")).resolve()
        data = bytearray(blob.read_bytes())
        data[-3] ^= 1
        blob.unlink()
        blob.write_bytes(data)
        refused(
            name,
            "is not the file that the Hub lists",
            call=lambda: Expert.pull("org/adapter", revision=head),
        )
        assert Expert.pull("org/adapter", revision=head).equals(expert)


# What is refused


def test_what_is_not_there(hub, one, three):
    refused("no such repository on the Hub, or it is private", "hf auth login")
    hub.add("org/adapter", one[1])
    refused("no such revision", "/org/adapter/tree/main", call=lambda: Expert.pull("org/adapter@v9"))
    hub.add("org/pool", three)
    refused("is a pool, not an expert", "Pool.pull", ":experts/a", call=lambda: Expert.pull("org/pool"))
    refused("is no pool", "It is an expert", call=lambda: Pool.pull("org/adapter"))
    refused("is no adapter", call=lambda: Expert.pull("org/pool:experts/x"))
    hub.add("org/model", files={"config.json": b"{}", "model.safetensors": b"x"})
    refused("is a model, not an adapter", call=lambda: Expert.pull("org/model"))
    assert not hub.asked("^GET.*/resolve/")


def test_pickles_are_not_fetched(hub, plain):
    files = {
        "adapter_config.json": (plain / "adapter_config.json").read_bytes(),
        "adapter_model.bin": b"\x80\x04.",
    }
    hub.add("org/adapter", files=files)
    refused("adapter_model.bin, a pickle, which is refused")
    assert not hub.asked("adapter_model.bin")


def test_access(hub, one):
    hub.add("org/adapter", one[1], private=True)
    refused("no such repository on the Hub, or it is private", "hf auth login")
    assert Expert.pull("org/adapter", token=hub.token).gates is not None
    refused(
        "doesn't accept the access token (401)",
        call=lambda: Expert.pull("org/adapter", token="hf_wrongwrong"),
    )
    hub.add("org/gated", one[1], gated=True)
    refused("is gated", "Ask for access at", "/org/gated", call=lambda: Expert.pull("org/gated"))


def test_the_token_of_the_environment_is_used(hub, one, monkeypatch):
    hub.add("org/adapter", one[1], private=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert Expert.pull("org/adapter").name == "one"


@pytest.mark.parametrize(
    "name", [WEIGHTS, "gates.safetensors", "adapter_config.json", "expert.json", "README.md"]
)
def test_sizes_are_checked_before_anything_is_fetched(hub, one, name):
    hub.add("org/adapter", one[1])
    size = 5 * 2**30 if name.endswith("safetensors") else 65 * 2**20

    def lie(said):
        entry = next(s for s in said["siblings"] if s["rfilename"] == name)
        entry["size"] = size
        if "lfs" in entry:
            entry["lfs"]["size"] = size

    hub.answers["listing"] = lie
    refused(name, f"{size:,} bytes", "max_bytes")
    assert not hub.asked(f"/resolve/.*/{name}")
    assert not hub.asked("/lfs/")


def test_a_limit_of_ones_own(hub, one):
    hub.add("org/adapter", one[1])
    limit = (one[1] / "adapter_model.safetensors").stat().st_size
    small = {
        n: d
        for n, d in hub.repos["org/adapter"].commits[hub.repos["org/adapter"].head].items()
        if len(d) < limit
    }
    assert "adapter_config.json" in small
    refused(
        WEIGHTS,
        f"at most {limit - 1:,} are",
        call=lambda: Expert.pull("org/adapter", max_bytes=limit - 1),
    )
    assert not hub.asked("/lfs/")
    assert Expert.pull("org/adapter", max_bytes=limit).name == "one"


# Faults


@pytest.mark.parametrize("name", [WEIGHTS, "gates.safetensors", "adapter_config.json", "expert.json"])
def test_a_wrong_hash_is_refused_by_name_and_not_kept(hub, one, name, tmp_path):
    expert, folder = one
    hub.add("org/adapter", folder)
    data = (folder / name).read_bytes()
    where = f"/lfs/{sha256(data).hexdigest()}" if name.endswith("safetensors") else f"/{name}"
    hub.fault(f"^GET .*{where}$", "corrupt", times=1)
    error = refused(name, "is not the file that the Hub lists", "expected", "found", "not kept")
    assert ("sha256" if name.endswith("safetensors") else "git's sha1") in str(error)
    assert not list((tmp_path / "hub-cache").rglob(f"snapshots/*/{name}"))
    assert Expert.pull("org/adapter").equals(expert)


def test_a_hash_in_the_headers_that_is_not_the_listings(hub, one):
    hub.add("org/adapter", one[1])

    def lie(path, headers):
        if path == WEIGHTS:
            headers["X-Linked-Etag"] = f'"{"0" * 64}"'

    hub.answers["headers"] = lie
    refused(WEIGHTS, "is not the file that the Hub lists", "0" * 64)


def test_a_listing_without_hashes_is_not_enough(hub, one):
    hub.add("org/adapter", one[1])
    hub.answers["listing"] = lambda said: [s.pop("blobId") for s in said["siblings"]]
    refused("lists no hash of adapter_config.json")


def test_a_repository_that_changes_meanwhile(hub, one, plain):
    repo = hub.add("org/adapter", one[1])

    def push(said):
        hub.add("org/adapter", plain)

    hub.answers["listing"] = push
    refused("was changed while it was being fetched")
    assert len(repo.commits) == 2


@pytest.mark.parametrize("code", [500, 503])
def test_one_failure_of_the_hub_is_got_over(hub, one, code):
    expert, folder = one
    hub.add("org/adapter", folder)
    hub.fault("^GET /api/models/", "status", code, times=1)
    hub.fault(f"^HEAD .*{WEIGHTS}", "status", code, times=2)
    assert Expert.pull("org/adapter").equals(expert)


@pytest.mark.parametrize(
    "pattern", ["^GET /api/models/", "^HEAD .*/resolve/", "^GET /lfs/", "^GET .*/resolve/"]
)
def test_a_hub_that_fails_always(hub, one, pattern, tmp_path):
    hub.add("org/adapter", one[1])
    hub.fault(pattern, "status", 500)
    refused("can't fetch org/adapter", "the Hub failed (500)", "try again later")
    assert len(hub.requests) < 60
    assert not list((tmp_path / "hub-cache").rglob("*.incomplete"))


@pytest.mark.slow(3)
@pytest.mark.parametrize("pattern", ["^GET /api/models/", "^HEAD .*/resolve/", "^GET /lfs/"])
@pytest.mark.parametrize(("kind", "value"), [("slow", 0.6), ("drop", None)])
def test_a_hub_that_does_not_answer(hub, one, pattern, kind, value):
    hub.add("org/adapter", one[1])
    hub.fault(pattern, kind, value)
    hub.hurry()
    refused("can't fetch org/adapter", "the Hub can't be reached")


def test_a_slow_answer_is_waited_for(hub, one, monkeypatch):
    expert, folder = one
    hub.add("org/adapter", folder)
    hub.fault(".", "slow", 0.05)
    assert Expert.pull("org/adapter").equals(expert)


def test_a_body_that_breaks_off_is_resumed(hub, one, monkeypatch):
    expert, folder = one
    hub.add("org/adapter", folder)
    hub.fault("^GET /lfs/", "truncate", 0.5, times=3)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    assert Expert.pull("org/adapter").equals(expert)


def test_a_body_that_always_breaks_off_is_given_up(hub, one, monkeypatch):
    """Without ranges huggingface_hub would begin again forever, as some bytes come each time."""
    hub.add("org/adapter", one[1])
    hub.answers["no ranges"] = True
    hub.fault("^GET /lfs/", "truncate", 0.9)
    monkeypatch.setattr(hub_files, "SLACK_BYTES", 1000)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    refused("breaks off again and again", "safetensors")


def test_a_body_without_an_end_is_ended(hub, one, monkeypatch):
    hub.add("org/adapter", one[1])
    whole = (one[1] / "adapter_config.json").read_bytes()
    monkeypatch.setattr(hub_files, "SLACK_BYTES", 1000)
    hub.fault("^GET .*/adapter_config.json", "say", (200, {}, whole * 100))
    refused("adapter_config.json", "came without an end")


def test_a_body_that_is_too_short_is_refused(hub, one):
    hub.add("org/adapter", one[1])
    whole = (one[1] / "expert.json").read_bytes()
    hub.fault("^GET .*/expert.json", "say", (200, {}, whole[:-10]))
    refused("can't fetch org/adapter", "expert.json")


def test_a_refused_connection(hub, one):
    hub.stop()
    refused("the Hub can't be reached")


@pytest.mark.parametrize("body", [b"not json", b"[]", b"{}", b'{"id": "org/adapter", "siblings": [{}]}'])
def test_an_answer_that_makes_no_sense(hub, body):
    hub.add("org/adapter")
    hub.fault("^GET /api/models/", "say", (200, {"Content-Type": "application/json"}, body))
    refused("can't fetch org/adapter")


def test_what_the_hub_has_is_checked_like_any_folder(hub, one):
    _, folder = one
    config = read_json(folder / "adapter_config.json", ExpertError)
    write_json(folder / "adapter_config.json", {**config, "peft_type": "LOHA"})
    hub.add("org/adapter", folder)
    refused("LOHA", kind=ExpertError)
    weights = load_file(folder / WEIGHTS)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / WEIGHTS)
    write_json(folder / "adapter_config.json", config)
    hub.add("org/adapter", folder)
    refused("NaN", kind=ExpertError)


def test_parameters_that_cannot_be_routed_are_refused_by_the_config_alone(hub, one):
    folder = one[1]
    config = read_json(folder / "adapter_config.json", ExpertError)
    write_json(folder / "adapter_config.json", {**config, "target_parameters": ["experts.down_proj_bias"]})
    hub.add("org/adapter", folder)
    refused("down_proj_bias", kind=ExpertError)
    assert not hub.asked(WEIGHTS)


# Tokens


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuvwxyz", "my-own.secret/token"])
@pytest.mark.parametrize("fault", [("status", 500), ("echo", 401), ("echo", 418), ("drop", None)])
@pytest.mark.parametrize("pattern", ["^GET /api/models/", "^HEAD .*WEIGHTS", "^GET /lfs/"])
def test_tokens_are_in_no_error(hub, one, secret, fault, pattern, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    hub.add("org/adapter", one[1])
    monkeypatch.setattr("hub_stand_in.TOKEN", secret)
    kind, code = fault
    body = json.dumps({"error": f"Bearer {secret} is not welcome, {secret}"}).encode()
    headers = {"X-Error-Message": f"what is {secret}?", "Content-Type": "application/json"}
    value = (code, headers, body) if kind == "echo" else code
    hub.fault(pattern.replace("WEIGHTS", WEIGHTS), "say" if kind == "echo" else kind, value)
    error = refused(call=lambda: Expert.pull("org/adapter", token=secret))
    assert secret not in "".join(traceback.format_exception(error))
    assert secret not in repr(error)
    out, err = capfd.readouterr()
    ours = "".join(r.getMessage() for r in caplog.records if r.name.startswith("phatgoose"))
    assert secret not in out + err + ours


# Pools


def test_a_pool_is_fetched_byte_for_byte(hub, three, tmp_path):
    repo = hub.add("org/pool", three)
    found = Pool.pull("org/pool", tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(three)
    expected = Pool.load(three)
    assert found.names == expected.names
    assert [e.hash for e in found.experts] == [e.hash for e in expected.experts]
    assert Pool.load(tmp_path / "pulled").names == expected.names
    assert all(e.origin is None for e in found.experts)  # their own origin, not the pool's
    again = Pool.pull("org/pool", revision=repo.head)
    assert [e.hash for e in again.experts] == [e.hash for e in expected.experts]


def test_a_pool_without_a_network(hub, three, tmp_path, monkeypatch):
    hub.add("org/pool", three)
    Pool.pull("org/pool")
    hub.requests.clear()
    offline(monkeypatch)
    Pool.pull("org/pool", tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(three)
    assert hub.requests == []


def test_a_pool_in_a_folder_of_a_repository(hub, three, tmp_path):
    files = {f"pools/mine/{name}": data for name, data in files_of(three).items()}
    hub.add("org/many", files=files)
    Pool.pull("org/many", tmp_path / "pulled", subfolder="pools/mine")
    assert files_of(tmp_path / "pulled") == files_of(three)


def test_folders_that_are_not_free(hub, three, one, tmp_path):
    hub.add("org/pool", three)
    there = shutil.copytree(three, tmp_path / "there")
    refused("is a pool already", "overwrite", call=lambda: Pool.pull("org/pool", there), kind=PoolError)
    (there / "extra").write_text("x")
    Pool.pull("org/pool", there, overwrite=True)
    assert files_of(there) == files_of(three)
    for overwrite in (False, True):
        refused(
            "holds something else",
            call=lambda o=overwrite: Pool.pull("org/pool", one[1], overwrite=o),
            kind=PoolError,
        )
    (tmp_path / "empty").mkdir()
    assert len(Pool.pull("org/pool", tmp_path / "empty")) == 3
    assert hub.asked("^GET /api/")


def test_a_pool_that_is_not_what_its_manifest_says(hub, three, tmp_path):
    config = three / "experts" / "b" / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b" ")
    hub.add("org/pool", three)
    refused(
        "adapter_config.json", "sha256", call=lambda: Pool.pull("org/pool", tmp_path / "x"), kind=PoolError
    )
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda m: m["experts"][0].update(folder="../../outside"), PoolError, "expected experts/NAME"),
        (
            lambda m: m["experts"][0].update(folder="experts/nowhere"),
            DownloadError,
            "has no file experts/nowhere/",
        ),
        (lambda m: m["experts"][0]["files"].update({"../../../x": "0"}), PoolError, "../../../x"),
        (lambda m: m["experts"][0]["files"].update({"evil.py": "0"}), PoolError, "which no expert has"),
        (lambda m: m["experts"][0].update(source={"repo": "a/b"}), PoolError, "expert 0 (a): its source is"),
        (lambda m: m.update(version=2, packed={}), DownloadError, "packed"),
        (lambda m: m.update(version=9), PoolError, "format version 9"),
    ],
)
def test_crafted_manifests(hub, three, tmp_path, change, kind, words):
    manifest = read_json(three / "pool.json", PoolError)
    change(manifest)
    write_json(three / "pool.json", manifest)
    hub.add("org/pool", three, {"experts/a/evil.py": b"raise SystemExit"})
    refused(words, call=lambda: Pool.pull("org/pool", tmp_path / "x"), kind=kind)
    assert not (tmp_path / "x").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"three", "new", "hub-cache", "phatgoose-cache"} | {
        p.name for p in tmp_path.glob("peft-*")
    }


def test_a_fault_in_one_of_many_files_ends_it(hub, three, tmp_path):
    hub.add("org/pool", three)
    hub.fault("^GET .*/experts/b/expert.json", "status", 500)
    refused("the Hub failed (500)", call=lambda: Pool.pull("org/pool", tmp_path / "x"))
    assert not (tmp_path / "x").exists()


# In a pool


def test_a_pool_keeps_where_its_experts_come_from(hub, one, plain, tmp_path):
    from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder

    head = hub.add("org/one", one[1]).head
    other = hub.add("org/plain", plain).head
    folder = Pool([Expert.pull("org/one")]).save(tmp_path / "pool")
    add_to_folder(folder, Expert.pull("org/plain"))
    add_to_folder(folder, Expert.load(one[1], name="local"))
    entries = read_json(folder / "pool.json", PoolError)["experts"]
    assert entries[0]["source"] == {"repo": "org/one", "revision": head, "subfolder": ""}
    assert entries[1]["source"] == {"repo": "org/plain", "revision": other, "subfolder": ""}
    assert "source" not in entries[2]
    loaded = Pool.load(folder)
    assert [e.origin and e.origin.repo for e in loaded.experts] == ["org/one", "org/plain", None]
    loaded.save(folder)
    loaded.save(tmp_path / "copy")
    remove_from_folder(folder, "local")
    for place in (folder, tmp_path / "copy"):
        assert [e.origin.revision for e in Pool.load(place).experts[:2]] == [head, other]
    assert f"org/plain@{other}" in (folder / "README.md").read_text()


def test_where_an_expert_comes_from_survives_packing(hub, one, tmp_path):
    from phatgoose.experts.packed.pack import pack, unpack

    hub.add("org/one", one[1])
    folder = Pool([Expert.pull("org/one")]).save(tmp_path / "pool")
    before = files_of(folder)
    pack(folder)
    (packed,) = Pool.load(folder).experts
    assert packed.origin.repo == "org/one"
    unpack(folder)
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "source",
    [
        {},
        [],
        "org/name@0",
        {"repo": "org/x", "revision": "main", "subfolder": ""},
        {"repo": "org/x\x1b[31m", "revision": "0" * 40, "subfolder": ""},
        {"repo": "org/x", "revision": "0" * 40, "subfolder": "a\nb"},
        {"repo": "org/x", "revision": "0" * 40},
    ],
)
def test_a_source_that_is_none(three, source):
    manifest = read_json(three / "pool.json", PoolError)
    manifest["experts"][1]["source"] = source
    write_json(three / "pool.json", manifest)
    refused("expert 1 (b): its source is", call=lambda: Pool.load(three), kind=PoolError)
