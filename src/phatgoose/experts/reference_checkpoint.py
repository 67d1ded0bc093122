"""Import the paper authors' checkpoints: one torch file becomes a pool with gates.

These are its keys, for expert i, and the update of that expert at a module with input u [d_in]:

    <module>._addons.expert_lora.layer1__<i>          L1 [d_in, 16]
    <module>._addons.expert_lora.layer2__<i>          L2 [16, d_out]        Δ(u) = (u L1 L2) / 16
    <module>._addons.router.expert_embeddings__<i>    the gate v [d_in]

So A = L1ᵀ, B = L2ᵀ and alpha 1 at rank 16. <module> is the module's path in the base. The files also hold the
base's token embeddings under T5's names for them. Training didn't change them: they are compared with the base's, not
used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, PoolError, brief
from phatgoose.experts.adapters.peft import PREFIX
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import check_finite
from phatgoose.experts.files.torch_file import map_torch_file
from phatgoose.experts.manifest import new_manifest
from phatgoose.experts.names import check_name
from phatgoose.experts.pool import place_expert, write_pool
from phatgoose.files import atomic_folder
from phatgoose.records import Fingerprint

RANK = 16
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
AT_ONCE_BYTES = 4 * 2**30
"""The file is mapped again after so much of it was read, since pages that were read count as this process' memory."""
_KEY = re.compile(
    r"(?P<module>[^\s]+)\._addons\.(?P<part>expert_lora\.layer1|expert_lora\.layer2|router\.expert_embeddings)"
    r"__(?P<i>0|[1-9][0-9]{0,5})"
)
_PARTS = ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")


@dataclass(frozen=True, eq=False)
class BaseShape:
    """What an import must know of the base, without its weights."""

    spec: str
    linears: Mapping[str, tuple[int, int]]
    """Path of every linear layer → d_in, d_out."""
    parameters: Mapping[str, tuple[int, ...]]
    """Name of every parameter → its shape."""
    encoder_decoder: bool
    fingerprint: Fingerprint | None = None
    """None without the base's weights."""
    is_own: Callable[[str, Tensor], bool] | None = field(default=None, repr=False)
    """Whether a tensor is the base's own parameter of this name, up to rounding; None without the base's weights."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, known without reading a value of an expert."""

    experts: int
    modules: tuple[str, ...]
    """In the base's order."""
    copies: Mapping[str, str]
    """The base's parameters in it → "the base's own", or "not compared" without the base's weights."""


def inspect_checkpoint(checkpoint: Path, tensors: Mapping[str, Tensor], base: BaseShape) -> Contents:
    """What is in a checkpoint: it must be whole experts of this base, the base's own embeddings, and nothing else."""
    found, count = set[str](), 0
    copies = {}
    for key, tensor in tensors.items():
        if key in COPIES and key in base.parameters:
            copies[key] = _compare_copy(checkpoint, key, tensor, base)
            continue
        if (match := _KEY.fullmatch(key)) is None:
            raise ExpertError(
                f"{checkpoint}: unknown key {brief(key)}; expected <module>._addons.expert_lora.layer1__<i>, "
                "…layer2__<i> and <module>._addons.router.expert_embeddings__<i>."
            )
        module, part = match["module"], match["part"]
        if module not in base.linears:
            raise ExpertError(
                f"{checkpoint}: {brief(key)} is of {brief(module)}, and the base {base.spec!r} has no linear layer "
                "of that name."
            )
        d_in, d_out = base.linears[module]
        expected = {"layer1": (d_in, RANK), "layer2": (RANK, d_out)}.get(part.rpartition(".")[2], (d_in,))
        if tuple(tensor.shape) != expected:
            raise ExpertError(
                f"{checkpoint}: {key} has shape {list(tensor.shape)}, expected {list(expected)}."
            )
        found.add(module)
        count = max(count, int(match["i"]) + 1)
    if not found:
        raise ExpertError(f"{checkpoint}: there is no expert in it.")
    modules = tuple(path for path in base.linears if path in found)
    for number in range(count):
        if missing := [key for key in _keys(modules, number) if key not in tensors]:
            raise ExpertError(f"{checkpoint}: {missing[0]} is missing; other parts go from 0 to {count - 1}.")
    return Contents(count, modules, copies)


def _keys(modules: Sequence[str], number: int) -> list[str]:
    """The keys of one expert: of each module, its _PARTS."""
    return [f"{module}._addons.{part}__{number}" for module in modules for part in _PARTS]


def import_reference(
    checkpoint: str | Path,
    base: BaseShape,
    out: str | Path,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Contents:
    """Writes a pool of all experts of a checkpoint, as PEFT folders with gates: one expert at a time, all or none.

    Args:
        names: the experts' names, in their order in the checkpoint; expert-0, expert-1, … if None.
        progress: called with the number of experts written and of all.

    Raises:
        ExpertError: anything in the file that isn't expected, values that aren't finite included.
        PoolError: `out` holds something, or the names don't fit. StorageError: no space or no permission.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PoolError(f"{out} exists and isn't empty; choose another folder.")
    contents = inspect_checkpoint(checkpoint, map_torch_file(checkpoint), base)
    called = _expert_names(names, contents.experts)
    config = _config(base, contents)
    with atomic_folder(out) as work:
        entries = []
        for i, tensors in _one_by_one(checkpoint, contents):
            expert = _build_expert(checkpoint, contents, config, base, i, called[i], tensors)
            entries.append(place_expert(work, expert, []))
            progress(i + 1, contents.experts)
        write_pool(work, new_manifest(entries, base.fingerprint.to_json() if base.fingerprint else None))
    return contents


def _one_by_one(checkpoint: Path, contents: Contents) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every expert's number and tensors; the file is mapped again before too much of it is in memory."""
    tensors: dict[str, Tensor] = {}
    used = AT_ONCE_BYTES
    for i in range(contents.experts):
        if used >= AT_ONCE_BYTES:
            tensors.clear()  # the old mapping goes with its last tensor, and its pages with it
            tensors, used = map_torch_file(checkpoint), 0
        own = {key: tensors[key] for key in _keys(contents.modules, i)}
        used += sum(t.numel() * t.element_size() for t in own.values())
        yield i, own


def _build_expert(
    checkpoint: Path,
    contents: Contents,
    config: Mapping[str, Any],
    base: BaseShape,
    number: int,
    name: str,
    found: Mapping[str, Tensor],
) -> Expert:
    tensors, gates = {}, {}
    for key, tensor in found.items():
        check_finite(tensor, f"{checkpoint}: {key}")
    for module in contents.modules:
        down, up, gate = (found[key] for key in _keys([module], number))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.T.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.T.contiguous()
        gates[module] = gate.to(torch.float32)
    source = {
        "format": "reference checkpoint",
        "file": checkpoint.name,
        "expert": number,
        "experts": contents.experts,
        "base_copies": dict(contents.copies),
    }
    provenance: dict[str, Any] = {"kind": "imported", "source": source, "gate": {"kind": "imported"}}
    if base.fingerprint is not None:
        provenance["base"] = base.fingerprint.to_json()
    return Expert(name, config, tensors, gates, provenance)


def _config(base: BaseShape, contents: Contents) -> dict[str, Any]:
    """PEFT's config. The modules are named by the last part of their paths, if that means just these in this base."""
    last = {path.rpartition(".")[2] for path in contents.modules}
    meant = [path for path in base.linears if path.rpartition(".")[2] in last]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base.spec,
        "r": RANK,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(last) if len(meant) == len(contents.modules) else list(contents.modules),
        "inference_mode": True,
    }


def _compare_copy(checkpoint: Path, key: str, tensor: Tensor, base: BaseShape) -> str:
    if tuple(tensor.shape) != base.parameters[key]:
        raise ExpertError(
            f"{checkpoint}: {key} has shape {list(tensor.shape)}, and the base {base.spec!r} has "
            f"{list(base.parameters[key])}."
        )
    if base.is_own is None:
        return "not compared"
    if not base.is_own(key, tensor):
        raise ExpertError(
            f"{checkpoint}: {key} is not that of the base {base.spec!r}. The experts were trained on another base, "
            "or with other embeddings, which can't be routed."
        )
    return "the base's own"


def _expert_names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"expert-{i}" for i in range(count)]
    if len(names) != count:
        raise PoolError(f"there are {len(names)} names and {count} experts; one name per expert is needed.")
    for i, name in enumerate(names):
        check_name(name)
        if name in names[:i]:
            raise PoolError(f"the name {name!r} is given to experts {names.index(name)} and {i}.")
    return list(names)
