"""What is valid in a pool but not what one wants: an expert or a gate that is wildly off the others', above all.

Everything is measured from factors: of an update B A, ‖B A‖² = Σ (BᵀB) ∘ (AAᵀ), matrices of r × r.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import brief
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import all_identical
from phatgoose.experts.files.tokenizer_files import differences, without_base
from phatgoose.ops.update import Update

FACTOR, DEVIATIONS = 20.0, 3.0
"""Wildly off: more than a factor of 20 · e^(3σ) from the median at the same module, where σ is 1.4826 times the median absolute
deviation of the logarithms. Experts that were trained alike differ by less than a factor of 4."""
LARGEST = 1e6
"""A norm that no update of a language model's layer has."""
FLAT = 1e-5
"""A gate is constant if its standard deviation is below so much of its mean: what is left of it is rounding."""
PARALLEL, MODULES = 0.99, 32
"""Two gates say the same if their cosine is above this at more than half of at most 32 modules that both experts adapt."""


def warnings(
    experts: Sequence[Expert], weight_norms: Mapping[str, float] | None = None, tokenizer: Any = None
) -> list[str]:
    """What a user should know about these experts of one pool.

    Args:
        weight_norms: Frobenius norms of the base's weights by module path, if the base is at hand.
        tokenizer: the base's, if it is at hand.
    """
    provenances = {e.name: e.provenance for e in experts}
    return [
        *_bases(experts),
        *_incomplete(experts, compared=weight_norms is not None),
        *wildly_off(experts, weight_norms),
        *_alone(experts),
        *_twice(experts),
        *(without_base(provenances) if tokenizer is None else differences(provenances, tokenizer)),
    ]


def wildly_off(experts: Sequence[Expert], weight_norms: Mapping[str, float] | None = None) -> list[str]:
    """Experts whose updates or gates are of quite another size than the others', or can't mean anything."""
    found, alike = _Found(), _Alike()
    paths = list(dict.fromkeys(path for e in experts for path in e.updates))
    for number, path in enumerate(paths):  # one module's tensors at a time: a pool may be larger than memory
        sizes: dict[str, dict[str, float]] = defaultdict(dict)
        gates: dict[str, Tensor] = {}
        for expert in (e for e in experts if path in e.updates):
            for part, size in strengths(expert.updates[path]):
                sizes[part][expert.name] = size
                if part in ("update", "VeRA vectors") and size == 0:
                    found.add(expert.name, "its update is zero, so it does nothing,", path)
            if expert.gates is not None:
                gate = expert.gates[path].double()
                if _is_flat(gate):
                    found.add(expert.name, "its gate is constant, so it says nothing,", path)
                else:
                    gates[expert.name] = gate - gate.mean()
        sizes["gate"] = {name: float(gate.norm()) for name, gate in gates.items()}
        for part, values in sizes.items():
            for name, ratio in outliers(values).items():
                found.add(name, _OFF[part], path, ratio)
            for name, size in values.items():
                if not size <= LARGEST:
                    found.add(
                        name, f"the norm of its {part} is above {LARGEST:.0e}, which nothing sane is,", path
                    )
                if (times := _against_base(part, size, (weight_norms or {}).get(path, 0.0))) is not None:
                    found.add(name, _BASE[part], path, times)
        if number % max(1, len(paths) // MODULES) == 0:
            alike.look(gates)
    return [*found.texts(), *alike.texts()]


_OFF = {
    "update": "its update's norm is {ratio} times the median of the experts'",
    "bias": "its bias' norm is {ratio} times the median of the experts'",
    "output scale": "it scales outputs {ratio} times as far from 1 as the experts' median",
    "input scale": "it scales inputs {ratio} times as far from 1 as the experts' median",
    "DoRA magnitude": "its DoRA magnitude is {ratio} times the median of the experts'",
    "VeRA vectors": "the product of its VeRA vectors' norms is {ratio} times the median of the experts'",
    "bottleneck": "its bottleneck's norm is {ratio} times the median of the experts'",
    "gate": "its gate's norm is {ratio} times the median of the experts'",
}
_BASE = {
    "update": "its update's norm is {ratio} times the base's own weight's",
    "DoRA magnitude": "its DoRA magnitude makes the weight's norm {ratio} times the base's own",
}


def strengths(update: Update) -> Iterator[tuple[str, float]]:
    """How large each part of an update is, comparable between experts at one module: name, norm in float64.

    "update" is ‖scale · B A‖, "bias" ‖scale · bias‖ (Frobenius norms); of scales c the root mean square of c − 1; of VeRA ‖b‖ ‖d‖, since only the base knows its matrices; of a bottleneck
    adapter the bound |scale| ‖up‖ ‖down‖.
    """
    if update.rank:
        a, b = update.A.double(), update.B.double()
        yield "update", abs(update.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
    for name, vector in update.vectors(torch.float64).items():
        root_mean_square = float(vector.square().mean().sqrt())
        yield name.replace("_", " "), float(vector.norm()) if name == "bias" else root_mean_square
    if update.magnitude is not None:
        yield "DoRA magnitude", float(update.magnitude.double().norm())
    if update.shared is not None:
        yield "VeRA vectors", float(update.shared.b.double().norm()) * float(update.shared.d.double().norm())
    if (narrow := update.bottleneck) is not None:
        yield (
            "bottleneck",
            abs(narrow.scale) * float(narrow.up.double().norm()) * float(narrow.down.double().norm()),
        )


def outliers(values: Mapping[str, float]) -> dict[str, float]:
    """Those of some positive numbers that are wildly off, by name, and how many times the median they are; zeros don't count.

    Of two numbers nobody can say which is off: then it is the larger one, compared with the other.
    """
    logs = {name: math.log(value) for name, value in values.items() if 0 < value < math.inf}
    if len(logs) < 2:
        return {}
    center = statistics.median(logs.values()) if len(logs) > 2 else min(logs.values())
    spread = statistics.median(abs(x - center) for x in logs.values()) if len(logs) > 2 else 0.0
    limit = math.log(FACTOR) + DEVIATIONS * 1.4826 * spread
    return {name: math.exp(min(x - center, 700)) for name, x in logs.items() if abs(x - center) > limit}


class _Found:
    """The same finding at many modules, told once: with their number, and the worst."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], list[tuple[float, str, float | None]]] = defaultdict(list)

    def add(self, name: str, text: str, path: str, ratio: float | None = None) -> None:
        far = abs(math.log(ratio)) if ratio else 0.0
        self._at[name, text].append((far, path, ratio))

    def texts(self) -> Iterator[str]:
        for (name, text), places in self._at.items():
            _, path, ratio = max(places, key=lambda place: place[0])
            if "{ratio}" in text:
                where = f" at {path}" + (
                    f", and so at {len(places) - 1} more modules" if len(places) > 1 else ""
                )
                yield f"{name}: {text.format(ratio=f'{ratio:.3g}')}{where}; is its scale right?"
            else:
                yield f"{name}: {text} at {len(places)} modules (first: {places[0][1]})."


def _against_base(part: str, size: float, weight: float) -> float | None:
    """How many times the base's weight a part is, if that is too much: an update larger than the weight, a DoRA magnitude (the
    norm of its whole weight) twice or half of it."""
    if weight <= 0 or part not in _BASE:
        return None
    ratio = size / weight
    return (
        ratio
        if (part == "update" and ratio > 1) or (part == "DoRA magnitude" and not 0.5 <= ratio <= 2)
        else None
    )


def _is_flat(gate: Tensor) -> bool:
    std = float(gate.std(correction=0))
    return std < 1e-6 or std < FLAT * abs(float(gate.mean()))


class _Alike:
    """Pairs of experts whose gates point the same way: whatever one wants, the other wants too."""

    def __init__(self) -> None:
        self._both: Counter[tuple[str, str]] = Counter()
        self._same: Counter[tuple[str, str]] = Counter()

    def look(self, gates: Mapping[str, Tensor]) -> None:
        """At one module: gates without their means, by expert. Of two values they could only be parallel."""
        names = [name for name, gate in gates.items() if len(gate) > 2]
        if len(names) < 2:
            return
        rows = torch.nn.functional.normalize(torch.stack([gates[name] for name in names]))
        cosines = rows @ rows.T
        for i, one in enumerate(names):
            for j, other in enumerate(names[:i]):
                self._both[other, one] += 1
                self._same[other, one] += bool(cosines[i, j] > PARALLEL)

    def texts(self) -> Iterator[str]:
        for (one, other), count in self._same.items():
            if count > self._both[one, other] / 2:
                yield f"{one} and {other}: their gates are nearly parallel, so wherever one is chosen, the other is as well."


def _bases(experts: Sequence[Expert]) -> Iterator[str]:
    """Different names of bases in the experts' configs, where no fingerprints say that they are one base."""
    names: dict[str, list[str]] = defaultdict(list)
    for expert in experts:
        if expert.base_name is not None:
            names[expert.base_name.rstrip("/")].append(expert.name)
    checked = {e.base_name.rstrip("/") for e in experts if e.base_name is not None and e.base is not None}
    if len(names.keys() - checked) + bool(checked) < 2:
        return
    listed = "; ".join(
        f"{brief(base)} ({', '.join(owners[:8])}{f' and {len(owners) - 8} more' if len(owners) > 8 else ''})"
        for base, owners in names.items()
    )
    yield (
        f"{DIFFERENT_BASES}: {listed}. These may be copies of one model, or models of one shape; without a recorded base nobody can "
        "tell here. Make sure that all were trained on one base: on another, an expert computes nonsense."
    )


DIFFERENT_BASES = "the experts' configs name different bases"


def _incomplete(experts: Sequence[Expert], compared: bool) -> Iterator[str]:
    """`compared`: whether the experts were routed in the base already, which compares weights that they bring."""
    for expert in experts:
        if expert.adapter_config.get("modules_to_save") and expert.base_copies and not compared:
            yield (
                f"{expert.name}: brings its own {', '.join(expert.base_copies)}, and is refused on a base whose weights differ from "
                "these (`phatgoose pool verify --base` compares them)."
            )
        if expert.base is None:
            yield f"{expert.name}: records no base, so it can't be checked that it was trained on this one."
        if expert.gates is None:
            yield f"{expert.name}: has no gates; PHATGOOSE can't route to it until they are trained (`phatgoose gate`)."
        if dropped := expert.provenance.get("dropped"):
            yield f"{expert.name}: leaves out {', '.join(dropped)} of its adapter, as its record says; it computes something else."


def _alone(experts: Sequence[Expert]) -> Iterator[str]:
    owners: dict[str, list[str]] = defaultdict(list)
    for expert in experts:
        for path in expert.updates:
            owners[path].append(expert.name)
    alone: dict[str, list[str]] = defaultdict(list)
    for path, names in owners.items():
        if len(experts) > 1 and len(names) == 1:
            alone[names[0]].append(path)
    for name, paths in alone.items():
        yield (
            f"{name}: the only expert at {len(paths)} modules (first: {paths[0]}); there it competes only with the null candidate."
        )


def _twice(experts: Sequence[Expert]) -> Iterator[str]:
    alike: dict[bytes, list[Expert]] = defaultdict(list)
    for expert in experts:
        alike[_glance(expert)].append(expert)
    for group in alike.values():
        for i, one in enumerate(group):
            for other in group[:i]:
                if all_identical(one.tensors, other.tensors):
                    yield f"{other.name} and {one.name}: the same adapter twice; together they take both places of a top-2."


def _glance(expert: Expert) -> bytes:
    """Names, shapes and one tensor of an adapter: what differs here differs."""
    digest = hashlib.sha256()
    for key in sorted(expert.tensors):
        tensor = expert.tensors[key]
        digest.update(f"{key}{tensor.dtype}{list(tensor.shape)}".encode())
    smallest = min(sorted(expert.tensors), key=lambda key: expert.tensors[key].numel())
    digest.update(
        expert.tensors[smallest].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )
    return digest.digest()
