"""The live page: the report's tokens, layers and experts while an answer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phatgoose.analysis.cards import cards
from phatgoose.analysis.checks import checked
from phatgoose.analysis.page import rendered
from phatgoose.analysis.view import legend, view
from phatgoose.experts.pool import Pool
from phatgoose.models.base.module_names import ModuleLocation, layer_labels


def live_page(
    *,
    base: str,
    pool: Pool,
    places: Mapping[str, ModuleLocation],
    routers: Sequence[Mapping[str, Any]],
    chat: bool,
    form: str | None = None,
    most_new_tokens: int,
) -> tuple[bytes, str]:
    """The page and its content policy.

    Args:
        base: the base's name.
        places: of the routed modules, in the order in which the server tells their choices.
        routers: {"name", "top_k"} of each that can be chosen; top_k is None if it has none.
        chat: whether the base has a chat template.
        form: the form of prompts that all experts were trained on, "raw" or "chat"; None if unknown or mixed.
    """
    data = checked({"tasks": [], "systems": [], "experts": cards(pool)}, empty=True)
    marks = legend(pool.names)
    labels = layer_labels(places)
    live = {
        "sites": [[place.layer, place.kind] for place in places.values()],
        "labels": [labels[path] for path in places],
        "layers": list(dict.fromkeys(labels.values())),
        "routers": list(routers),
    }
    return rendered(
        "live",
        {"results": data, "experts": marks, "live": live},
        data=data,
        marks=marks,
        live=True,
        title="Which expert for which token, live",
        base=base,
        routers=routers,
        chat=chat,
        form=form,
        most_new_tokens=most_new_tokens,
        **view(data, marks),
    )
