"""Write the model card (README.md) of an expert or a pool, from what its folder records.

Records may hold anything, and are other people's text: a card has them in YAML that a library has quoted, or in
Markdown as literal text, with local paths cut.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError
from phatgoose.experts.adapters.peft_updates import KINDS
from phatgoose.experts.data_signature import describe
from phatgoose.experts.names import CARD_FILE
from phatgoose.files import write_bytes

CARD_LIMIT_BYTES = 2**20
MARK = "<!-- Written by phatgoose. Remove this line and the file is yours: it is kept as it is. -->"
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_SPEC = re.compile(rf"{_NAME}(/{_NAME})?(@[\w./-]{{1,96}})?", re.ASCII)
# A path that starts at a root, a home or a drive, up to its last part. It may contain spaces, so it ends only with the
# text or at a "?".
_PATH = re.compile(
    r"(?:(?<![\w/])/(?!/)|~\w*/|\b[A-Za-z]:[\\/](?!/)|\\\\)(?:[^?]*[\\/](?=[^?]))?([^?\\/]*)[\\/]?"
)
_RELATIVE = re.compile(r"\.{1,2}[\\/](?:.*[\\/])?([^\\/]+)[\\/]?", re.DOTALL)


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
        record = self.provenance
        gate, task, versions = (_dict(record.get(part)) for part in ("gate", "task", "versions"))
        counts = ((self.modules, "modules"), (self.parameters, "parameters"))
        gates = "none yet: `phatgoose gate` trains them"
        if self.has_gates:
            gates = "one vector per module" + ("" if gate else ", how they were made is not recorded")
        task_said = [
            (self.task and code(self.task), "{}"),
            (_number(_dict(task.get("rows")).get("used")), "{} rows used"),
            (isinstance(task.get("hash"), str) and code(task["hash"], 64), "rows' sha256 {}"),
        ]
        made_with = [f"{k} {v}" for k, v in versions.items() if isinstance(k, str) and isinstance(v, str)]
        merged = record.get("experts") if isinstance(record.get("experts"), list) else []
        found = [
            (
                "kind",
                " · ".join([code(self.kind), *(f"{n:,} {what}" for n, what in counts if n is not None)]),
            ),
            ("base model", code(public(self.base))),
            ("task", _said(task_said)),
            ("gates", gates),
            ("data signature", code(said) if (said := describe(record.get("signature"))) else ""),
            ("validation loss", "" if self.loss == "–" else self.loss),
            ("training", _training(record)),
            ("training of the gates", _training(gate)),
            ("merged from", ", ".join(code(name) for name in merged if isinstance(name, str))),
            ("made with", ", ".join(code(one, 40) for one in made_with[:8])),
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


def _said(parts: Sequence[tuple[Any, str]]) -> str:
    """The texts whose values are there, filled in."""
    return ", ".join(text.format(value) for value, text in parts if value)


def _training(record: Mapping[str, Any]) -> str:
    config = _dict(record.get("config"))
    known = [
        (_number(config.get("steps")), "{} steps"),
        (_number(config.get("rows_per_step")), "of {} rows"),
        (_number(config.get("learning_rate")), "at learning rate {}"),
        (_number(record.get("tokens")), "{} tokens"),
        (_number(record.get("seconds")), "{} s"),
    ]
    return _said(known).replace(" steps, of", " steps of")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def write_card(target: Path, facts: Facts, source: Path | None) -> None:
    """Writes an expert's card into the folder `target`, or copies the one that somebody wrote in `source`."""
    kept = own_card(source) if source is not None else None
    write_bytes(target / CARD_FILE, expert_card(facts).encode() if kept is None else kept)


def write_pool_card(folder: Path, experts: Sequence[tuple[Facts, str]], base: str | None) -> None:
    """Writes a pool's card, unless there is one that somebody wrote.

    Args:
        experts: the facts and the folder of each.
        base: the base's name.
    """
    base = base or next((facts.base for facts, _ in experts if facts.base), None)
    try:
        if own_card(folder) is not None:
            return
    except ExpertError:  # it is too large to be one that we made
        return
    write_bytes(folder / CARD_FILE, pool_card(experts, base).encode())


def own_card(folder: Path) -> bytes | None:
    """The card in `folder` if somebody wrote it: if it is neither ours nor PEFT's empty template.

    Only links within the folder and into the Hub's cache are followed, since what they lead to is copied and published.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    from huggingface_hub.constants import HF_HUB_CACHE  # here, since it takes long

    roots = (folder, Path(HF_HUB_CACHE))
    if not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
        return None
    if (size := path.stat().st_size) > CARD_LIMIT_BYTES:
        raise ExpertError(
            f"{path} is {size} bytes, and a model card has at most {CARD_LIMIT_BYTES}: shorten or remove it."
        )
    data = path.read_bytes()
    return None if is_made(data) else data


def is_made(card: bytes) -> bool:
    """Whether a program wrote the card: ours, or PEFT's save_pretrained with hardly a field filled in."""
    template = b"# Model Card for Model ID" in card and card.count(b"[More Information Needed]") > 30
    return MARK.encode() in card or template


def expert_card(facts: Facts) -> str:
    """The card of one expert, in Markdown."""
    base = hub_id(facts.base)
    tags = ["phatgoose", facts.tag, base and f"base_model:adapter:{base}"]
    return _render("expert.md.j2", facts.base, facts.is_peft, tags, expert=facts)


def pool_card(experts: Sequence[tuple[Facts, str]], base: str | None) -> str:
    """The card of a pool, in Markdown; `experts` are the facts and the folder of each."""
    folder = next((folder for facts, folder in experts if facts.is_peft), None)
    tags = ["phatgoose", "mixture-of-experts"]
    is_peft = folder is not None or not experts
    return _render("pool.md.j2", base, is_peft, tags, experts=[f for f, _ in experts], peft_folder=folder)


def _render(template: str, base: str | None, is_peft: bool, tags: Sequence[str | None], **values: Any) -> str:
    from huggingface_hub import ModelCardData

    from phatgoose.templates import templates

    library = "peft" if is_peft else "adapter-transformers"  # the Hub's word for AdapterHub's library
    metadata = ModelCardData(base_model=hub_id(base), library_name=library, tags=[t for t in tags if t])
    # Not escaped: the filter `code` makes other people's text literal.
    cards = templates(
        "phatgoose.experts.card", escaped=False, code=code, public=public, hub_id=hub_id, loadable=loadable
    )
    return cards.get_template(template).render(metadata=metadata.to_yaml(), mark=MARK, base=base, **values)


def hub_id(spec: str | None) -> str | None:
    """The repository that a base's spec names ("org/name@revision" → "org/name"); None if it names a local folder
    or none."""
    name = (spec or "").partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def loadable(spec: str | None) -> str | None:
    """A base's spec if it can mean the same elsewhere: an alias or a Hub id that needs no quoting."""
    name = (spec or "").partition("@")[0]
    return spec if spec and _SPEC.fullmatch(spec) and not Path(name).exists() else None


def public(text: str | None) -> str:
    """`text` with local paths cut to their last part, since the folders above may tell who somebody is.

    Where a path's end is unclear, too much is cut rather than too little.
    """
    if not text:
        return ""
    relative = _RELATIVE.fullmatch(text)
    return relative[1] if relative else _PATH.sub(r"\1", text)


def code(text: str | None, limit: int = 200) -> str:
    """Any text as a Markdown code span, also within a table: one line, printable, at most `limit` characters."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in text or "")
    kept = " ".join(kept.replace("`", "'").split())
    if not kept:
        return "–"
    return "`" + (kept if len(kept) <= limit else kept[: limit - 1] + "…").replace("|", "\\|") + "`"
