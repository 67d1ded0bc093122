"""promptsource's prompts: YAML and Jinja, read from its pinned source distribution.

Nothing of the package is imported or run. They are rendered in Jinja's sandbox, as promptsource does it:
variables are cut after 2048 characters, "|||" separates the prompt from the answer, and `answer_choices` is a
Jinja expression of its own. The random `choice` draws from the row's own generator.
"""

from __future__ import annotations

import random
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.filters import do_truncate
from jinja2.sandbox import SandboxedEnvironment

from phatgoose.errors import TaskError
from phatgoose.fetch import PinnedPackage, build_once
from phatgoose.registry import unknown
from phatgoose.tasks.sources.local_files import given_folder, unpacked_folder

PACKAGE = PinnedPackage(
    "promptsource==0.2.3",
    "f106c889778a0fe5590e7183904bf964e1a01691c8a29451e44f3df5ddef05f5",
    "promptsource-0.2.3.tar.gz",
)
LONGEST = 2048
_MEMBER = re.compile(r"promptsource-0\.2\.3/promptsource/templates/(\w[\w./-]*)/templates\.yaml")
_PIPE, _PIPE_STAND_IN = "|||", "\ue000\ue001\ue000"  # a "|||" in a row's text must not separate anything


@dataclass(frozen=True)
class Template:
    """One prompt of one dataset."""

    name: str
    jinja: str
    answer_choices: str | None
    original: bool
    """True if it asks for what the dataset was made for (the answer to a question, not the question to an answer)."""

    def render(
        self, row: Mapping[str, Any], generator: random.Random
    ) -> tuple[str, str, list[str] | None] | None:
        """(prompt, target, choices) of a row; None if it doesn't apply. Raises TaskError if the row can't fill it."""
        _RANDOM.generator = generator
        values = {k: v.replace(_PIPE, _PIPE_STAND_IN) if isinstance(v, str) else v for k, v in row.items()}
        try:
            choices = None
            if self.answer_choices:
                text = _compiled(self.answer_choices, False).render(**values)
                choices = [_restore_pipes(c) for c in text.split(_PIPE)]
            text = _compiled(self.jinja, True).render(**values, answer_choices=choices)
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError) as cause:
            raise TaskError(
                f"template {self.name!r} can't render a row with the columns {', '.join(row)}: {cause}."
            ) from cause
        parts = [_restore_pipes(part) for part in text.split(_PIPE)]
        return (parts[0], parts[1], choices) if len(parts) >= 2 else None


def config_name(name: str) -> str:
    """A dataset's or template's name as P3 writes it in a config: "MNLI crowdsource" → "MNLI_crowdsource"."""
    return re.sub(r"[^\w.]+", "_", name)


@cache
def read_templates(name: str) -> Mapping[str, Template]:
    """Template name → Template of `DATASET[/SUBSET]`, in promptsource's order.

    Raises:
        UnknownName: promptsource has no such dataset.
        DownloadError, StorageError: its sdist can't be fetched or kept.
    """
    path = root() / name / "templates.yaml"
    if not path.is_file():
        known = [p.parent.relative_to(root()).as_posix() for p in root().rglob("templates.yaml")]
        raise unknown("promptsource dataset", name, known)
    try:
        listed = yaml.load(path.read_text(encoding="utf-8"), _Loader)["templates"].values()
        found = [
            Template(t["name"], t["jinja"], t.get("answer_choices"), bool(t["metadata"]["original_task"]))
            for t in listed
        ]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as cause:
        raise TaskError(f"{path} is not one of promptsource's files: {cause!r}.") from cause
    return {t.name: t for t in found}


def root() -> Path:
    """The folder of DATASET/SUBSET/templates.yaml: $PHATGOOSE_PROMPTSOURCE, or the cache (fetched on first use)."""
    folder = given_folder(None, "PHATGOOSE_PROMPTSOURCE")
    if folder is None:
        return build_once(unpacked_folder(PACKAGE), _unpack)
    if not folder.is_dir():
        raise TaskError(f"PHATGOOSE_PROMPTSOURCE is {folder}, which is not a folder.")
    return folder


def is_available() -> bool:
    """True if the prompts can be read without fetching anything."""
    return given_folder(None, "PHATGOOSE_PROMPTSOURCE") is not None or unpacked_folder(PACKAGE).is_dir()


def _unpack(work: Path) -> None:
    archive = PACKAGE.fetch()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            content = tar.extractfile(member) if match and member.isfile() else None
            if match and content is not None and ".." not in match[1]:
                path = work / match[1] / "templates.yaml"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
        if not any(work.rglob("templates.yaml")):
            raise TaskError(f"{archive} holds no templates.")


class _Loader(yaml.SafeLoader):
    """Reads promptsource's tagged objects (!Template, !TemplateMetadata) as plain mappings."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_mapping(node, deep=True))


_RANDOM = threading.local()
"""Its `generator` is what Jinja's `choice` draws from while a row is rendered."""


@cache
def _environment(truncate: bool) -> SandboxedEnvironment:
    environment = SandboxedEnvironment(autoescape=False, undefined=jinja2.StrictUndefined)
    if truncate:
        environment.finalize = lambda value: do_truncate(environment, str(value), LONGEST)
    environment.globals.update(zip=zip)
    environment.filters.update(
        highlight=lambda text: text,
        choice=_choose_randomly,
        most_frequent=lambda items: _most_frequent(list(items)),
    )
    return environment


@jinja2.pass_context  # without one Jinja would draw from a constant list once, when it compiles the template
def _choose_randomly(context: Any, items: list[Any]) -> Any:
    return _RANDOM.generator.choice(items)


@lru_cache(maxsize=1024)
def _compiled(jinja: str, truncate: bool) -> jinja2.Template:
    return _environment(truncate).from_string(jinja)


def _most_frequent(items: list[Any]) -> list[Any]:
    counts = Counter(map(str, items))
    most = max(counts.values(), default=0)
    return [item for item in dict.fromkeys(items) if counts[str(item)] == most]


def _restore_pipes(text: str) -> str:
    return text.replace(_PIPE_STAND_IN, _PIPE).strip()
