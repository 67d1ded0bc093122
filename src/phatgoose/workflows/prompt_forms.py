"""Which form of prompt fits a pool's experts: plain text, or a chat through the template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.tasks.splits import CHAT

Form = Literal["raw", "chat"]


def trained_form(expert: Expert) -> Form | None:
    """The form of an expert's training rows, by the record of its training or else of its gates, or None."""
    gate = expert.provenance.get("gate")
    for record in (expert.provenance, gate):
        task = record.get("task") if isinstance(record, Mapping) else None
        source = task.get("source") if isinstance(task, Mapping) else None
        if isinstance(source, Mapping) and (found := _form(source)) is not None:
            return found
    return None


def _form(source: Mapping[str, Any]) -> Form | None:
    parts = source.get("parts")
    if isinstance(parts, list) and parts:
        found = {_form(part) for part in parts if isinstance(part, Mapping)}
        return found.pop() if len(found) == 1 else None
    style = source.get("prompt_style")
    if not isinstance(style, str):
        return None
    return "chat" if style == CHAT else "raw"


def common_form(pool: Pool) -> Form | None:
    """The form that all experts were trained on; None if their records differ or don't tell."""
    forms = {trained_form(expert) for expert in pool.experts}
    return forms.pop() if len(forms) == 1 else None


def endpoint(pool: Pool) -> str | None:
    """The server's endpoint whose prompts have the experts' `common_form`."""
    return {"raw": "/v1/completions", "chat": "/v1/chat/completions", None: None}[common_form(pool)]


def read_of_turn(pool: Pool | None, turn: str) -> list[str]:
    """What `prompted` gets for a chat's prompt, for routers that read text: the last turn without the template.

    Empty if experts were trained on conversations: their data signatures are of whole rendered prompts.
    """
    forms = {trained_form(expert) for expert in pool.experts} if pool is not None else set()
    return [] if "chat" in forms else [turn]


def fitting_form(pool: Pool | None, asked: Form | None, has_template: bool) -> tuple[Form, str | None]:
    """(the form of prompts to use, a remark about it or None).

    Args:
        asked: the form that the user asked for, which is used. None: raw prompts if all experts were trained on
            those, else a chat if there is a template.
    """
    forms = {e.name: trained_form(e) for e in pool.experts} if pool is not None else {}
    usual: Form = "chat" if has_template else "raw"
    if asked is None and has_template and forms and set(forms.values()) == {"raw"}:
        return "raw", (
            "raw prompts: the experts were trained on prompts without the chat template; type what they were "
            "trained on, or give --chat."
        )
    taken = asked or usual
    others = [name for name, form in forms.items() if form not in (None, taken)]
    if not others:
        return taken, None
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if taken == "chat":
        why = "prompts without the chat template, so turns of a chat may suit neither them nor their gates"
        return taken, f"trained on {why} (--raw gives prompts as they are): {named}."
    hint = " (--chat puts prompts through it)" if has_template else ", which this base's tokenizer lacks"
    return taken, f"trained on conversations through a chat template{hint}: {named}."
