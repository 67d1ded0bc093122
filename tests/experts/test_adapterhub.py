from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.errors import ExpertError, PoolError
from phatgoose.experts.adapters.adapterhub import ACTIVATIONS, FAMILIES, to_contents
from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder
from phatgoose.ops import bottleneck

DATA = Path(__file__).parent.parent / "data" / "adapterhub"
CASE = DATA / "llama" / "houlsby"


def adapter(case="llama/houlsby"):
    return json.loads((DATA / case / "adapter_config.json").read_text()), load_file(
        DATA / case / "adapter.safetensors"
    )


def changed(config, **settings):
    config = copy.deepcopy(config)
    config["config"] |= settings
    return config


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(CASE, tmp_path / "one"))


def test_nonlinearities_are_the_librarys():
    values = load_file(DATA / "activations.safetensors")
    x = values.pop("x")
    for name, own in ACTIVATIONS.items():
        if name in values:
            torch.testing.assert_close(bottleneck.ACTIVATIONS[own](x), values[name], atol=2e-6, rtol=1e-6)
    assert values.keys() - ACTIVATIONS.keys() <= {"gelu_10", "laplace", "sqrtsoftplus"}
    config, tensors = adapter()
    for name in ("gelu_10", "laplace", "prelu", "xielu", "GELU_ORIG", None, ["relu"]):
        with pytest.raises(ExpertError, match="non_linearity is"):
            to_contents(changed(config, non_linearity=name), tensors, "here")


def test_configs_without_a_version_have_the_old_names():
    config, tensors = adapter()
    for name, version, wanted in (
        ("gelu", "adapters.1.3.0", "gelu"), ("gelu", None, "gelu_new"), ("gelu_orig", None, "gelu"),
        ("SWISH", None, "silu"),
    ):  # fmt: skip
        new = changed(config, non_linearity=name)
        new.pop("version")
        contents = to_contents(new | ({"version": version} if version else {}), tensors, "here")
        assert {u.bottleneck.activation for u in contents.updates.values()} == {wanted}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_saved_from_the_bare_model_or_the_whole_one(prefix):
    config, tensors = adapter()
    bare = {prefix + key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    assert (
        to_contents(config, bare, "here").updates.keys()
        == to_contents(config, tensors, "here").updates.keys()
    )


def test_a_t5_saved_with_the_librarys_own_heads():
    config, tensors = adapter("t5/cross")
    named = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    paths = to_contents(config, named, "here").updates.keys()
    assert "decoder.block.1.layer.1.EncDecAttention.o" in paths
    assert paths == to_contents(config, tensors, "here").updates.keys()


def test_what_each_setting_reads():
    config, tensors = adapter()

    def read(**settings):
        update = to_contents(changed(config, **settings), tensors, "here").updates[
            "model.layers.1.self_attn.o_proj"
        ]
        return update.bottleneck.residual, update.bottleneck.reads_output

    stream = "model.layers.1.input_layernorm"
    assert read() == (None, True)
    assert read(original_ln_before=True) == (stream, True)
    assert read(original_ln_before=True, residual_before_ln=False, original_ln_after=False) == (stream, True)
    assert read(is_parallel=True) == (stream, False)
    assert read(is_parallel=True, residual_before_ln="post_add", original_ln_before=True) == (stream, False)


SETTINGS = [
    ({"ln_after": True}, "ln_after = True"),
    ({"use_gating": True}, "use_gating = True.*whole sequence"),
    ({"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
    ({"phm_layer": True}, "phm_layer = True"),
    ({"architecture": "lora", "r": 8}, "architecture = 'lora'.*PEFT"),
    ({"original_ln_after": False}, "drop the residual stream"),
    ({"original_ln_before": True, "residual_before_ln": False}, "add the residual stream twice"),
    ({"is_parallel": True, "original_ln_after": False}, "drop the residual stream"),
    ({"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add'"),
    ({"scaling": "rowwise"}, "scaling is 'rowwise'"),
    ({"scaling": float("inf")}, "scaling is inf"),
    ({"scaling": 10**400}, "scaling is 1000"),
    ({"scaling": "learned"}, "lacks scaling"),
    ({"ln_before": True}, "lacks down, norm_bias, norm_weight|lacks down, down_bias"),
    ({"mh_adapter": False}, "mh_adapter is false in its config"),
    ({"mh_adapter": "yes"}, "mh_adapter is 'yes', expected true or false"),
    ({"cross_adapter": None}, "cross_adapter is None"),
    ({"new_setting": 3}, "unknown setting 'new_setting' = 3"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_are_not_exact_are_refused_by_name(settings, message):
    config, tensors = adapter()
    with pytest.raises(ExpertError, match=message):
        to_contents(changed(config, **settings), tensors, "here")


def test_a_nonlinearity_that_is_missing_is_not_guessed():
    config, tensors = adapter()
    del config["config"]["non_linearity"]
    with pytest.raises(ExpertError, match=r"non_linearity is None; computed exactly: "):
        to_contents(config, tensors, "here")


def test_every_setting_of_the_library_has_a_rule():
    assert set(adapter()[0]["config"]) <= set(ADAPTERHUB_RULES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'.*llama, mistral"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"name": "other"}, "belongs to an adapter 'houlsby', and the config to 'other'"),
        ({"config": "pfeiffer"}, "config is 'pfeiffer'"),
        ({"config": None}, "config is None"),
        ({"hidden_size": 16}, "writes 8 values, and hidden_size is 16"),
        ({"model_type": "gpt2"}, "no part of a bottleneck adapter of this architecture"),
    ],
)
def test_configs_that_do_not_fit(change, message):
    config, tensors = adapter()
    with pytest.raises(ExpertError, match=message):
        to_contents(config | change, tensors, "here")


KEY = "model.layers.0.output_adapters.adapters.houlsby."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY + "adapter_up.bias": None}, "mlp.down_proj lacks up_bias"),
        ({KEY + "adapter_up.bias": torch.zeros(7)}, r"up_bias \[7\], expected \[8\]"),
        ({KEY + "adapter_up.weight": torch.zeros(2, 8)}, r"up \[2, 8\], expected \[8, 2\]"),
        ({KEY + "scaling": torch.ones(1)}, "has scaling beyond its config"),
        ({KEY + "gate.weight": torch.ones(1, 8)}, "gate.weight' is no part"),
        ({KEY + "adapter_down.1.weight": torch.ones(2, 8)}, "adapter_down.1.weight' is no part"),
        ({"model.layers.x.output_adapters.adapters.houlsby.adapter_up.bias": torch.ones(8)}, "is no part"),
        ({"invertible_adapters.houlsby.F.0.weight": torch.ones(8)}, "is no part"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, message):
    config, tensors = adapter()
    tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    with pytest.raises(ExpertError, match=message):
        to_contents(config, tensors, "here")


def test_no_tensors_and_half_of_them():
    config, tensors = adapter()
    with pytest.raises(ExpertError, match="it has no tensors for it"):
        to_contents(config, {}, "here")
    half = {k: v for k, v in tensors.items() if "attention" not in k}
    with pytest.raises(ExpertError, match="mh_adapter is true in its config, but it has no tensors"):
        to_contents(config, half, "here")
    nowhere = changed(config, mh_adapter=False, output_adapter=False)
    with pytest.raises(ExpertError, match="it holds no tensors of an adapter"):
        to_contents(nowhere, {}, "here")


def test_a_layer_norm_that_stands_twice_must_be_the_same():
    config, tensors = adapter("llama/normed")
    key = next(k for k in tensors if k.endswith("adapter_norm_before.weight"))
    assert to_contents(config, {k: v for k, v in tensors.items() if k != key}, "here").updates
    with pytest.raises(ExpertError, match="same part and differ"):
        to_contents(config, tensors | {key: tensors[key] + 1}, "here")


def test_pickles_are_refused_with_what_to_do(folder):
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(ExpertError, match=r"pytorch_adapter.bin, a pickle.*use_safetensors=True"):
        Expert.from_adapterhub(folder)


def test_a_prediction_head_is_refused_or_dropped_and_recorded(tmp_path):
    with pytest.raises(ExpertError, match=r"model_head.safetensors.*drop=\['prediction_head'\]"):
        Expert.load(DATA / "llama" / "pfeiffer")
    expert = Expert.load(DATA / "llama" / "pfeiffer", drop=["prediction_head"])
    assert expert.provenance["dropped"] == ["prediction_head"]
    assert Expert.load(expert.save(tmp_path / "saved")).hash == expert.hash


def test_an_interface_of_the_trainers_own_is_refused(tmp_path):
    folder = Path(shutil.copytree(DATA / "qwen2" / "houlsby", tmp_path / "one"))
    assert Expert.load(folder).updates
    path = folder / "adapter_interface.json"
    interface = json.loads(path.read_text())
    interface["interface"]["layer_ln_1"] = "post_attention_layernorm"
    path.write_text(json.dumps(interface))
    with pytest.raises(ExpertError, match="layer_ln_1 = 'post_attention_layernorm'"):
        Expert.load(folder)
    path.write_text("[]")
    with pytest.raises(ExpertError, match="isn't that of a known architecture"):
        Expert.load(folder)


def test_each_reader_wants_its_own_format(folder, make_base, make_expert):
    with pytest.raises(ExpertError, match=r"AdapterHub's format, expected PEFT's: use Expert\.load"):
        Expert.from_peft(folder)
    lora = make_expert(make_base("llama"))
    with pytest.raises(ExpertError, match="PEFT's format, expected AdapterHub's"):
        Expert.from_adapterhub(lora.folder)
    assert Expert.load(folder).hash == Expert.from_adapterhub(folder).hash


def test_folders_and_pools_keep_the_adapters_files_to_the_byte(folder, tmp_path, make_base, make_expert):
    expert = Expert.from_adapterhub(folder, name="narrow")
    gates = {p: torch.randn(12 if "mlp" in p else 8) for p in expert.updates}
    gated = expert.with_gates(gates, {"kind": "random"})
    saved = gated.save(tmp_path / "saved")
    names = {"adapter_config.json", "adapter.safetensors", "gates.safetensors", "expert.json"}
    assert {p.name for p in saved.iterdir() if p.name != "README.md"} == names
    for name in ("adapter_config.json", "adapter.safetensors"):
        assert (saved / name).read_bytes() == (CASE / name).read_bytes()
    again = Expert.load(saved)
    assert again.hash == gated.hash
    assert again.equals(gated)

    Pool([again]).save(tmp_path / "pool")
    add_to_folder(tmp_path / "pool", Expert.from_adapterhub(DATA / "llama" / "parallel"))
    pool = Pool.load(tmp_path / "pool")
    assert pool.names == ("narrow", "parallel")
    assert pool["narrow"].hash == gated.hash
    assert pool["parallel"].hash == Expert.from_adapterhub(DATA / "llama" / "parallel").hash != gated.hash
    weights = tmp_path / "pool" / "experts" / "narrow" / "adapter.safetensors"
    assert weights.read_bytes() == (CASE / "adapter.safetensors").read_bytes()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(PoolError, match="damaged or was changed"):
        Pool.load(tmp_path / "pool")


def test_what_it_reads_is_part_of_its_hash(folder):
    config, tensors = adapter()
    hashes = {
        Expert("one", changed(config, **settings), tensors).hash
        for settings in (
            {}, {"original_ln_before": True}, {"is_parallel": True}, {"scaling": 2.0}, {"non_linearity": "tanh"},
        )
    }  # fmt: skip
    assert len(hashes) == 5
    assert Expert("one", changed(config, init_weights="houlsby", dropout=0.2), tensors).hash in hashes


def test_gates_for_another_adapter_are_refused(folder, tmp_path):
    expert = Expert.from_adapterhub(folder)
    saved = expert.with_gates({p: torch.randn(12 if "mlp" in p else 8) for p in expert.updates}).save(
        tmp_path / "saved"
    )
    _, tensors = adapter()
    save_file({k: v + 1 for k, v in tensors.items()}, saved / "adapter.safetensors")
    (saved / "expert.json").unlink()
    with pytest.raises(ExpertError, match=r"adapter.safetensors is damaged or was changed"):
        Expert.load(saved)


def test_a_packed_pool_refuses_it_by_name(folder, tmp_path):
    from phatgoose.experts.packed.pack import pack

    Pool([Expert.from_adapterhub(folder)]).save(tmp_path / "pool")
    with pytest.raises(PoolError, match="'one' is an adapter in AdapterHub's format"):
        pack(tmp_path / "pool")
    assert Pool.load(tmp_path / "pool").names == ("one",)


def test_locations_are_found_from_modules_and_back():
    for kind, paths in {
        "llama": ["model.layers.11.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
        "gpt2": ["transformer.h.3.attn.c_proj", "transformer.h.3.mlp.c_proj"],
        "t5": ["encoder.block.0.layer.0.SelfAttention.o", "decoder.block.2.layer.1.EncDecAttention.o",
               "encoder.block.4.layer.1.DenseReluDense.wo", "decoder.block.4.layer.2.DenseReluDense.wo"],
    }.items():  # fmt: skip
        for path in paths:
            place = FAMILIES[kind].at(path)
            assert place is not None
            assert f"{place[1]}.{place[0].module}" == path
        assert FAMILIES[kind].at("lm_head") is None
        assert FAMILIES[kind].at(f"x.{paths[0]}") is None


def test_a_changed_adapter_under_a_data_signature_is_named_by_its_own_file(folder):
    expert = Expert.from_adapterhub(folder, name="one")
    means = {path: torch.ones(u.gate_dim or 8) for path, u in expert.updates.items()}
    expert.with_signature(DataSignature(means)).save(folder)
    tensors = load_file(folder / "adapter.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    (folder / "expert.json").unlink()
    with pytest.raises(
        ExpertError, match=r"signature.safetensors was made with another adapter, or adapter.saf"
    ):
        Expert.load(folder)
