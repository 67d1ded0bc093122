"""Tokenizer files beside an adapter: record them, and warn where the base's differ.

Trainers save them with an adapter, but an expert is used with its base's tokenizer and chat template, which may
make other tokens than it was trained on. What an adapter brings is recorded in its provenance under "tokenizer", and
users are warned when it is loaded, by its pool, and when it is compared with the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phatgoose.errors import PhatgooseError, brief
from phatgoose.experts.files.safe_folder import SafeFolder

TEMPLATE, CONFIG, ADDED, WHOLE = (
    "chat_template.jinja", "tokenizer_config.json", "added_tokens.json", "tokenizer.json",
)  # fmt: skip
SMALL = (TEMPLATE, CONFIG, ADDED)
"""Those that are fetched from the Hub; the whole tokenizer is many megabytes."""
KEY = "tokenizer"
LIMIT_BYTES = 64 * 2**20
TOKENS = 4096
"""At most so many added tokens are recorded."""
ADVICE = (
    "To use them, load the base from a folder of its own that holds these tokenizer files; or train the gates on "
    "rows made with the base's (docs/experts-and-pools.md#tokenizers)."
)


def read_tokenizer_record(folder: Path) -> dict[str, Any] | None:
    """A record of the tokenizer files in an adapter's folder; None if there are none.

    Returns: {"files", "chat_template": sha256 or None, "added_tokens": {text: id}}. What can't be read of a file
        is left out, though the file is listed.
    """
    files = SafeFolder(folder)
    there = [name for name in (*SMALL, WHOLE) if files.has(name)]
    if not there:
        return None
    config = _json(files, CONFIG)
    template: Any = _text(files, TEMPLATE) if TEMPLATE in there else config.get("chat_template")
    if isinstance(template, list):  # several under names
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    tokens: dict[str, int] = {}
    for number, token in _items(config.get("added_tokens_decoder")):
        if isinstance(token, dict) and str(number).isdigit():
            tokens[str(token.get("content"))] = int(number)
    tokens |= {text: number for text, number in _items(_json(files, ADDED)) if isinstance(number, int)}
    if not tokens:
        listed = _json(files, WHOLE).get("added_tokens")
        for token in listed if isinstance(listed, list) else ():
            if isinstance(token, dict) and isinstance(token.get("id"), int):
                tokens[str(token.get("content"))] = token["id"]
    return {
        "files": there,
        "chat_template": template_sha256(template) if isinstance(template, str) else None,
        "added_tokens": dict(sorted(tokens.items(), key=lambda item: item[1])[:TOKENS]),
    }


def template_sha256(template: str) -> str:
    """Hex sha256 of a template's text, without white space at its ends, which may change when it is saved elsewhere."""
    return hashlib.sha256(template.strip().encode("utf-8", "replace")).hexdigest()


def load_warning(found: Mapping[str, Any]) -> str:
    """The warning for an adapter that was just read, from its record."""
    return (
        f"the adapter brings tokenizer files ({_summary([found])}), which aren't used: prompts go through the base's "
        f"tokenizer and chat template. {ADVICE}"
    )


def unchecked_warnings(provenances: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings about the tokenizer files that experts (name → provenance) bring, without a base to compare with."""
    found = {name: record for name, p in provenances.items() if (record := _record(p)) is not None}
    if not found:
        return []
    lines = [
        f"{_listed(list(found))} {'brings' if len(found) == 1 else 'bring'} tokenizer files "
        f"({_summary(list(found.values()))}), which aren't used: prompts go through the base's tokenizer and chat "
        "template. `phatgoose pool verify POOL --base BASE` says where they differ."
    ]
    templates: dict[str, list[str]] = {}
    for name, record in found.items():
        if record["chat_template"] is not None:
            templates.setdefault(record["chat_template"], []).append(name)
    if len(templates) > 1:
        groups = "; ".join(_listed(names) for names in templates.values())
        lines.append(
            f"the experts bring different chat templates, of which a base has one: {groups}. {ADVICE}"
        )
    return lines


def differences(provenances: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> list[str]:
    """How tokenizer files of experts (name → provenance) differ from the base's: chat template, added tokens."""
    own = getattr(tokenizer, "chat_template", None)
    own = own.get("default") if isinstance(own, dict) else own
    lines, vocabulary = [], None
    for expert, provenance in provenances.items():
        record, trained = _record(provenance), _training_template(provenance)
        if trained is not None and (own is None or trained != template_sha256(own)):
            lines.append(
                f"expert {expert!r} was trained on conversations through another chat template than this base's, "
                "which `chat` and `serve` don't use. Load the base with the template that it was trained with."
            )
        if record is None:
            continue
        theirs = record["chat_template"]
        if theirs is not None and (own is None or theirs != template_sha256(own)):
            has = "the base has none" if own is None else "the base's is another one"
            lines.append(
                f"expert {expert!r} brings a chat template of its own, and {has}: it was trained on prompts that "
                f"`chat` and `serve` don't make. {ADVICE}"
            )
        if record["added_tokens"]:
            vocabulary = tokenizer.get_vocab() if vocabulary is None else vocabulary
            odd = [text for text, number in record["added_tokens"].items() if vocabulary.get(text) != number]
            if odd:
                first = ", ".join(
                    f"{brief(t, 40)} (id {record['added_tokens'][t]}; the base: {vocabulary.get(t, 'none')})"
                    for t in odd[:3]
                )
                lines.append(
                    f"expert {expert!r} brings added tokens that the base's tokenizer lacks or has at other ids, "
                    f"{len(odd)} in all, so that it reads them as other tokens: {first}. {ADVICE}"
                )
    return lines


def _record(provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of `read_tokenizer_record` in a provenance, which a stranger may have written."""
    found = provenance.get(KEY)
    if not isinstance(found, Mapping) or not isinstance(found.get("files"), list):
        return None
    template, tokens = found.get("chat_template"), found.get("added_tokens")
    return {
        "chat_template": template if isinstance(template, str) else None,
        "added_tokens": {str(t): n for t, n in _items(tokens) if isinstance(n, int)},
    }


def _training_template(provenance: Mapping[str, Any]) -> str | None:
    """sha256 of the chat template that the expert was trained with, if that was on conversations."""
    task = provenance.get("task")
    found = task.get("chat_template") if isinstance(task, Mapping) else None
    return found if isinstance(found, str) else None


def _summary(records: Sequence[Mapping[str, Any]]) -> str:
    most = max(len(r["added_tokens"]) for r in records)
    upto = "up to " if len(records) > 1 else ""
    parts = [
        *(["a chat template"] if any(r["chat_template"] for r in records) else []),
        *([f"{upto}{most} added tokens"] if most else []),
    ]
    return ", ".join(parts) or "no template, no added tokens"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{'expert' if len(names) == 1 else 'experts'} {shown}"


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _json(files: SafeFolder, name: str) -> dict[str, Any]:
    """The object in a file; {} if it is missing or can't be read."""
    try:
        return files.read_object(name, LIMIT_BYTES)
    except PhatgooseError:
        return {}


def _text(files: SafeFolder, name: str) -> str | None:
    try:
        return files.read_bytes(name, LIMIT_BYTES).decode("utf-8", "replace")
    except PhatgooseError:
        return None
