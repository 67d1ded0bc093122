"""Every reader of files that somebody else may have made, as something to feed changed files to. Another reader
is another entry.

A target's seeds are folders of valid files; `read` reads a folder in which one or two files were changed, and
uses what it got. It must return, or raise a PhatgooseError.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_reference
import fuzz_seeds
import torch

from phatgoose.errors import PhatgooseError
from phatgoose.experts.adapters.peft_patterns import Patterns
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import parse_header, read_header, read_tensor_file
from phatgoose.experts.hub.place import Place
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.fingerprints import same_base
from phatgoose.records import Fingerprint
from phatgoose.strict_json import parse_json


@dataclass(frozen=True)
class Target:
    """A reader."""

    seeds: Callable[[Path], list[Path]]
    """Makes valid folders below the one given."""
    read: Callable[[Path, random.Random], object]
    """Reads a folder."""
    files: tuple[str, ...]
    """Ends of the names of files that are changed."""
    weight: int = 1
    """Its share of all inputs."""


def _adapter(folder: Path, rng: random.Random) -> None:
    _use(Expert.from_peft(folder, name="a"), folder, rng)


def _expert(folder: Path, rng: random.Random) -> None:
    drop = ("modules_to_save", "trainable_token_indices") if rng.random() < 0.2 else ()
    _use(Expert.load(folder, drop=drop), folder, rng)


def _use(expert: Expert, folder: Path, rng: random.Random, finite: bool = True) -> None:
    """What got through must be whole: finite, of the sizes it says, and the same when it is written and read again."""
    repr(expert)
    for update in expert.updates.values():
        for _, tensor in update.parts():
            assert tensor.is_floating_point()
            # Whether it fits the dtype that a module computes in is asked when it is routed.
            assert not finite or bool(torch.isfinite(tensor.double()).all())
        assert abs(update.scale) < 3.5e38
        assert update.kind
    for path, gate in (expert.gates or {}).items():
        assert gate.dtype == torch.float32
        assert path in expert.updates
    if expert.signature is not None:
        _use_signature(expert.signature, expert)
    if rng.random() < 0.05:
        Pool([expert, expert.renamed("other")]).warnings()
        copy = folder.parent / "copy"
        assert Expert.load(expert.save(copy)).equals(expert)
        shutil.rmtree(copy)


def _use_signature(signature: DataSignature, expert: Expert) -> None:
    assert signature.hash
    for path, mean in (signature.activations or {}).items():
        assert path in expert.updates
        assert mean.dtype == torch.float32
        assert bool(mean.isfinite().all())
    if signature.texts is not None:
        assert len(signature.texts) <= 1000
        assert len(signature.encoder or "") in range(1, 201)
        assert float((signature.texts.norm(dim=1) - 1).abs().max()) < 0.01


def _pool(folder: Path, rng: random.Random) -> None:
    pool = Pool.load(folder, verify=rng.random() < 0.3)
    pool.warnings()
    for expert in pool.experts:
        _use(expert, folder, rng)


def _packed(folder: Path, rng: random.Random) -> None:
    """Opening reads no values of a packed pool; `pool verify` does."""
    from phatgoose.experts.pool_folder import verify_folder

    whole = rng.random() < 0.4
    pool = verify_folder(folder) if whole else Pool.load(folder, verify=rng.random() < 0.3)
    for expert in pool.experts:
        _use(expert, folder, rng, finite=whole)
    if whole:
        pool.warnings()


def _change_pool(folder: Path, rng: random.Random) -> None:
    """Adding and removing touch the disk: nothing but the pool's folder may change."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "file").write_text("here")
    try:
        if rng.random() < 0.5:
            remove_from_folder(folder, "bias")
        else:
            add_to_folder(folder, Expert.load(folder / "experts/lora", name="new"))
    finally:
        assert (outside / "file").read_text() == "here"


def _tensors(folder: Path, rng: random.Random) -> None:
    path = folder / "adapter_model.safetensors"
    read_header(path)
    read_tensor_file(path)


def _header(folder: Path, rng: random.Random) -> None:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    raw = raw[: 8 + int.from_bytes(raw[:8], "little") % 2**20]
    header = parse_header(raw, "here")
    assert parse_header(raw, "here", known={}).items == header.items


def _json(folder: Path, rng: random.Random) -> None:
    raw = (folder / "expert.json").read_bytes()
    try:
        data = parse_json(raw)
    except ValueError:
        return
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    assert data == json.loads(raw)


def _fingerprint(folder: Path, rng: random.Random) -> None:
    try:
        data = parse_json((folder / "expert.json").read_bytes())
        found = Fingerprint.from_json(data["provenance"]["base"])
    except (ValueError, KeyError, TypeError, IndexError):
        return
    base = Fingerprint.from_json(fuzz_seeds.BASE)
    assert same_base(found, base).level == same_base(base, found).level


_PATTERN = [
    "a", "q_proj", "layers", ".", r"\.", "*", "+", "?", "(", ")", "(?:", "|", "[", "]", "^", "-", "$", "{2}",
    "{1,9}", "{", "\\", "é", "[a-z]", r"\d", ".*", "(?=", "(?P<a>", r"\1", "(a+)+", "1", "😀", "\n", "\x00",
]  # fmt: skip


def _patterns(folder: Path, rng: random.Random) -> None:
    keys = ["".join(rng.choice(_PATTERN) for _ in range(rng.randrange(12))) for _ in range(rng.randrange(4))]
    setting = Patterns({key: i for i, key in enumerate(keys)}, "rank_pattern", "here")
    for _ in range(3):
        setting.find(
            "".join(
                rng.choice(["a", "layers", ".", "q_proj", "1", "aaaaaaaa"]) for _ in range(rng.randrange(40))
            ),
            None,
        )


_PLACE = [
    "org",
    "/",
    "name",
    "@",
    ":",
    "main",
    "..",
    "\\",
    "0" * 40,
    "\x00",
    "é",
    "\n",
    " ",
    "a" * 300,
    "-",
    ".",
]


def _place(folder: Path, rng: random.Random) -> None:
    place = Place.parse("".join(rng.choice(_PLACE) for _ in range(rng.randrange(9))))
    assert ".." not in place.path("x").split("/")


TARGETS: dict[str, Target] = {
    "json": Target(fuzz_seeds.expert_folders, _json, ("expert.json",), 2),
    "header": Target(fuzz_seeds.adapter_folders, _header, ("adapter_model.safetensors",), 4),
    "tensors": Target(fuzz_seeds.adapter_folders, _tensors, ("adapter_model.safetensors",), 3),
    "config": Target(fuzz_seeds.adapter_folders, _adapter, ("adapter_config.json",), 4),
    "weights": Target(fuzz_seeds.adapter_folders, _adapter, ("adapter_model.safetensors",), 4),
    "gates": Target(fuzz_seeds.expert_folders, _expert, ("gates.safetensors",), 2),
    "signature": Target(fuzz_seeds.expert_folders, _expert, ("signature.safetensors",), 2),
    "record": Target(fuzz_seeds.expert_folders, _expert, ("expert.json",), 3),
    "expert": Target(fuzz_seeds.expert_folders, _expert, ("",), 2),
    "pool": Target(fuzz_seeds.pool_folders, _pool, ("pool.json",), 2),
    "change-pool": Target(fuzz_seeds.pool_folders, _change_pool, ("pool.json",), 1),
    "fingerprint": Target(fuzz_seeds.expert_folders, _fingerprint, ("expert.json",), 1),
    "patterns": Target(lambda folder: [], _patterns, (), 1),
    "place": Target(lambda folder: [], _place, (), 1),
}


def _adapterhub_folders(folder: Path) -> list[Path]:
    config, tensors = fuzz_seeds.bottleneck()
    fuzz_seeds.write_adapter(folder / "bottleneck", config, tensors, "adapter.safetensors")
    interface = {
        "layer_self_attn": "self_attn", "attn_o_proj": "o_proj", "layer_output_proj": "mlp.down_proj",
        "layer_pre_self_attn": "input_layernorm", "layer_pre_ffn": "post_attention_layernorm",
    }  # fmt: skip
    (folder / "bottleneck/adapter_interface.json").write_text(json.dumps({"interface": interface}))
    return [folder / "bottleneck"]


def _packed_folders(folder: Path) -> list[Path]:
    from phatgoose.experts.packed.pack import pack

    return fuzz_seeds.pool_folders(folder, pack)


TARGETS["adapterhub"] = Target(_adapterhub_folders, _expert, ("",), 3)
TARGETS["reference"] = Target(fuzz_reference.folders, fuzz_reference.read, ("checkpoint.pt",), 3)
TARGETS["packed"] = Target(_packed_folders, _packed, ("",), 3)


def _broken(folder: Path, rng: random.Random) -> None:
    """What must be noticed, in some of the inputs."""
    kind = rng.randrange(40)
    if kind == 0:
        raise ValueError("unforeseen")
    if kind == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 2:
        while True:
            pass
    if kind == 3:
        bytearray(2**31)
    if kind == 4:
        raise PhatgooseError("x" * 10_000)
    if kind == 5:
        raise PhatgooseError("\ud800")


BROKEN = {"broken": Target(lambda folder: [], _broken, ())}
"""Not a reader, and run only by name: it shows that what goes wrong is found."""
