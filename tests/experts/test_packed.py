"""Experts of a packed pool are experts like others, and views of its file."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from packing_fixtures import adapter, make_plain, make_zoo, pool_of
from phatgoose import Expert, Pool
from phatgoose.errors import ExpertError
from phatgoose.experts.packed.expert import rows_in_place
from phatgoose.experts.packed.pack import pack
from phatgoose.experts.pool_folder import add_to_folder, verify_folder
from phatgoose.files import read_json, write_json

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def plain(make_base, tmp_path):
    base = make_base("llama")
    experts = make_plain(base, tmp_path / "made")
    folder = pool_of(experts, tmp_path / "pool")
    pack(folder)
    return base, experts, folder


def test_tensors_and_updates_are_views_of_the_file(plain):
    _, experts, folder = plain
    loaded = Pool.load(folder)
    file = loaded.experts[0].source.file
    assert all(e.source.file is file for e in loaded.experts)
    stacks = file.stacks
    for name, packed in zip([e.name for e in experts], loaded.experts, strict=True):
        update = packed.updates[Q]
        start = packed.source.starts[packed.source.layout.pairs[Q].index]
        assert update.A.data_ptr() == stacks[f"{Q}.lora_A.float32"][start].data_ptr(), name
        assert update.B.T.data_ptr() == stacks[f"{Q}.lora_B.float32"][start].data_ptr(), name
        assert (
            packed.gates[Q].untyped_storage().data_ptr() == stacks[f"{Q}.gate"].untyped_storage().data_ptr()
        )
    assert stacks[f"{Q}.lora_A.float32"].shape == (64, 32)  # 3 + 3 + 5 + 1 rows and room for others


def test_what_is_made_from_a_packed_expert(plain, tmp_path):
    _, experts, folder = plain
    packed = Pool.load(folder).experts[0]
    gates = {p: torch.randn(g.shape) for p, g in packed.gates.items()}
    changed = packed.renamed("other").with_gates(gates, {"kind": "random"})
    assert changed.name == "other"
    assert changed.gates.keys() == gates.keys()
    saved = Expert.load(changed.save(tmp_path / "saved"))
    assert saved.equals(changed)
    assert (tmp_path / "saved/adapter_model.safetensors").read_bytes() == (
        experts[0].folder / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(ExpertError, match="can't name an expert"):
        packed.renamed("a/b")
    with pytest.raises(ExpertError, match="no gate for module"):
        packed.with_gates({Q: gates[Q]})
    add_to_folder(folder, changed)
    assert verify_folder(folder)["other"].hash == changed.hash
    pack(folder)
    assert verify_folder(folder)["other"].equals(saved)
    assert replace(packed, provenance={}).hash == packed.hash
    assert copy.deepcopy(packed).hash == packed.hash
    assert repr(packed) == repr(experts[0])


def test_its_folder_alone_is_no_expert(plain):
    _, _, folder = plain
    with pytest.raises(ExpertError, match="belongs to a packed pool"):
        Expert.load(folder / "experts" / "plain-0")


def test_views_behave_like_dictionaries(plain):
    _, experts, folder = plain
    packed = Pool.load(folder).experts[2]
    for view, whole in (
        (packed.tensors, experts[2].tensors),
        (packed.gates, experts[2].gates),
        (packed.updates, experts[2].updates),
    ):
        assert view.keys() == whole.keys()
        assert len(view) == len(whole)
        assert ("x" in view, view.get("x")) == (False, None)
        with pytest.raises(KeyError):
            view["x"]


def test_writing_into_a_tensor_by_mistake_changes_no_file(plain):
    _, experts, folder = plain
    (file,) = (folder / "packed").iterdir()
    before = file.read_bytes()
    Pool.load(folder).experts[0].updates[Q].A.zero_()
    assert file.read_bytes() == before
    assert Pool.load(folder).experts[0].hash == experts[0].hash


def test_let_go_of_gates_is_release_gates_under_its_old_name(plain):
    _, experts, folder = plain
    loaded = Pool.load(folder)
    with pytest.warns(DeprecationWarning, match=r"Pool\.release_gates"):
        loaded.let_go_of_gates()
    assert torch.equal(loaded.experts[2].gates[Q], experts[2].gates[Q])


def test_rows_of_all_experts_are_in_place(plain):
    _, experts, folder = plain
    loaded = Pool.load(folder)
    for path in loaded.modules:
        rows, reason = loaded.rows(path, torch.float32)
        owners = [e for e in experts if path in e.updates]
        assert reason == ""
        assert len(rows.starts) == len(owners)
        assert len(rows.A) == len(rows.B) == sum(e.updates[path].rank for e in owners)
        for expert, start in zip(owners, rows.starts, strict=True):
            update = expert.updates[path]
            assert torch.equal(rows.A[start : start + update.rank], update.A)
            assert torch.equal(rows.B[start : start + update.rank], update.B.T)
    some, _ = rows_in_place(
        [loaded.experts[3], loaded.experts[1]], Q, torch.float32
    )  # any of them, in any order
    assert some.starts == (11, 3)
    assert len(some.A) == 12


def test_why_rows_are_copied(make_base, plain, tmp_path):
    base, experts, folder = plain
    loaded = Pool.load(folder)
    assert loaded.rows(Q, torch.bfloat16) == (
        None,
        "expert 'plain-0' is packed in torch.float32, and torch.bfloat16 is wanted",
    )
    beside = loaded.add(adapter(base, "plain", tmp_path / "made" / "beside", seed=8))
    assert beside.rows(Q, torch.float32) == (None, "expert 'beside' is not packed")
    other = pool_of([e.renamed(f"{e.name}-too") for e in experts[:1]], tmp_path / "other")
    pack(other)
    both = Pool([*loaded.experts, *Pool.load(other).experts])
    assert both.rows(Q, torch.float32) == (None, "expert 'plain-0-too' is of another packed pool")
    zoo = pool_of(make_zoo(base, tmp_path / "zoo"), tmp_path / "zoo-pool")
    pack(zoo)
    found = Pool.load(zoo)
    v, k = Q.replace("q_proj", "v_proj"), Q.replace("q_proj", "k_proj")
    low = [e for e in found.experts if e.name in ("plain", "bias", "ia3")]
    rows, reason = rows_in_place(low, k, torch.float32)  # (IA)³ has no rows, a bias stands apart
    assert (rows.starts[2], reason) == (0, "")
    assert rows_in_place([found["ia3"]], k, torch.float32) == (None, "")
    assert "is a DoRA" in rows_in_place([found["plain"], found["dora"]], v, torch.float32)[1]
    assert "'half' is packed in torch.bfloat16" in found.rows(Q, torch.float32)[1]


def test_matrices_of_two_dtypes_stand_apart(make_base, tmp_path):
    """Exact, but copied when routed."""
    from safetensors.torch import load_file, save_file

    base = make_base("llama")
    expert = adapter(base, "plain", tmp_path / "made" / "mixed")
    tensors = load_file(expert.folder / "adapter_model.safetensors")
    tensors = {k: t.half() if "lora_A" in k else t for k, t in tensors.items()}
    save_file(tensors, expert.folder / "adapter_model.safetensors", {"format": "pt"})
    mixed = Expert.from_peft(expert.folder)
    folder = pool_of([mixed], tmp_path / "pool")
    pack(folder)
    loaded = verify_folder(folder)
    assert loaded.experts[0].hash == mixed.hash
    assert loaded.rows(Q, torch.float32) == (None, "expert 'mixed' has A and B of two dtypes")


def test_dropped_parts_stay_dropped(make_base, tmp_path):
    """An adapter with a saved head, taken without it, and packed with it: its bytes are kept,
    its update isn't changed."""
    from safetensors.torch import load_file, save_file

    base = make_base("llama")
    made = adapter(base, "plain", tmp_path / "made" / "head").folder
    tensors = load_file(made / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = torch.randn(2, 32)
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt"})
    config = read_json(made / "adapter_config.json", ExpertError)
    write_json(made / "adapter_config.json", config | {"modules_to_save": ["score"]})
    expert = Expert.from_peft(made, drop=["modules_to_save"])
    folder = pool_of([expert], tmp_path / "pool")
    pack(folder)
    loaded = verify_folder(folder)
    assert loaded.experts[0].equals(expert)
    assert loaded.experts[0].hash == expert.hash
