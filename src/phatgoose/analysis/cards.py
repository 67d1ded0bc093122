"""Cards of a pool's experts: their origin, the state of their gates, and similar experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from phatgoose.analysis.activations import parallel_gates
from phatgoose.experts.card.card import lowest_loss
from phatgoose.experts.expert import Expert
from phatgoose.experts.health import find_outliers
from phatgoose.experts.pool import Pool
from phatgoose.ops.reference import standardise

NEAREST = 3
ALIKE = 0.9
"""Two experts whose gates are this similar (mean cosine over shared modules) are hard to tell apart."""
ALONG = 0.5
"""A gate whose cosine with the mean activation is above this is pointed out."""


def cards(
    pool: Pool, *, means: Mapping[str, Tensor] | None = None, shares: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One record per expert, in the form of results.json's "experts".

    Args:
        means: mean inputs of the modules (`mean_inputs`). If given, gates along the mean activation are counted.
        shares: each expert's share of all routing weight in a trace. If given, dead experts are pointed out.
    """
    alike, outliers = gate_similarity(pool.experts), find_outliers(pool.experts)
    along = Counter(name for name, _, _ in parallel_gates(pool, dict(means or {}), above=ALONG))
    found = []
    for i, expert in enumerate(pool.experts):
        name, others = expert.name, [j for j in range(len(pool)) if j != i and not bool(alike[i, j].isnan())]
        health = _health(
            expert,
            along=None if means is None else along[name],
            twins=[pool.names[j] for j in others if alike[i, j] > ALIKE],
            share=None if shares is None else shares.get(name),
            low=0.1 / len(pool),
        )
        mine = [text.removeprefix(f"{name}: ") for text in outliers if text.startswith(f"{name}: ")]
        health += [
            (False, text.rstrip(".")) for text in mine if "gate is constant" not in text
        ]  # said by `_health`
        nearest = sorted(others, key=lambda j: -alike[i, j])[:NEAREST]
        found.append(
            {
                **_facts(expert),
                "health": [{"level": "good" if good else "look", "text": text} for good, text in health],
                "nearest": [
                    {"name": pool.names[j], "similarity": round(float(alike[i, j]), 4)} for j in nearest
                ],
            }
        )
    return found


def gate_similarity(experts: Sequence[Expert]) -> Tensor:
    """Mean cosine of two experts' standardised gates over shared modules, or NaN: float64 [experts, experts]."""
    size = len(experts)
    total, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for path in dict.fromkeys(path for e in experts for path in (e.gates or {})):
        members = [i for i, e in enumerate(experts) if path in (e.gates or {})]
        bars = standardise(torch.stack([(experts[i].gates or {})[path].double() for i in members]))
        bars = bars / bars.norm(dim=1, keepdim=True).clamp(min=1e-30)
        place = torch.tensor(members)
        total[place[:, None], place] += bars @ bars.T
        count[place[:, None], place] += 1
    return torch.where(count > 0, total / count, torch.nan)


def _facts(expert: Expert) -> dict[str, Any]:
    made = expert.provenance
    task, config = made.get("task"), made.get("config")
    found: dict[str, Any] = {
        "name": expert.name,
        "kind": ", ".join(sorted({u.kind for u in expert.updates.values()})),
        "rank": max((u.width for u in expert.updates.values()), default=0),
        "parameters": expert.parameters,
        "modules": len(expert.updates),
    }
    if base := expert.base.spec if expert.base is not None else expert.base_name:
        found["base_model"] = base
    if isinstance(task, dict) and isinstance(task.get("name"), str):
        found["task"] = task["name"]
    facts: dict[str, Any] = {}
    for key in ("finished", "seed", "device", "precision", "best_step", "licence", "license", "author"):
        if isinstance(made.get(key), str | int | float) and not isinstance(made[key], bool):
            facts[key] = made[key]
    if isinstance(config, dict):
        facts |= {k: config[k] for k in ("steps", "learning_rate", "alpha") if k in config}
    if (loss := lowest_loss(made)) is not None:
        facts["validation loss"] = round(loss, 4)
    return {**found, "made": facts}


def _health(
    expert: Expert, *, along: int | None, twins: Sequence[str], share: float | None, low: float
) -> list[tuple[bool, str]]:
    """(whether it is good, what it is) of an expert's gates."""
    if expert.gates is None:
        return [(False, "no gates: PHATGOOSE can't route to it as it is")]
    count = len(expert.gates)
    flat = sum(bool((gate - gate.mean()).norm() < 1e-6) for gate in expert.gates.values())
    if flat:
        lines = [(False, f"{flat} of {count} gates are constant and never win")]
    else:
        lines = [(True, f"{count} gates, none constant")]
    if along is not None:
        text = f"{along} of {count} gates lie along the mean activation (cosine above {ALONG})"
        lines.append((along == 0, text + (": they win on every text" if along else "")))
    if twins:
        lines.append((False, f"gates nearly those of {', '.join(twins[:3])}"))
    if share is not None:
        text = f"{100 * share:.1f} % of the routing weight here" + (": it hardly acts" if share < low else "")
        lines.append((share >= low, text))
    return lines
