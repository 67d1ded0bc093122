"""Experts on disk and in memory: round trips, plain PEFT, and every refusal."""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from conftest import TARGETS
from phatgoose.errors import ExpertError, StorageError
from phatgoose.experts.adapters.peft import to_contents
from phatgoose.experts.expert import Expert
from phatgoose.experts.names import slug
from phatgoose.experts.pool import Pool
from phatgoose.files import read_json, sha256_file, write_json


@pytest.fixture
def saved(make_base, make_expert, tmp_path):
    base = make_base("llama")
    expert = make_expert(base, "one", rank=3, alpha=5)
    return base, expert, expert.save(tmp_path / "saved")


def test_round_trip_keeps_everything(saved):
    _, expert, folder = saved
    found = Expert.load(folder)
    assert found.name == "one"
    assert found.hash == expert.hash
    assert found.provenance == expert.provenance
    assert found.base == expert.base
    assert all(torch.equal(found.gates[p], expert.gates[p]) for p in expert.gates)
    assert all(torch.equal(found.tensors[k], expert.tensors[k]) for k in expert.tensors)
    assert found.equals(expert)
    assert not found.renamed("two").equals(expert)
    assert not found.equals(
        expert.with_gates({p: g + 1 for p, g in expert.gates.items()}, expert.provenance["gate"])
    )


def test_adapter_files_stay_as_peft_wrote_them_to_the_byte(saved):
    _, expert, folder = saved
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (expert.folder / name).read_bytes()


def test_gates_that_are_written_twice_are_the_same_file(saved, tmp_path):
    _, expert, _ = saved
    mine = expert.with_gates({p: g + 1 for p, g in expert.gates.items()}, expert.provenance["gate"])
    first, *others = ((mine.save(tmp_path / f"{i}") / "gates.safetensors").read_bytes() for i in range(6))
    assert all(other == first for other in others)
    keys = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])["__metadata__"]
    assert list(keys) == ["adapter_sha256", "base", "format", "version"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_plain_peft_loads_the_folder(make_base, make_expert, tmp_path, family):
    base = make_base(family)
    expert = make_expert(base, "one", rank=3, alpha=5)
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), expert.save(tmp_path / "e"))
    for path, update in expert.updates.items():
        module = model.get_base_model().get_submodule(path)
        delta = module.get_delta_weight("default")
        expected = delta.T if family == "gpt2" else delta
        assert torch.allclose(update.weight(), expected, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_follow_peft_with_patterns_and_rslora(make_base, make_expert, tmp_path, rslora):
    base = make_base("llama")
    expert = make_expert(
        base,
        rank=4,
        alpha=6,
        use_rslora=rslora,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        alpha_pattern={"v_proj": 9},
    )
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), expert.folder)
    for path, update in expert.updates.items():
        layer = model.get_base_model().get_submodule(path)
        assert update.scale == pytest.approx(layer.scaling["default"])
        assert update.rank == layer.r["default"]
    assert {u.rank for u in expert.updates.values()} == {2, 4, 7}
    q = expert.updates["model.layers.0.self_attn.q_proj"]
    assert q.scale == pytest.approx(6 / (math.sqrt(2) if rslora else 2))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def test_truncated_and_flipped_files_are_named(saved):
    _, _, folder = saved
    for name in ("adapter_model.safetensors", "gates.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-7])
        with pytest.raises(ExpertError, match=f"{name} is not a whole safetensors file"):
            Expert.load(folder)
        (folder / name).write_bytes(whole)
        flip(folder / name, len(whole) - 9)
        with pytest.raises(ExpertError, match=f"{name} is damaged or was changed: sha256 in expert.json"):
            Expert.load(folder)
        (folder / name).write_bytes(whole)
        flip(folder / name, 12)
        with pytest.raises(ExpertError, match=name):
            Expert.load(folder)
        (folder / name).write_bytes(struct.pack("<Q", 2**60) + whole[8:])
        with pytest.raises(ExpertError, match=name):
            Expert.load(folder)
        (folder / name).write_bytes(whole)
    Expert.load(folder)


def rewrite_gates(folder, change):
    from safetensors import safe_open

    path = folder / "gates.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    gates = load_file(path)
    change(gates, metadata)
    save_file(gates, path, metadata)
    record = read_json(folder / "expert.json", ExpertError)
    write_json(folder / "expert.json", {**record, "gates_sha256": sha256_file(path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g, m: g["model.layers.0.mlp.up_proj"].fill_(math.nan),
            r"'model.layers.0.mlp.up_proj' has 32 of 32 values that are NaN",
        ),
        (lambda g, m: g.pop("model.layers.1.mlp.up_proj"), "no gate for module model.layers.1.mlp.up_proj"),
        (
            lambda g, m: g.update(extra=torch.zeros(3)),
            "a gate for module extra, which the expert doesn't adapt",
        ),
        (
            lambda g, m: g.update({"model.layers.0.mlp.up_proj": torch.zeros(31)}),
            r"shape \[31\], expected \[32\]",
        ),
        (
            lambda g, m: m.update(adapter_sha256="0" * 64),
            r"gates.safetensors was made with another adapter.* expected sha256 '0000",
        ),
        (lambda g, m: m.update(version="9"), "version '9'; expected"),
        (
            lambda g, m: g.update(whole=torch.zeros(3, dtype=torch.int64)),
            "dtype 'I64', expected a floating point one",
        ),
        (
            lambda g, m: g.update(
                {"model.layers.0.mlp.up_proj": torch.full((32,), 1e39, dtype=torch.float64)}
            ),
            "gate of model.layers.0.mlp.up_proj has 32 of 32 values that are NaN or infinite",
        ),
    ],
)
def test_bad_gates_are_named(saved, change, message):
    _, _, folder = saved
    rewrite_gates(folder, change)
    with pytest.raises(ExpertError, match=message):
        Expert.load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_gates_of_any_float_dtype_are_read(saved, dtype):
    """torch knows no isfinite of float8; found by changing a header at random."""
    _, expert, folder = saved
    rewrite_gates(folder, lambda g, m: g.update({p: t.to(dtype) for p, t in g.items()}))
    found = Expert.load(folder)
    assert all(torch.equal(found.gates[p], g.to(dtype).float()) for p, g in expert.gates.items())


def test_missing_parts_are_named(saved, tmp_path):
    _, _, folder = saved
    (folder / "gates.safetensors").unlink()
    with pytest.raises(ExpertError, match=r"gates.safetensors is missing, although expert.json records it"):
        Expert.load(folder)
    (folder / "expert.json").write_text("{")
    with pytest.raises(ExpertError, match=r"expert.json is not readable as JSON"):
        Expert.load(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ExpertError, match=r"adapter_model.bin, a pickle, which is refused"):
        Expert.load(folder)
    with pytest.raises(ExpertError, match="is not a folder"):
        Expert.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExpertError, match=r"adapter_config.json does not exist"):
        Expert.load(tmp_path / "empty")


def test_folders_of_adapters_are_named_with_what_to_give(saved, tmp_path):
    _, expert, _ = saved
    run = tmp_path / "run"
    for step in (50, 1000, 200):
        shutil.copytree(expert.folder, run / f"checkpoint-{step}")
    with pytest.raises(
        ExpertError, match=r"checkpoint-50, checkpoint-200, checkpoint-1000.* is .*run/checkpoint-1000\."
    ):
        Expert.load(run)
    for name in ("cats", "dogs"):
        shutil.copytree(expert.folder, tmp_path / "two" / name)
    with pytest.raises(
        ExpertError, match=r"folders with one adapter each: cats, dogs.* one by one: .*two/cats .*two/dogs"
    ):
        Expert.from_peft(tmp_path / "two")
    Pool([expert]).save(tmp_path / "pool")
    with pytest.raises(ExpertError, match=r"is a pool\. Give folders of experts in it .*pool/experts/NAME"):
        Expert.load(tmp_path / "pool")
    (tmp_path / "whole").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / name).write_bytes(b"{}")
    with pytest.raises(ExpertError, match="holds a whole model"):
        Expert.load(tmp_path / "whole")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": True}, "use_dora is True, and module .* has no magnitude"),
        ({"lora_bias": True}, "lora_bias is True, and module .* has no bias"),
        ({"bias": "every"}, "bias = 'every', expected 'none', 'all' or 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .*incomplete.*drop='modules_to_save'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices .*drop="),
        ({"init_lora_weights": "pissa"}, "changes the base's weights.*`phatgoose convert"),
        ({"peft_type": "OFT"}, "peft_type is 'OFT'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"from_the_future": 3}, "unknown setting 'from_the_future' = 3"),
        ({"from_the_future": 0}, "unknown setting 'from_the_future' = 0"),
        ({"x" * 10**6: "y" * 10**6}, r"unknown setting 'x{199}… \(1000002 characters\)"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head'"),
        ({"r": 0}, "r of module .* is 0"),
        ({"r": 5}, r"expected \[5, d_in\]"),
        ({"r": 2**40}, r"expected \[1099511627776, d_in\]"),
        ({"r": 1e300}, r"expected \[1\d{300}, d_in\]"),
        ({"r": True}, "r of module .* is True, expected a finite number"),
        ({"r": 2.5}, "r of module .* is 2.5"),
        ({"lora_alpha": "x"}, "lora_alpha of module .* is 'x'"),
        ({"lora_alpha": 1e308}, "so its scale is 3.3+e.307, which doesn't fit into float32"),
        (
            {"lora_alpha": 10**400},
            "lora_alpha of module .* is 10+… .401 characters., expected a finite number",
        ),
        ({"lora_alpha": math.nan}, "lora_alpha of module .* is nan, expected a finite number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*expected an object"),
        (
            {"alpha_pattern": {"q_proj": None}},
            "lora_alpha of module .*q_proj is None, expected a finite number",
        ),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(saved, setting, message):
    _, expert, _ = saved
    with pytest.raises(ExpertError, match=message):
        to_contents({**expert.adapter_config, **setting}, expert.tensors, "here")


def test_unknown_tensors_are_refused(saved):
    _, expert, _ = saved
    for key, message in (
        ("base_model.model.model.norm.weight", "is no part of a LORA adapter"),
        ("model.layers.0.lora_A.weight", "doesn't start with"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lacks lora_embedding_B"),
        ("base_model.model.model.layers.0.mlp.up_proj.ia3_l", "is no part of a LORA adapter"),
    ):
        with pytest.raises(ExpertError, match=message):
            to_contents(expert.adapter_config, {**expert.tensors, key: torch.zeros(2, 2)}, "here")
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    twice = {**expert.tensors, up: torch.ones(48), f"{up}.weight": torch.ones(48)}
    with pytest.raises(ExpertError, match="is in the file twice, under two names"):
        to_contents(expert.adapter_config, twice, "here")
    one = dict(expert.tensors)
    del one["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    with pytest.raises(ExpertError, match=r"model.layers.0.mlp.up_proj lacks lora_A"):
        to_contents(expert.adapter_config, one, "here")


def test_a_file_without_tensors_says_how_it_came_about(saved):
    """What DeepSpeed's ZeRO-3 leaves where weights weren't gathered: 40 bytes."""
    _, expert, _ = saved
    save_file({}, expert.folder / "adapter_model.safetensors", {"format": "pt"})
    assert (expert.folder / "adapter_model.safetensors").stat().st_size == 40
    with pytest.raises(
        ExpertError, match=r"no tensors at all.*ZeRO-3.*stage3_gather_16bit_weights_on_model_save"
    ):
        Expert.from_peft(expert.folder)
    shards = {key: tensor[:0] for key, tensor in expert.tensors.items()}
    with pytest.raises(ExpertError, match=r"lora_A.weight' has shape \[0, 48\], so no values.*ZeRO-3"):
        to_contents(expert.adapter_config, shards, "here")


def test_tensors_of_several_adapters_are_refused(saved):
    _, expert, _ = saved
    keys = enumerate(sorted(expert.tensors))
    two = {key.replace(".weight", f".{'ab'[n % 2]}.weight"): expert.tensors[key] for n, key in keys}
    with pytest.raises(ExpertError, match=r"several adapters .*'a', 'b'"):
        to_contents(expert.adapter_config, two, "here")


def test_names_and_foreign_folders(saved, tmp_path):
    _, expert, _ = saved
    for bad in ("../up", "", "a/b", ".hidden", "x" * 101, "é"):
        with pytest.raises(ExpertError, match="can't name an expert"):
            expert.renamed(bad)
    assert slug("bigbench:a/b c") == "bigbench-a-b-c"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExpertError, match="something else than an expert"):
        expert.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_full_disk_leaves_the_old_expert(saved, monkeypatch):
    import errno

    import phatgoose.experts.files.safetensors_file as module

    _, expert, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(StorageError, match="no space left"):
        expert.with_gates({p: g + 1 for p, g in expert.gates.items()}).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_other_targets_give_other_modules(make_base, make_expert):
    base = make_base("t5")
    expert = make_expert(base, targets=TARGETS["t5"][:1])
    assert {p.rsplit(".", 1)[1] for p in expert.updates} == {"q"}
    assert json.dumps(expert.provenance)


def test_what_else_is_in_a_folder_is_not_deleted(make_base, make_expert, tmp_path):
    expert = make_expert(make_base("llama"))
    folder = expert.save(tmp_path / "run")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.pt").write_bytes(b"mine")
    mine = Expert.from_peft(folder).with_gates(expert.gates)
    with pytest.raises(ExpertError, match=r"no expert's \(checkpoint-500\), which would be lost"):
        mine.save(folder)
    assert (folder / "checkpoint-500" / "optimizer.pt").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "shapes", "message"),
    [
        (
            {"lora_bias": True},
            {"x.lora_A.weight": (3, 8), "x.lora_B.weight": (6, 3), "x.lora_B.bias": (7,)},
            r"\[6\]",
        ),
        (
            {"use_dora": True},
            {"x.lora_A.weight": (3, 8), "x.lora_B.weight": (6, 3), "x.lora_magnitude_vector": (6, 1)},
            r"\[6\]",
        ),
        (
            {},
            {"x.lora_A.weight": (3, 8), "x.lora_B.weight": (6, 2)},
            r"\[d_out, 3\] for the configured rank 3 .*",
        ),
        (
            {"target_parameters": ["down_proj"], "r": 5},
            {"x.lora_A.weight": (4, 8), "x.lora_B.weight": (6, 4)},
            r"lora_A \[4, 8\], which for the configured rank 5 are 0 experts; expected 1 to 4096",
        ),
        (
            {"target_parameters": ["x.weight"]},
            {"x.lora_A.weight": (4, 8), "x.lora_B.weight": (6, 4)},
            r"expected \[3, d_in\] for 1 expert and the configured rank 3",
        ),
    ],
)
def test_a_wrong_shape_is_named_with_what_decides_it(settings, shapes, message):
    tensors = {f"base_model.model.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(ExpertError, match=f"{message}\\.$"):
        to_contents({"peft_type": "LORA", "r": 3, "lora_alpha": 1, **settings}, tensors, "here")
