"""What holds for all adapters, pools and manifests, tried on random ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from adapter_strategies import NUMBERS, RECORDS, SIZES, TEXTS, adapters, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import read_header
from phatgoose.experts.manifest import read_manifest
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder

OFTEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
BASE = {"spec": "tiny", "architecture": {"model_type": "llama"}, "samples": {"embedding": [0.5, -1e-3]}}


def gates_for(expert, seed):
    return {
        p: tensor(seed + i, torch.float32, u.gate_dim or 4) for i, (p, u) in enumerate(expert.updates.items())
    }


def written(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow(10)
@OFTEN
@given(adapters(), NAMES, RECORDS, st.booleans(), st.none() | st.integers(0, 99))
def test_whatever_is_saved_is_loaded_again(adapter, name, record, based, gates):
    config, tensors, deltas = adapter
    if based:
        record = {**record, "base": BASE}
    with tempfile.TemporaryDirectory() as place:
        source = written(Path(place) / "peft", config, tensors)
        expert = Expert.from_peft(source, name=name, provenance=record)
        if gates is not None:
            expert = expert.with_gates(gates_for(expert, gates), {"kind": "gate"})
        for start in (
            expert,
            Expert(name, config, tensors, expert.gates, expert.provenance),
        ):  # of a folder, of memory
            folder = start.save(Path(place) / "saved")
            found = Expert.load(folder)
            assert found.equals(expert)
            assert found.hash == expert.hash
            assert found.name == name
            assert found.provenance == expert.provenance
            assert (found.base is not None) == based
            plain = load_file(folder / "adapter_model.safetensors")
            assert plain.keys() == tensors.keys()
            assert all(torch.equal(plain[k].float(), t.float()) for k, t in tensors.items())
        assert Expert.load(expert.save(folder)).equals(expert)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / file).read_bytes() == (source / file).read_bytes()
        for path, delta in deltas.items():
            assert torch.allclose(found.updates[path].weight().double(), delta, rtol=1e-4, atol=1e-5)
            assert (found.updates[path].d_in, found.updates[path].d_out) == SIZES[path]
        changed = dict(expert.gates or {})
        if changed:
            path = next(iter(changed))
            changed[path] = changed[path] + 1
            assert not found.equals(expert.with_gates(changed, {"kind": "gate"}))


@pytest.mark.slow(4)
@OFTEN
@given(st.data())
def test_a_changed_byte_of_an_adapter_is_noticed(data):
    """The hash in expert.json covers every byte of the tensors' files."""
    config, tensors, _ = data.draw(adapters())
    with tempfile.TemporaryDirectory() as place:
        expert = Expert.from_peft(written(Path(place) / "peft", config, tensors), name="a")
        folder = expert.with_gates(gates_for(expert, 1)).save(Path(place) / "saved")
        path = folder / data.draw(st.sampled_from(["adapter_model.safetensors", "gates.safetensors"]))
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        with pytest.raises(PhatgooseError, match=path.name):
            Expert.load(folder)


@settings(OFTEN, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=5,
    )
    | st.fixed_dictionaries(
        {},
        optional={
            "format": st.just("phatgoose-pool") | TEXTS,
            "version": st.sampled_from([1, 2, 1.0, True, "1", None]),
            "base": st.none() | TEXTS,
            "packed": st.none() | st.dictionaries(TEXTS, NUMBERS, max_size=2),
            "experts": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "name": NAMES | TEXTS,
                        "folder": NAMES.map("experts/{}".format) | TEXTS | TEXTS.map("experts/{}".format),
                        "files": st.dictionaries(
                            st.sampled_from(["expert.json", "gates.safetensors", "../x", ""]),
                            st.just("0" * 64) | TEXTS,
                        ),
                        "source": st.none() | TEXTS | st.dictionaries(TEXTS, TEXTS, max_size=3),
                    },
                ),
                max_size=3,
            ),
        },
    )
)
def test_any_json_is_a_manifest_or_refused(manifest):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "pool.json").write_text(json.dumps(manifest))
        try:
            entries = read_manifest(folder)["experts"]
        except PoolError:
            entries = []
        for entry in entries:
            inside = (folder / entry["folder"]).resolve()
            assert inside.parent == (folder / "experts").resolve()
            assert all((inside / name).parent == inside for name in entry["files"])
        with pytest.raises(PhatgooseError):  # there are no experts
            Pool.load(folder)


@OFTEN
@given(adapters(), RECORDS)
def test_headers_say_what_the_file_holds(adapter, record):
    _, tensors, _ = adapter
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.safetensors"
        save_file(tensors, path, {k: json.dumps(v) for k, v in record.items()})
        raw, header = read_header(path)
        assert {k: (i.dtype, i.shape) for k, i in header.items.items()} == {
            k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()
        }
        assert header.metadata == {k: json.dumps(v) for k, v in record.items()}
        data = path.read_bytes()
        for key, item in header.items.items():
            found = torch.frombuffer(
                bytearray(data[len(raw) + item.begin : len(raw) + item.end]), dtype=item.dtype
            )
            assert torch.equal(found.float(), tensors[key].reshape(-1).float())


class PoolOnDisk(RuleBasedStateMachine):
    """A pool's folder, changed one expert at a time, against a dictionary of what must be in it."""

    names = st.sampled_from(["a", "b", "c", "A", "a.2", "b-"])

    @initialize()
    def begin(self):
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "pool"
        self.expected: dict[str, str] = {}

    def expert(self, name, seed, gates):
        rank = 1 + seed % 3
        (d_in, d_out), path = SIZES["lm_head"], "lm_head"
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1 + seed}
        tensors = {
            f"base_model.model.{path}.lora_A.weight": tensor(seed, torch.float32, rank, d_in),
            f"base_model.model.{path}.lora_B.weight": tensor(seed + 1, torch.float32, d_out, rank),
        }
        expert = Expert(name, config, tensors, provenance={"seed": seed})
        return expert.with_gates(gates_for(expert, seed)) if gates else expert

    @rule(name=names, seed=st.integers(0, 9), gates=st.booleans())
    def add(self, name, seed, gates):
        expert = self.expert(name, seed, gates)
        if name in self.expected:
            with pytest.raises(PoolError, match="two experts are named"):
                add_to_folder(self.folder, expert)
        else:
            add_to_folder(self.folder, expert)
            self.expected[name] = expert.hash

    @rule(name=names)
    def remove(self, name):
        if not (self.folder / "pool.json").exists():
            return
        if name in self.expected:
            remove_from_folder(self.folder, name)
            del self.expected[name]
        else:
            with pytest.raises(PhatgooseError, match="unknown expert"):
                remove_from_folder(self.folder, name)

    @precondition(lambda self: self.expected)
    @rule(seed=st.integers(0, 9), name=names)
    def save_the_whole_with_one_replaced(self, seed, name):
        kept = [e for e in Pool.load(self.folder).experts if e.name != name]
        new = self.expert(name, seed, True)
        Pool([*kept, new]).save(self.folder)
        self.expected = {n: h for n, h in self.expected.items() if n != name} | {name: new.hash}

    @precondition(lambda self: self.expected)
    @rule(index=st.integers(0, 5))
    def damage_and_remove(self, index):
        name = list(self.expected)[index % len(self.expected)]
        entry = next(e for e in read_manifest(self.folder)["experts"] if e["name"] == name)
        (self.folder / entry["folder"] / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(PhatgooseError, match="damaged"):
            Pool.load(self.folder)
        remove_from_folder(self.folder, name)
        del self.expected[name]

    @invariant()
    def holds_what_it_should(self):
        if not (self.folder / "pool.json").exists():
            assert not self.expected
            return
        if not self.expected:
            with pytest.raises(PoolError, match="empty pool"):
                Pool.load(self.folder)
        else:
            assert {e.name: e.hash for e in Pool.load(self.folder).experts} == self.expected
            assert list(Pool.load(self.folder, verify=False).names) == list(self.expected)
        folders = {p.name for p in (self.folder / "experts").iterdir()}
        assert folders == {
            e["folder"].removeprefix("experts/") for e in read_manifest(self.folder)["experts"]
        }

    def teardown(self):
        if hasattr(self, "place"):
            self.place.cleanup()


TestPoolOnDisk = PoolOnDisk.TestCase
TestPoolOnDisk.settings = settings(OFTEN, max_examples=12, stateful_step_count=10)
