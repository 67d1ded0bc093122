"""Write the model card (README.md) of an expert or a pool, from what its folder records.

Records are other people's text: a card has them in YAML that a library has quoted, or in Markdown as literal text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub import ModelCardData

from phatgoose.errors import ExpertError
from phatgoose.experts.card.facts import Facts
from phatgoose.experts.card.markdown import code, hub_id, loadable, public
from phatgoose.experts.names import CARD_FILE
from phatgoose.files import write_bytes
from phatgoose.templates import templates

CARD_LIMIT_BYTES = 2**20
MARK = "<!-- Written by phatgoose. Remove this line and the file is yours: it is kept as it is. -->"


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
    tags = ["phatgoose", facts.tag, base and f"base_model:adapter:{base}"]
    return _render("expert.md.j2", facts.base, facts.is_peft, tags, expert=facts)


def pool_card(experts: Sequence[tuple[Facts, str]], base: str | None) -> str:
    """The card of a pool, in Markdown; `experts` are the facts and the folder of each."""
    folder = next((folder for facts, folder in experts if facts.is_peft), None)
    tags = ["phatgoose", "mixture-of-experts"]
    is_peft = folder is not None or not experts
    return _render("pool.md.j2", base, is_peft, tags, experts=[f for f, _ in experts], peft_folder=folder)


def _render(template: str, base: str | None, is_peft: bool, tags: Sequence[str | None], **values: Any) -> str:
    library = "peft" if is_peft else "adapter-transformers"  # the Hub's word for AdapterHub's library
    metadata = ModelCardData(base_model=hub_id(base), library_name=library, tags=[t for t in tags if t])
    # Not escaped: the filter `code` makes other people's text literal.
    cards = templates(
        "phatgoose.experts.card", escaped=False, code=code, public=public, hub_id=hub_id, loadable=loadable
    )
    return cards.get_template(template).render(metadata=metadata.to_yaml(), mark=MARK, base=base, **values)
