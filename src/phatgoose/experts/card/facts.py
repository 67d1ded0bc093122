"""The facts of one expert for its model card, from records that may hold anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters.peft_updates import KINDS
from phatgoose.experts.card.markdown import code, public
from phatgoose.experts.data_signature import describe
from phatgoose.files import read_json


@dataclass(frozen=True)
class Facts:
    """One expert as its card describes it."""

    name: str
    config: Mapping[str, Any] = field(repr=False)
    """adapter_config.json."""
    provenance: Any = field(repr=False)
    """As in expert.json; anything but an object counts as {}."""
    has_gates: bool
    modules: int | None = None
    parameters: int | None = None
    origin: str = ""
    """Where on the Hub it was fetched from, if it was."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", _dict(self.provenance))

    @property
    def base(self) -> str | None:
        """The base's name as recorded, by us or else by PEFT; it may be a path."""
        own = self.config.get("base_model_name_or_path") or self.config.get("model_name")
        recorded = _dict(self.provenance.get("base")).get("spec") or own
        return recorded if isinstance(recorded, str) else None

    @property
    def task(self) -> str:
        name = _dict(self.provenance.get("task")).get("name")
        return public(name) if isinstance(name, str) else ""

    @property
    def is_peft(self) -> bool:
        """Whether plain PEFT loads it."""
        return isinstance(self.config.get("peft_type"), str)

    @property
    def tag(self) -> str | None:
        """The Hub's tag for its kind."""
        known = KINDS.get(str(self.config.get("peft_type")))
        return known.tag if known else None

    @property
    def kind(self) -> str:
        """What the adapter is, as in "LoRA, rank 16"."""
        if not self.is_peft:
            return "bottleneck adapter" if self.config else "unknown"
        known, is_dora = KINDS.get(self.config["peft_type"]), bool(self.config.get("use_dora"))
        name = "DoRA" if is_dora else known.display_name if known else self.config["peft_type"]
        has_rank = is_dora or (known is not None and known.has_rank)
        rank = _number(self.config.get("r")) if has_rank else ""
        return name + (f", rank {rank}" if rank else "")

    @property
    def gates(self) -> str:
        return "yes" if self.has_gates else "no"

    @property
    def loss(self) -> str:
        """The lowest validation loss, of the adapter and then with its gates."""
        own, gated = (lowest_loss(r) for r in (self.provenance, _dict(self.provenance.get("gate"))))
        if own is None:
            return "–"
        return f"{own:.4f}" + (f", gated {gated:.4f}" if gated is not None else "")

    def rows(self) -> list[tuple[str, str]]:
        """Names and Markdown values of the card's table; what isn't recorded has no row."""
        size = [
            f"{count:,} {what}"
            for count, what in ((self.modules, "modules"), (self.parameters, "parameters"))
            if count is not None
        ]
        gate = _dict(self.provenance.get("gate"))
        found = [
            ("kind", " · ".join([code(self.kind), *size])),
            ("base model", code(public(self.base))),
            ("task", _task(_dict(self.provenance.get("task")), self.task)),
            ("gates", _gates(self.has_gates, gate)),
            ("data signature", code(said) if (said := describe(self.provenance.get("signature"))) else ""),
            ("validation loss", "" if self.loss == "–" else self.loss),
            ("training", _training(self.provenance)),
            ("training of the gates", _training(gate)),
            ("merged from", ", ".join(code(n) for n in _strings(self.provenance.get("experts")))),
            ("made with", _versions(_dict(self.provenance.get("versions")))),
            ("fetched from", code(self.origin) if self.origin else ""),
        ]
        return [(name, value) for name, value in found if value]


def lowest_loss(record: Mapping[str, Any]) -> float | None:
    """The lowest validation loss in a training's record, nats per target token."""
    losses = record.get("validation_losses")
    if not isinstance(losses, list):
        return None
    found = [point[1] for point in losses if isinstance(point, list) and len(point) == 2]
    return min((float(x) for x in found if isinstance(x, int | float) and math.isfinite(x)), default=None)


def _task(task: Mapping[str, Any], name: str) -> str:
    used = _number(_dict(task.get("rows")).get("used"))
    parts = [code(name)] if name else []
    parts += [f"{used} rows used"] if used else []
    parts += [f"rows' sha256 {code(task['hash'], 64)}"] if isinstance(task.get("hash"), str) else []
    return ", ".join(parts)


def _gates(there: bool, gate: Mapping[str, Any]) -> str:
    if not there:
        return "none yet: `phatgoose gate` trains them"
    return "one vector per module" + ("" if gate else ", how they were made is not recorded")


def _training(record: Mapping[str, Any]) -> str:
    config = _dict(record.get("config"))
    known = [
        (_number(config.get("steps")), "{} steps"),
        (_number(config.get("rows_per_step")), "of {} rows"),
        (_number(config.get("learning_rate")), "at learning rate {}"),
        (_number(record.get("tokens")), "{} tokens"),
        (_number(record.get("seconds")), "{} s"),
    ]
    return ", ".join(text.format(value) for value, text in known if value).replace(" steps, of", " steps of")


def _versions(versions: Mapping[str, Any]) -> str:
    found = [(k, v) for k, v in versions.items() if isinstance(k, str) and isinstance(v, str)]
    return ", ".join(code(f"{k} {v}", 40) for k, v in found[:8])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} if it can't be read, since a card must not stop what it describes."""
    try:
        return _dict(read_json(path, ExpertError))
    except ExpertError:
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
