"""Numbers that sum up a trace.

w_tme is expert e's weight on token t at module m, 0 if not chosen. Weight that goes to no expert is left out
everywhere, but it counts in the totals of shares. Measures that need single choices refuse a trace that was
recorded with histogram=True.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phatgoose.errors import EvaluationError
from phatgoose.models.base.module_names import layer_and_kind
from phatgoose.models.trace.choices import TOKEN_FIELDS, Choices
from phatgoose.models.trace.result import Trace
from phatgoose.registry import unknown

__all__ = [
    "Extremes", "Spread", "agreement", "agreement_between_layers", "agreement_within_blocks", "effective_number",
    "entropy", "expert_shares", "extremes", "layer_and_kind", "load", "oracle_agreement", "similarity",
    "token_dependence",
]  # fmt: skip

Profile = Mapping[str, float]


def load(trace: Trace, *, generated: bool | None = None) -> dict[str, Tensor]:
    """load_me = Σ_t w_tme / T, per module: float64 [experts]. Sums to 1 minus what went to no expert.

    Args:
        generated: only over tokens read behind a cache (True) or only over the others (False).
    """
    part = slice(None) if generated is None else slice(1, 2) if generated else slice(0, 1)
    return {
        path: one.weight[part].sum(0)[:-1] / one.tokens[part].sum().clamp(min=1)
        for path, one in trace.loads.items()
    }


def expert_shares(trace: Trace, *, generated: bool | None = None) -> dict[str, float]:
    """Σ_tm w_tme / (number of decisions), per expert: every decision (a token at a module) counts alike.

    They sum to 1 minus what went to no expert; all are 0 for an empty trace.
    """
    part = slice(None) if generated is None else slice(1, 2) if generated else slice(0, 1)
    total, decisions = torch.zeros(len(trace.experts), dtype=torch.float64), 0
    for one in trace.loads.values():
        total += one.weight[part].sum(0)[:-1]
        decisions += int(one.tokens[part].sum())
    return dict(zip(trace.experts, (total / max(decisions, 1)).tolist(), strict=True))


def entropy(shares: Iterable[float]) -> float:
    """H = −Σ p_e ln p_e in nats, p = `shares` scaled to sum to 1; 0 if none is positive."""
    positive = [s for s in shares if s > 0]
    total = math.fsum(positive)
    return -math.fsum(s / total * math.log(s / total) for s in positive) if positive else 0.0


def effective_number(shares: Iterable[float]) -> float:
    """exp(entropy) of `shares`: 1 if one expert does all, E if E experts act alike, 0 if none acts."""
    positive = [s for s in shares if s > 0]
    return math.exp(entropy(positive)) if positive else 0.0


def agreement(a: Choices, b: Choices) -> float:
    """(1/T) Σ_t Σ_e min(w_tae, w_tbe): 1 if two modules weight the same experts alike on every token, 0 if
    they share none.

    Raises:
        EvaluationError: the modules didn't read the same tokens.
    """
    if not _same_tokens(a, b):
        raise EvaluationError(
            f"{a.path} and {b.path} didn't read the same tokens: their choices can't be compared one by one."
        )
    if not len(a.tokens):
        return 0.0
    same = (a.experts[:, :, None] == b.experts[:, None, :]) & (a.experts[:, :, None] >= 0)
    less = torch.minimum(a.weights.double()[:, :, None], b.weights.double()[:, None, :])
    return float((same * less).sum() / len(a.tokens))


def agreement_between_layers(trace: Trace) -> dict[str, Tensor]:
    """For each kind of module, the `agreement` of every two layers: float64 [layers, layers], in order of the layers.

    The diagonal is the mean of Σ_e w_te: 1 minus what went to no expert. Kinds without a layer, or of one
    layer, are left out.
    """
    kinds: dict[str, list[tuple[int, Choices]]] = {}
    for c in _choices(trace):
        place = trace.locations[c.path]
        if place.layer is not None:
            kinds.setdefault(place.kind, []).append((place.layer, c))
    found = {}
    for kind, members in kinds.items():
        if len(members) > 1:
            row = [c for _, c in sorted(members, key=lambda pair: pair[0])]
            found[kind] = torch.tensor([[agreement(a, b) for b in row] for a in row], dtype=torch.float64)
    return found


def agreement_within_blocks(trace: Trace) -> dict[int, float]:
    """For each block, the mean `agreement` of every two of its modules that read the same tokens.

    Blocks of one module are left out. An encoder's and a decoder's blocks of the same number are averaged.
    """
    blocks: dict[tuple[int, str], list[Choices]] = {}
    for c in _choices(trace):
        place = trace.locations[c.path]
        if place.layer is not None:
            blocks.setdefault((place.layer, place.reads), []).append(c)
    values: dict[int, list[float]] = {}
    for (layer, _), members in blocks.items():
        pairs = [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
        values.setdefault(layer, []).extend(agreement(a, b) for a, b in pairs if _same_tokens(a, b))
    return {layer: math.fsum(v) / len(v) for layer, v in sorted(values.items()) if v}


@dataclass(frozen=True)
class Spread:
    """The variance of one module's weights within inputs, and between the means of inputs.

    share = within / (within + between): 1 if all inputs are routed alike and only tokens differ, 0 if all
    tokens of an input are routed alike, None if nothing varies.
    """

    within: float
    between: float

    @property
    def share(self) -> float | None:
        total = self.within + self.between
        return self.within / total if total > 1e-12 else None


def token_dependence(trace: Trace) -> dict[str, Spread]:
    """Variance of a module's weights within inputs and between them, summed over experts; T tokens, T_i of input i:

        within = (1/T) Σ_i Σ_{t∈i} Σ_e (w_te − w̄_ie)²     between = (1/T) Σ_i T_i Σ_e (w̄_ie − w̄_e)²

    w̄_ie is the mean over input i, w̄_e over all tokens; the two add up to the whole variance.
    """
    found = {}
    for c in _choices(trace):
        weights = dense(c, len(trace.experts))
        _, group = c.tokens.inputs.unique(return_inverse=True)
        counts = torch.bincount(group).double()[:, None]
        means = torch.zeros(len(counts), weights.shape[1], dtype=torch.float64)
        means = means.index_add_(0, group, weights) / counts
        t = max(len(weights), 1)
        within = (weights - means[group]).square().sum() / t
        between = ((means - weights.mean(0)).square() * counts).sum() / t
        found[c.path] = Spread(float(within), float(between))
    return found


def oracle_agreement(trace: Trace, oracle: str | Mapping[int, str]) -> dict[str, float]:
    """(1/T) Σ_t w_{t m o(t)}, per module: the mean weight of the expert that the oracle takes.

    Args:
        oracle: the expert's name, or one for each input (`Tokens.inputs`).

    Raises:
        UnknownName: no such expert. EvaluationError: an input has none.
    """
    for name in [oracle] if isinstance(oracle, str) else oracle.values():
        if name not in trace.experts:
            raise unknown("expert", name, trace.experts)
    if isinstance(oracle, str):
        place = trace.experts.index(oracle)
        return {path: float(values[place]) for path, values in load(trace).items()}
    found = {}
    for c in _choices(trace):
        missing = sorted(set(c.tokens.inputs.tolist()) - set(oracle))
        if missing:
            raise EvaluationError(f"the trace has input {missing[0]}, for which no oracle expert is given.")
        best = torch.tensor([trace.experts.index(oracle[i]) for i in c.tokens.inputs.tolist()])
        hit = c.experts == best[:, None]
        found[c.path] = float((c.weights.double() * hit).sum() / max(len(c.tokens), 1))
    return found


def similarity(profiles: Mapping[str, Profile]) -> Tensor:
    """Σ_e √(p_ae p_be), Bhattacharyya's coefficient, for every two tasks' routing shares (each scaled to sum
    to 1): 1 if they are routed alike, 0 if they share no expert. Symmetric float64 [tasks, tasks] in the order
    given; 0 where a task has no shares.
    """
    names = list(dict.fromkeys(e for profile in profiles.values() for e in profile))
    table = torch.tensor(
        [[max(p.get(e, 0.0), 0.0) for e in names] for p in profiles.values()], dtype=torch.float64
    )
    table = table.reshape(len(profiles), len(names))
    roots = (table / table.sum(1, keepdim=True).clamp(min=1e-300)).sqrt()
    return roots @ roots.T


@dataclass(frozen=True)
class Extremes:
    """Experts that hardly act or act nearly everywhere, and modules where one expert leads nearly every token.

    dead and dominating: names, with their shares of all routing weight. captured: (module, expert, share of
    its tokens where this expert led).
    """

    dead: dict[str, float]
    dominating: dict[str, float]
    captured: tuple[tuple[str, str, float], ...]


def extremes(trace: Trace, *, dead: float = 0.1, dominating: float = 0.5, captured: float = 0.95) -> Extremes:
    """Experts and modules of a trace that may be a problem.

    Args:
        dead: below this fraction of an equal share, 1/E, an expert counts as dead.
        dominating: above this share of all routing weight (never in a pool of one expert).
        captured: above this share of a module's tokens led by one expert, where the pool offers another.
    """
    shares = expert_shares(trace)
    e = max(len(shares), 1)
    caught = []
    for path, one in trace.loads.items():
        led, tokens = one.first.sum(0)[:-1], int(one.tokens.sum())
        if e > 1 and tokens and int(led.max()) > captured * tokens:
            caught.append((path, trace.experts[int(led.argmax())], int(led.max()) / tokens))
    return Extremes(
        {name: s for name, s in shares.items() if s < dead / e},
        {name: s for name, s in shares.items() if s > dominating and e > 1},
        tuple(caught),
    )


def dense(c: Choices, experts: int) -> Tensor:
    """The weight of every expert on every token: float64 [N, experts]."""
    table = torch.zeros(len(c.tokens), experts + 1, dtype=torch.float64)
    index = torch.where(c.experts >= 0, c.experts.long(), experts)
    return table.scatter_add_(1, index, c.weights.double())[:, :-1]


def _choices(trace: Trace) -> Sequence[Choices]:
    if trace.sums_only:
        raise EvaluationError(
            "this trace holds sums, and this measure needs single choices: record without histogram=True."
        )
    return trace.choices


def _same_tokens(a: Choices, b: Choices) -> bool:
    fields = ((getattr(a.tokens, name), getattr(b.tokens, name)) for name in TOKEN_FIELDS)
    return a.tokens is b.tokens or all(torch.equal(mine, other) for mine, other in fields)
