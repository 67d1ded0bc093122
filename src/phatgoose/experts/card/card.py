"""Write the model card (README.md) of an expert or a pool, from what its folder records.

Records are other people's text: a card has them in YAML that a library has quoted, or in Markdown as literal text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub import ModelCardData

from phatgoose.errors import ExpertError
from phatgoose.experts.card.facts import Facts
from phatgoose.experts.card.markdown import code, grid, hub_id, loadable, public, python
from phatgoose.experts.names import CARD_FILE
from phatgoose.files import write_bytes

CARD_LIMIT_BYTES = 2**20
MARK = "<!-- Written by phatgoose. Remove this line and the file is yours: it is kept as it is. -->"

_PAPER = "https://arxiv.org/abs/2402.05859"
_METRICS = (
    "Validation losses are in nats per target token, as the contributor's training recorded them on rows of the "
    "expert's own "
    "task; nobody else has checked them.\n\nIn the examples REPOSITORY stands for the id of this repository on the "
    "Hub, "
    "organisation/name."
)


def write_card(target: Path, facts: Facts, source: Path | None) -> None:
    """Writes an expert's card into the folder `target`.

    A card that somebody wrote in `source`, the folder that the expert was read from, is copied instead.
    """
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

    Raises:
        ExpertError: it is too large to be one.
    """
    path, roots = folder / CARD_FILE, (folder, Path(huggingface_hub.constants.HF_HUB_CACHE))
    if not path.is_file() or not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
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
    tags = [
        "phatgoose",
        *([facts.tag] if facts.tag else []),
        *([f"base_model:adapter:{base}"] if base else []),
    ]
    opening = (
        f"An adapter of the base model {code(public(facts.base))}: an expert for phatgoose ([the "
        f"method]({_PAPER})). It works "
        "alone, and in a pool of experts, where every token is routed to those that suit it."
    )
    parts = [
        _head(base, facts.is_peft, tags),
        MARK,
        f"# {code(facts.name)}",
        opening,
        grid(("", ""), facts.rows()),
        _METRICS,
    ]
    if facts.is_peft:
        parts += ["## With plain PEFT", python(_peft(base, "REPOSITORY"))]
    parts += ["## With phatgoose", python(_expert(facts.base))]
    return "\n\n".join(parts) + "\n"


def pool_card(experts: Sequence[tuple[Facts, str]], base: str | None) -> str:
    """The card of a pool, in Markdown."""
    known = hub_id(base)
    opening = (
        f"{len(experts)} experts, adapters of the base model {code(public(base))}, for phatgoose ([the "
        f"method]({_PAPER})): every "
        "token is routed to the experts that suit it."
    )
    columns = ("expert", "task", "kind", "gates", "validation loss", "from")
    rows = [(code(f.name), code(f.task), code(f.kind), f.gates, f.loss, code(f.origin)) for f, _ in experts]
    place = next((place for facts, place in experts if facts.is_peft), None)
    head = _head(known, place is not None or not experts, ["phatgoose", "mixture-of-experts"])
    parts = [head, MARK, "# A pool of experts", opening]
    parts += [grid(columns, rows), _METRICS, "## With phatgoose", python(_pool(base))]
    if place:
        parts += ["## One expert with plain PEFT", python(_peft(known, "REPOSITORY", place))]
    return "\n\n".join(parts) + "\n"


def _head(base: str | None, peft: bool, tags: Iterable[str]) -> str:
    library = "peft" if peft else "adapter-transformers"  # the Hub's word for AdapterHub's library
    return f"---\n{ModelCardData(base_model=base, library_name=library, tags=list(tags)).to_yaml()}\n---"


def _peft(base: str | None, place: str, subfolder: str = "") -> list[str]:
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    load = f'AutoModel.from_pretrained("{base}")' if base else "...  # the base model named above"
    lines = ["from peft import PeftModel"]
    if base:
        lines.append("from transformers import AutoModelForCausalLM as AutoModel  # or AutoModelForSeq2SeqLM")
    return [*lines, "", f"base = {load}", f'model = PeftModel.from_pretrained(base, "{place}"{inside})']


def _expert(base: str | None) -> list[str]:
    return [
        "from phatgoose import Expert, Pool, load_base, route",
        "",
        'expert = Expert.pull("REPOSITORY")',
        _load(base),
        "model = route(base, Pool([expert]))  # and more experts of this base",
    ]


def _pool(base: str | None) -> list[str]:
    return [
        "from phatgoose import Pool, load_base, route",
        "",
        'pool = Pool.pull("REPOSITORY")',
        _load(base),
        "model = route(base, pool)",
    ]


def _load(base: str | None) -> str:
    spec = loadable(base)
    return f'base = load_base("{spec}")' if spec else 'base = load_base("BASE")  # the base model named above'
