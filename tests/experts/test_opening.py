"""What a packed pool's manifest and small files may say: whatever isn't so is refused by name before
a value is read."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packing_fixtures import adapter, make_plain, pool_of
from phatgoose import Pool
from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.packed.open import expand_runs, to_runs
from phatgoose.experts.packed.pack import pack
from phatgoose.files import read_json, sha256_file, write_json

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(make_base, tmp_path):
    """A packed pool of two LoRA experts of rank 3, one of them with a bias that stands in no stack."""
    base = make_base("llama")
    experts = [
        make_plain(base, tmp_path / "made")[0],
        adapter(base, "bias", tmp_path / "made" / "bias", seed=3),
    ]
    found = pool_of(experts, tmp_path / "pool")
    pack(found)
    return found


def refused(folder, message, verify=True):
    with pytest.raises(PhatgooseError, match=message):
        Pool.load(folder, verify=verify)


MANIFESTS = {
    "version": (lambda m: m.update(version=1), "format version 1"),
    "version 3": (lambda m: m.update(version=3), "format version 3"),
    "index": (lambda m: m.update(packed=[]), "lacks its file or the rows in use"),
    "no rows": (lambda m: m["packed"].pop("used"), "lacks its file or the rows in use"),
    "file": (lambda m: m["packed"].update(file="packed/../../x"), r"expected packed/stacks-N.safetensors"),
    "absolute": (lambda m: m["packed"].update(file="/etc/passwd"), r"expected packed/stacks-N.safetensors"),
    "missing": (lambda m: m["packed"].update(file="packed/stacks-9.safetensors"), "does not exist"),
    "too many": (lambda m: m["packed"]["used"].update({f"{Q}.gate": 65}), "65 rows of .* are in use, of 64"),
    "negative": (lambda m: m["packed"]["used"].update({f"{Q}.gate": -1}), "-1 rows of"),
    "true": (lambda m: m["packed"]["used"].update({f"{Q}.gate": True}), "True rows of"),
    "stranger": (lambda m: m["packed"]["used"].update({"x": 1}), "1 rows of 'x' are in use, of 0"),
    "not in use": (
        lambda m: m["packed"]["used"].pop(f"{Q}.gate"),
        "gates begin at 0, where the last possible row in use is -1",
    ),
    "outside": (
        lambda m: m["experts"][1]["packed"].update(rows=[[60, 14]]),
        "rows begin at 60, where the last possible row in use is 3",
    ),
    "too few": (lambda m: m["experts"][1]["packed"].update(rows=[[3, 13]]), "rows are 13, expected 14"),
    "too long": (lambda m: m["experts"][1]["packed"].update(rows=[[3, 10**15]]), "for 14 stacks"),
    "no runs": (lambda m: m["experts"][1]["packed"].update(rows={}), "expected \\[\\[row, times\\]"),
    "pairs": (lambda m: m["experts"][1]["packed"].update(rows=[[3, 14, 0]]), "expected \\[\\[row, times\\]"),
    "negative rows": (lambda m: m["experts"][1]["packed"].update(rows=[[-3, 14]]), "expected \\[\\[row, times\\]"),
    "no gates": (lambda m: m["experts"][1]["packed"].pop("gates"), "gates are 0, expected 14"),
    "no files": (lambda m: m["experts"][1]["packed"].pop("files"), "lacks its rows or its files' hashes"),
    "header": (
        lambda m: m["experts"][0]["packed"]["files"].pop("adapter_model.header"),
        "lists no adapter_model.header",
    ),
    "gates' header": (lambda m: m["experts"][0]["packed"]["files"].pop("gates.header"), "lists no gates.header"),
    "rest": (lambda m: m["experts"][1]["packed"]["files"].pop("rest.safetensors"), "rest.safetensors: adapter_model"),
    "config": (lambda m: m["experts"][0]["files"].pop("adapter_config.json"), "lists no adapter_config.json"),
    "hash": (lambda m: m["experts"][0]["files"].update({"expert.json": "0" * 64}), "expected sha256 000"),
    "adapter's hash": (
        lambda m: m["experts"][0]["files"].update({"adapter_model.safetensors": "0" * 64}),
        "adapter_sha256 is",
    ),
    "gates' hash": (lambda m: m["experts"][0]["files"].update({"gates.safetensors": "0" * 64}), "gates_sha256 is"),
    "not an object": (lambda m: m["experts"][0].update(packed=3), "lacks its rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_crafted_manifests(folder, case):
    change, message = MANIFESTS[case]
    manifest = read_json(folder / "pool.json", PoolError)
    change(manifest)
    write_json(folder / "pool.json", manifest)
    refused(folder, message)


def stacks_of(folder):
    (path,) = (folder / "packed").iterdir()
    return path


def rewrite(folder, change):
    """Changes the header of the file of stacks."""
    path = stacks_of(folder)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


STACKS = {
    "format": (lambda h: h["__metadata__"].update(format="x"), "has format 'x'"),
    "version": (
        lambda h: h["__metadata__"].update(version="2"),
        "version '2'; expected 'phatgoose-stacks' version '1'",
    ),
    "narrow": (
        lambda h: h[f"{Q}.lora_A.float32"].update(shape=[128, 16]),
        "expected a stack .*lora_A.float32', 32 wide in torch.float32; found one 16 wide",
    ),
    "bytes": (
        lambda h: h[f"{Q}.lora_A.float32"].update(dtype="BF16", shape=[64, 64]),
        "found one 64 wide in torch.bfloat16",
    ),
    "three": (lambda h: h[f"{Q}.gate"].update(shape=[64, 4, 8]), "expected \\[rows, width\\]"),
    "renamed": (
        lambda h: h.update(x=h.pop(f"{Q}.lora_B.float32")),
        "lora_B.float32', 32 wide in torch.float32; found none",
    ),
    "no gate": (lambda h: h.update(x=h.pop(f"{Q}.gate")), "1|2 rows of .*gate' are in use, of 0"),
    "offsets": (lambda h: h[f"{Q}.gate"].update(data_offsets=[0, 8192]), "the safetensors header is refused"),
}


@pytest.mark.parametrize("case", STACKS)
def test_crafted_stacks(folder, case):
    change, message = STACKS[case]
    rewrite(folder, change)
    refused(folder, message)


def test_a_file_of_stacks_that_was_cut_short(folder):
    path = stacks_of(folder)
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "is not a whole safetensors file")
    path.unlink()
    os.mkfifo(path)
    refused(folder, "is not a file that can be read")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    path = stacks_of(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, "a link that leads out of the pool's folder")
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    header = folder / "experts/bias/adapter_model.header"
    header.rename(tmp_path / "header")
    header.symlink_to(tmp_path / "header")
    refused(folder, "a link that leads out of the pool's folder")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "expert.json", "adapter_model.header", "gates.header", "rest.safetensors"]
)
@pytest.mark.parametrize("verify", [True, False])
def test_damaged_small_files(folder, name, verify):
    path = folder / "experts/bias" / name
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    refused(folder, str(path) if verify or name != "rest.safetensors" else "rest.safetensors", verify)
    path.unlink()
    refused(folder, f"{name} (does not exist|is missing)")


def test_gates_must_fit_the_adapter(folder):
    """Headers that their hashes vouch for, and that don't belong together."""
    place = folder / "experts/bias"
    raw = (place / "gates.header").read_bytes()
    for old, new, message in (
        (b'"F32","shape":[48]', b'"BF16","shape":[96]', "gate of .*down_proj has shape"),
        (
            b"layers.0.self_attn.q_proj",
            b"layers.7.self_attn.q_proj",
            "no gate for module",
        ),
        (b'"adapter_sha256":"', b'"adapter_sha256":"0', "gates.safetensors was made with another adapter"),
    ):
        text = raw[8:].replace(old, new)
        assert text != raw[8:]
        (place / "gates.header").write_bytes(len(text).to_bytes(8, "little") + text)
        manifest = read_json(folder / "pool.json", PoolError)
        manifest["experts"][1]["packed"]["files"]["gates.header"] = sha256_file(place / "gates.header")
        write_json(folder / "pool.json", manifest)
        refused(folder, message)


@given(st.lists(st.integers(0, 5)))
def test_runs_are_the_rows(rows):
    assert expand_runs(to_runs(rows), [9] * len(rows), "here") == rows
    assert len(to_runs(rows)) <= len(rows)
