"""Data signatures on disk: beside an expert, in pools plain and packed, to the byte;
what is wrong with one is named."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder_fixtures import make_encoder, signed
from phatgoose import Expert, Pool
from phatgoose.errors import ExpertError, PoolError
from phatgoose.experts.card.card import Facts
from phatgoose.experts.data_signature import DataSignature, describe
from phatgoose.experts.names import SIGNATURE_FILE
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.experts.pool_folder import add_to_folder, verify_folder
from phatgoose.files import read_json, sha256_file, write_json

SHA = "c" * 64


@pytest.fixture
def made(make_base, make_expert, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    base = make_base("llama")
    return [signed(make_expert(base, f"e{i}", seed=i), encoder, seed=i) for i in range(3)]


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_an_expert_and_its_signature_come_back_as_they_were(made, tmp_path):
    one = made[0]
    folder = one.save(tmp_path / "expert")
    again = Expert.load(folder)
    assert again.equals(one)
    assert again.signature.hash == one.signature.hash != made[1].signature.hash
    assert (
        again.hash == one.hash == Expert.from_peft(folder).with_gates(one.gates).hash
    )  # what it computes is the same
    assert not again.equals(made[1].renamed("e0"))
    copy = again.save(tmp_path / "copy")
    assert (copy / SIGNATURE_FILE).read_bytes() == (folder / SIGNATURE_FILE).read_bytes()
    assert (
        one.save(tmp_path / "anew").joinpath(SIGNATURE_FILE).read_bytes()
        == (folder / SIGNATURE_FILE).read_bytes()
    )
    stored = load_file(folder / SIGNATURE_FILE)
    assert torch.equal(stored["texts"], one.signature.texts)
    assert {n.removeprefix("activations/") for n in stored} - {"texts"} == set(one.updates)
    assert Expert.load(folder).with_gates(one.gates).signature is not None
    assert "7 texts embedded by encoder" in (folder / "README.md").read_text()


def test_parts_may_be_missing(made, tmp_path):
    means = DataSignature(made[0].signature.activations)
    texts = DataSignature(None, made[0].signature.texts, "org/name", SHA)
    for signature in (means, texts):
        again = Expert.load(made[0].with_signature(signature).save(tmp_path / "expert")).signature
        assert again.equals(signature)
        assert (again.has_activations, again.has_texts) == (signature is means, signature is texts)
        assert (again.activations is None, again.texts is None) == (signature is texts, signature is means)


def test_pools_carry_signatures_packed_and_unpacked(made, tmp_path):
    folder = Pool(made[:2]).save(tmp_path / "pool")
    before = {p.name: p.read_bytes() for p in folder.rglob("e0/*")}
    assert SIGNATURE_FILE in read_json(folder / "pool.json", PoolError)["experts"][0]["files"]
    pack(folder)
    verify_folder(folder)
    packed = Pool.load(folder)
    assert [e.signature.hash for e in packed.experts] == [e.signature.hash for e in made[:2]]
    assert all(e.equals(o) for e, o in zip(packed.experts, made, strict=False))
    assert (
        Pool(packed.experts).save(tmp_path / "copy").joinpath("experts/e0", SIGNATURE_FILE).read_bytes()
        == before[SIGNATURE_FILE]
    )
    add_to_folder(folder, made[2])
    assert verify_folder(folder)["e2"].signature.equals(made[2].signature)
    unpack(folder)
    assert {p.name: p.read_bytes() for p in folder.rglob("e0/*")} == before
    assert Pool.load(folder)["e2"].signature.equals(made[2].signature)


def test_opening_a_packed_pool_reads_no_signature_and_using_it_checks_it(made, tmp_path):
    folder = Pool(made).save(tmp_path / "pool")
    pack(folder)
    path = folder / "experts/e1" / SIGNATURE_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    opened = Pool.load(folder)
    assert opened["e0"].signature.texts is not None
    for use in (lambda: opened["e1"].signature.activations, lambda: verify_folder(folder)):
        with pytest.raises((ExpertError, PoolError), match=f"{SIGNATURE_FILE} is damaged or was changed"):
            use()


def test_damage_and_strangers_files_are_named(made, tmp_path):
    folder = made[0].save(tmp_path / "expert")
    path, other = folder / SIGNATURE_FILE, made[1].save(tmp_path / "other") / SIGNATURE_FILE
    whole, record = path.read_bytes(), read_json(folder / "expert.json", ExpertError)
    assert record["signature_sha256"] == sha256_file(path)
    path.write_bytes(other.read_bytes())
    with pytest.raises(ExpertError, match=r"is damaged or was changed: sha256 in expert\.json"):
        Expert.load(folder)
    write_json(folder / "expert.json", {k: v for k, v in record.items() if k != "signature_sha256"})
    with pytest.raises(ExpertError, match="was made with another adapter"):
        Expert.load(folder)
    path.write_bytes(whole[:-5])
    with pytest.raises(ExpertError, match="is not a whole safetensors file"):
        Expert.load(folder)
    write_json(folder / "expert.json", record)
    path.unlink()
    with pytest.raises(ExpertError, match=f"{SIGNATURE_FILE} is missing, although"):
        Expert.load(folder)
    path.symlink_to(other)
    with pytest.raises(ExpertError, match="is a link that leads out"):
        Expert.load(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"texts": torch.ones(3, 4)}, "text 0 has length 2, expected 1"),
        ({"texts": unit(1001, 4)}, r"texts have shape \[1001, 4\], expected \[1 to 1000"),
        ({"texts": unit(4)}, r"texts have shape \[4\]"),
        ({"texts": torch.full((2, 4), float("nan"))}, "8 of 8 values that are NaN"),
        ({"texts": unit(3, 4).to(torch.bfloat16)}, "texts is in torch.bfloat16, expected float32"),
        (
            {"notes": unit(3, 4)},
            "there is a tensor 'notes', expected 'texts', activations/MODULE or prompts/MODULE",
        ),
        (
            {"activations/nowhere": torch.ones(4)},
            "a mean activation for module nowhere, which the expert doesn't adapt",
        ),
        (
            {"activations/model.layers.0.mlp.up_proj": torch.ones(5)},
            r"up_proj has shape \[5\], expected \[32\]",
        ),
        (
            {"activations/model.layers.0.mlp.up_proj": torch.full((32,), float("inf"))},
            "up_proj.* has 32 of 32 values",
        ),
        ({"activations/model.layers.0.mlp.up_proj": torch.ones(1, 32)}, "expected one vector"),
        ({}, "holds neither"),
    ],
)
def test_values_that_make_no_signature_are_refused(made, tmp_path, change, says):
    folder = made[0].save(tmp_path / "expert")
    record = read_json(folder / "expert.json", ExpertError)
    del record["signature_sha256"]
    write_json(folder / "expert.json", record)
    tensors = load_file(folder / SIGNATURE_FILE)
    metadata = {
        "format": "phatgoose-signature", "version": "1", "adapter_sha256": record["adapter_sha256"], "encoder": "x",
        "encoder_sha256": SHA,
    }  # fmt: skip
    save_file({**tensors, **change} if change else {}, folder / SIGNATURE_FILE, metadata)
    with pytest.raises(ExpertError, match=says):
        Expert.load(folder)


def test_metadata_is_checked(made, tmp_path):
    folder = made[0].save(tmp_path / "expert")
    record = read_json(folder / "expert.json", ExpertError)
    del record["signature_sha256"]
    write_json(folder / "expert.json", record)
    tensors, good = (
        load_file(folder / SIGNATURE_FILE),
        {"format": "phatgoose-signature", "version": "1", "adapter_sha256": record["adapter_sha256"]},
    )
    for metadata, says in [
        ({**good, "version": "2"}, "has format 'phatgoose-signature' version '2'"),
        ({"format": "pt"}, "expected 'phatgoose-signature'"),
        (good, "its texts' encoder is None, expected a name"),
        (
            {**good, "encoder": "x", "encoder_sha256": "12"},
            "the encoder's sha256 is '12', expected 64 hex digits",
        ),
    ]:
        save_file(tensors, folder / SIGNATURE_FILE, metadata)
        with pytest.raises(ExpertError, match=says):
            Expert.load(folder)
    del tensors["texts"]
    save_file(tensors, folder / SIGNATURE_FILE, {**good, "encoder": "x", "encoder_sha256": SHA})
    with pytest.raises(ExpertError, match="names an encoder, but holds no texts"):
        Expert.load(folder)


def test_records_say_it_in_words_whatever_they_hold():
    assert (
        describe({"rows": 1200, "texts": 1000, "encoder": "all"})
        == "mean activations of 1,200 rows, 1,000 texts embedded by all"
    )
    assert describe({"rows": "many", "texts": None}) == ""
    assert describe([1]) == ""
    rows = dict(Facts("e", {}, {"signature": {"texts": 3}}, False).rows())
    assert rows["data signature"] == "`3 texts`"
    assert "data signature" not in dict(Facts("e", {}, {}, False).rows())
