"""Which router a pool can use when the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from phatgoose.experts.expert import Expert
from phatgoose.experts.weight_signature import why_no_signature


def fitting_router(experts: Sequence[Expert]) -> tuple[str, str]:
    """(router as the command line writes it, why it isn't "phatgoose"): the first of these that can serve all experts.

    "phatgoose" if every expert has gates (the reason is then ""), "phatgoose:ungated=weights" if some have,
    "weight-only" if none has, and "uniform" where an expert without gates has no low-rank update that could be
    scored by its weights.
    """
    ungated = [e for e in experts if e.gates is None]
    if not ungated:
        return "phatgoose", ""
    for expert in ungated:
        if any(why_no_signature(update) is not None for update in expert.updates.values()):
            return "uniform", f"expert {expert.name!r} has neither gates nor weights that a router could use"
    if len(ungated) < len(experts):
        return "phatgoose:ungated=weights", f"{len(ungated)} of {len(experts)} experts have no gates"
    return "weight-only", "the experts have no gates"
