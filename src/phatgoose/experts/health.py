"""Warnings about valid pools that are probably wrong: outliers, useless gates, duplicates.

Norms are computed from factors: of an update B A, ‖B A‖² = Σ (BᵀB) ∘ (AAᵀ), matrices of r × r.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from phatgoose.errors import brief
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import all_identical, bytes_of
from phatgoose.experts.files.tokenizer_files import differences, unchecked_warnings
from phatgoose.ops.update import Update

K = TypeVar("K")

FACTOR, DEVIATIONS = 20.0, 3.0
"""An outlier is more than a factor of 20 · e^(3σ) from the median at the same module, where σ is 1.4826 times the
median absolute deviation of the logarithms. Experts that were trained alike differ by less than a factor of 4."""
LARGEST = 1e6
"""A norm that no update of a language model's layer has."""
FLAT = 1e-5
"""A gate is constant if its standard deviation is below this share of its mean: what is left is rounding."""
PARALLEL, MODULES = 0.99, 32
"""Gates are nearly parallel if their cosine is above 0.99 at more than half of the modules that both experts adapt,
in a sample of 32 to 63."""


class Warned(NamedTuple):
    """Something that a user should know of one expert, or of several."""

    name: str | None
    """The expert; None if the text names them."""
    text: str
    kind: str = ""
    """What several experts have in common of whom it is said; "" if that is the text."""

    def __str__(self) -> str:
        return self.text if self.name is None else f"{self.name}: {self.text}"


NO_GATES = "has no gates; PHATGOOSE can't route to it until they are trained (`phatgoose gate`)."
NO_BASE = "records no base, so it can't be checked that it was trained on this one."


def warnings(
    experts: Sequence[Expert], weight_norms: Mapping[str, float] | None = None, tokenizer: Any = None
) -> list[Warned]:
    """What a user should know about these experts of one pool.

    Args:
        weight_norms: Frobenius norms of the base's weights by module path, if the base is at hand.
        tokenizer: the base's, if it is at hand.
    """
    return list(_warned(experts, weight_norms, tokenizer))


def by_kind(warned: Iterable[Warned]) -> list[str]:
    """One line for each kind of warning, with the names of its experts."""
    kinds: dict[str, list[Warned]] = defaultdict(list)
    for one in warned:
        kinds[one.kind or one.text].append(one)
    lines = []
    for kind, found in kinds.items():
        names = list(dict.fromkeys(f.name for f in found if f.name is not None))
        if len(found) == 1 or not names:
            lines += list(map(str, found))
        else:
            lines.append(
                f"{few(names)}: {found[0].text if found[0].text == kind or len(names) == 1 else kind}"
            )
    return lines


def few(names: Sequence[str], shown: int = 8) -> str:
    """Names in a list, cut to `shown`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _warned(
    experts: Sequence[Expert], weight_norms: Mapping[str, float] | None, tokenizer: Any
) -> Iterator[Warned]:
    provenances = {e.name: e.provenance for e in experts}
    yield from (Warned(None, text) for text in _bases(experts))
    yield from _incomplete(experts, compared=weight_norms is not None)
    yield from _outliers(experts, weight_norms)
    yield from _without_rivals(experts)
    yield from (Warned(None, text) for text in _duplicates(experts))
    texts = unchecked_warnings(provenances) if tokenizer is None else differences(provenances, tokenizer)
    yield from (Warned(None, text) for text in texts)


def find_outliers(experts: Sequence[Expert], weight_norms: Mapping[str, float] | None = None) -> list[str]:
    """Warnings about experts whose updates or gates are of quite another size than the others', or say nothing."""
    return list(map(str, _outliers(experts, weight_norms)))


def _outliers(experts: Sequence[Expert], weight_norms: Mapping[str, float] | None = None) -> list[Warned]:
    findings: list[_Finding] = []
    parallel: Counter[tuple[str, str]] = (
        Counter()
    )  # modules where two gates are parallel, less those where not
    paths = list(dict.fromkeys(path for e in experts for path in e.updates))
    for number, path in enumerate(paths):  # one module's tensors at a time: a pool may be larger than memory
        sizes: dict[str, dict[str, float]] = defaultdict(dict)
        gates: dict[str, Tensor] = {}
        for expert in (e for e in experts if path in e.updates):
            for part, size in part_norms(expert.updates[path]):
                sizes[part][expert.name] = size
                if part in ("update", "VeRA vectors") and size == 0:
                    findings.append(_Finding(expert.name, "its update is zero, so it does nothing,", path))
            if expert.gates is not None:
                gate = expert.gates[path].double()
                if _is_flat(gate):
                    findings.append(_Finding(expert.name, "its gate is constant, so it says nothing,", path))
                else:
                    gates[expert.name] = gate - gate.mean()
        sizes["gate"] = {name: float(gate.norm()) for name, gate in gates.items()}
        for part, values in sizes.items():
            findings += _odd_sizes(part, values, path, (weight_norms or {}).get(path, 0.0))
        # All pairs of gates are compared, so at a sample of modules only.
        if number % max(1, len(paths) // MODULES) == 0:
            for pair, same in _compared(gates):
                parallel[pair] += 1 if same else -1
    return [
        *_texts(findings),
        *(
            Warned(
                None,
                f"{one} and {other}: their gates are nearly parallel, so wherever one is chosen, the other is as well.",
            )
            for (one, other), more in parallel.items()
            if more > 0
        ),
    ]


class _Finding(NamedTuple):
    """What was found of an expert at one module."""

    name: str
    text: str
    path: str
    ratio: float | None = None
    """What stands for {ratio} in the text."""


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


def _odd_sizes(part: str, values: Mapping[str, float], path: str, weight: float) -> Iterator[_Finding]:
    """Sizes of a part at one module that are far from the others', from anything sane, or from the base's weight."""
    for name, ratio in outliers(values).items():
        yield _Finding(name, _OFF[part], path, ratio)
    for name, size in values.items():
        if not size <= LARGEST:
            said = f"the norm of its {part} is above {LARGEST:.0e}, which nothing sane is,"
            yield _Finding(name, said, path)
        # An update that is larger than the weight, or a DoRA magnitude, the norm of the new weight, that isn't
        # between half and twice the old one.
        ratio = size / weight if weight > 0 else 1.0
        if part in _BASE and (ratio > 1 if part == "update" else not 0.5 <= ratio <= 2):
            yield _Finding(name, _BASE[part], path, ratio)


def _texts(findings: Sequence[_Finding]) -> Iterator[Warned]:
    """Each finding once, with the number of modules and the worst."""
    places: dict[tuple[str, str], list[_Finding]] = defaultdict(list)
    for finding in findings:
        places[finding.name, finding.text].append(finding)
    for (name, text), found in places.items():
        worst = max(found, key=lambda f: abs(math.log(f.ratio)) if f.ratio else 0.0)
        if worst.ratio is None:
            yield Warned(
                name, f"{text} at {len(found)} modules (first: {found[0].path}).", f"{text} at some modules."
            )
        else:
            more = f", and so at {len(found) - 1} more modules" if len(found) > 1 else ""
            said = f"{text.format(ratio=f'{worst.ratio:.3g}')} at {worst.path}{more}; is its scale right?"
            kind = f"{text.format(ratio='many')} (or a small part) at some modules; is their scale right?"
            yield Warned(name, said, kind)


def part_norms(update: Update) -> Iterator[tuple[str, float]]:
    """The size of each part of an update, comparable between experts at one module: name and norm in float64.

    "update" is ‖scale · B A‖ and "bias" ‖scale · bias‖ (Frobenius norms); of scales c it is the root mean square
    of c − 1; of VeRA ‖b‖ ‖d‖, since only the base knows its matrices; of a bottleneck adapter the bound
    |scale| ‖up‖ ‖down‖.
    """
    if update.rank:
        a, b = update.A.double(), update.B.double()
        yield "update", abs(update.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
    for name, vector in update.vectors(torch.float64).items():
        root_mean_square = float(vector.square().mean().sqrt())
        part = "bias" if name == "bias" else "input scale" if name == "input_scale" else "output scale"
        yield part, float(vector.norm()) if name == "bias" else root_mean_square
    if update.magnitude is not None:
        yield "DoRA magnitude", float(update.magnitude.double().norm())
    if update.shared is not None:
        yield "VeRA vectors", _norm(update.shared.b) * _norm(update.shared.d)
    if (narrow := update.bottleneck) is not None:
        yield "bottleneck", abs(narrow.scale) * _norm(narrow.up) * _norm(narrow.down)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def outliers(values: Mapping[str, float]) -> dict[str, float]:
    """The outliers among positive numbers by name, and how many times the median they are; zeros don't count.

    Of two numbers, the larger is the outlier, compared with the other.
    """
    logs = {name: math.log(value) for name, value in values.items() if 0 < value < math.inf}
    if len(logs) < 2:
        return {}
    center = statistics.median(logs.values()) if len(logs) > 2 else min(logs.values())
    spread = statistics.median(abs(x - center) for x in logs.values()) if len(logs) > 2 else 0.0
    limit = math.log(FACTOR) + DEVIATIONS * 1.4826 * spread
    return {name: math.exp(min(x - center, 700)) for name, x in logs.items() if abs(x - center) > limit}


def _is_flat(gate: Tensor) -> bool:
    std = float(gate.std(correction=0))
    return std < 1e-6 or std < FLAT * abs(float(gate.mean()))


def _compared(gates: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, str], bool]]:
    """Each pair of experts, and whether their gates at one module (without their means) point the same way."""
    # Of two values without their mean, gates are always parallel.
    names = [name for name, gate in gates.items() if len(gate) > 2]
    if len(names) < 2:
        return
    rows = torch.nn.functional.normalize(torch.stack([gates[name] for name in names]))
    parallel = rows @ rows.T > PARALLEL
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            yield (other, one), bool(parallel[i, j])


def _by(key: Callable[[Expert], Iterable[K]], experts: Iterable[Expert]) -> dict[K, list[Expert]]:
    """The experts by each of their keys."""
    found: dict[K, list[Expert]] = defaultdict(list)
    for expert in experts:
        for one in key(expert):
            found[one].append(expert)
    return found


def _bases(experts: Sequence[Expert]) -> Iterator[str]:
    """A warning if the experts' configs name different bases, and no fingerprints say that these are one."""
    named = _by(lambda e: [e.base_name.rstrip("/")] if e.base_name is not None else [], experts)
    checked = {base for base, owners in named.items() if any(e.base is not None for e in owners)}
    if len(named.keys() - checked) + bool(checked) < 2:
        return
    listed = "; ".join(
        f"{brief(base)} ({', '.join(e.name for e in owners[:8])}"
        f"{f' and {len(owners) - 8} more' if len(owners) > 8 else ''})"
        for base, owners in named.items()
    )
    yield (
        f"{DIFFERENT_BASES}: {listed}. These may be copies of one model, or models of one shape; without a "
        "recorded base nobody can tell here. Make sure that all were trained on one base: on another, an expert "
        "computes nonsense."
    )


DIFFERENT_BASES = "the experts' configs name different bases"


def _incomplete(experts: Sequence[Expert], compared: bool) -> Iterator[Warned]:
    """Warnings about what an expert lacks or leaves out.

    `compared`: the experts were routed in the base already, which compares the weights that they bring.
    """
    for expert in experts:
        if expert.adapter_config.get("modules_to_save") and expert.base_copies and not compared:
            yield Warned(
                expert.name,
                f"brings its own {', '.join(expert.base_copies)}, and is refused on a base whose "
                "weights differ from these (`phatgoose pool verify --base` compares them).",
            )
        if expert.base is None:
            yield Warned(expert.name, NO_BASE)
        if expert.gates is None:
            yield Warned(expert.name, NO_GATES)
        if dropped := expert.provenance.get("dropped"):
            yield Warned(
                expert.name,
                f"leaves out {', '.join(dropped)} of its adapter, as its record says; it computes something else.",
            )


def _without_rivals(experts: Sequence[Expert]) -> Iterator[Warned]:
    """Warnings about experts that are the only ones at some modules."""
    if len(experts) < 2:
        return
    alone: dict[str, list[str]] = defaultdict(list)
    for path, owners in _by(lambda e: e.updates, experts).items():
        if len(owners) == 1:
            alone[owners[0].name].append(path)
    for name, paths in alone.items():
        yield Warned(
            name,
            f"the only expert at {len(paths)} modules (first: {paths[0]}); there it competes only with the null "
            "candidate.",
            "each is the only expert at some modules; there it competes only with the null candidate.",
        )


def _duplicates(experts: Sequence[Expert]) -> Iterator[str]:
    """Warnings about adapters that are in the pool twice."""
    for group in _by(lambda e: [_quick_hash(e)], experts).values():
        for other, one in itertools.combinations(group, 2):
            if all_identical(one.tensors, other.tensors):
                names = f"{other.name} and {one.name}"
                yield f"{names}: the same adapter twice; together they take both places of a top-2."


def _quick_hash(expert: Expert) -> bytes:
    """A hash of an adapter's names and shapes and of its smallest tensor: equal adapters have equal ones."""
    tensors = expert.tensors
    shapes = [(key, tensors[key].dtype, tuple(tensors[key].shape)) for key in sorted(tensors)]
    smallest = tensors[min(sorted(tensors), key=lambda key: tensors[key].numel())]
    return hashlib.sha256(repr(shapes).encode() + bytes_of(smallest)).digest()
