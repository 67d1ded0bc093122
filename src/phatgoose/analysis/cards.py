"""Cards of a pool's experts: their origin, the state of their gates, and similar experts."""

from __future__ import annotations

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
    alike = gate_similarity(pool.experts)
    off = find_outliers(pool.experts)
    along: dict[str, int] = {}
    for name, _, _ in parallel_gates(pool, dict(means or {}), above=ALONG):
        along[name] = along.get(name, 0) + 1
    return [
        {
            **_facts(expert),
            "health": [
                *_health(expert, pool, alike[i], means is not None, along.get(expert.name, 0), shares),
                *_off(expert.name, off),
            ],
            "nearest": [
                {"name": pool.names[j], "similarity": round(float(alike[i, j]), 4)}
                for j in alike[i].argsort(descending=True).tolist()
                if j != i and not bool(alike[i, j].isnan())
            ][:NEAREST],
        }
        for i, expert in enumerate(pool.experts)
    ]


def gate_similarity(experts: Sequence[Expert]) -> Tensor:
    """Mean cosine of two experts' standardised gates over the modules both have: float64 [experts, experts],
    NaN if there is none."""
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
    if expert.base is not None:
        found["base_model"] = expert.base.spec
    elif name := expert.base_name:
        found["base_model"] = name
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


def _off(name: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """What `find_outliers` says of this expert alone; constant gates are told of anyway."""
    mine = [text.removeprefix(f"{name}: ") for text in texts if text.startswith(f"{name}: ")]
    return [{"level": "look", "text": text.rstrip(".")} for text in mine if "gate is constant" not in text]


def _health(
    expert: Expert, pool: Pool, alike: Tensor, measured: bool, along: int, shares: Mapping[str, float] | None
) -> list[dict[str, str]]:
    lines = []

    def say(good: bool, text: str) -> None:
        lines.append({"level": "good" if good else "look", "text": text})

    if expert.gates is None:
        say(False, "no gates: PHATGOOSE can't route to it as it is")
        return lines
    flat = sum(bool((gate - gate.mean()).norm() < 1e-6) for gate in expert.gates.values())
    if flat:
        say(False, f"{flat} of {len(expert.gates)} gates are constant and never win")
    else:
        say(True, f"{len(expert.gates)} gates, none constant")
    if measured:
        text = f"{along} of {len(expert.gates)} gates lie along the mean activation (cosine above {ALONG})"
        say(along == 0, text + (": they win on every text" if along else ""))
    twins = [
        pool.names[j]
        for j, value in enumerate(alike.tolist())
        if pool.names[j] != expert.name and value > ALIKE
    ]
    if twins:
        say(False, f"gates nearly those of {', '.join(twins[:3])}")
    if shares is not None and (share := shares.get(expert.name)) is not None:
        low = share < 0.1 / len(pool)
        say(not low, f"{100 * share:.1f} % of the routing weight here" + (": it hardly acts" if low else ""))
    return lines
