"""Train gates without the contributor's data, on texts that the base with the expert writes.

This is for experts whose contributor trained no gate. docs/results.md has measurements of such gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from accelerate import PartialState
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.files import read_json, sha256_json, work_place, write_json
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base, as_base
from phatgoose.records import Example, Task
from phatgoose.tasks.examples import strip_prompt
from phatgoose.training.config import GateConfig, WritingConfig
from phatgoose.training.gate import train_gate
from phatgoose.training.trainer.job import RunOptions
from phatgoose.training.trainer.preserve import expert_attached
from phatgoose.training.trainer.progress import Progress, Report, display
from phatgoose.training.writing import Text, usable_rows, write_batch

__all__ = ["WritingConfig", "train_generated_gate", "write_task"]
FOLDER, FILE = "generated", "texts.json"
ATTEMPTS = 4
"""At most this many texts are written per wanted row, in case most of them are unusable."""
MIN_SHARE = 4
"""With fewer than 1/MIN_SHARE of the wanted rows, no task is made."""


def train_generated_gate(
    base: Base | PreTrainedModel,
    expert: Expert,
    config: GateConfig | None = None,
    writing: WritingConfig | None = None,
    *,
    prompts: Sequence[str] = (),
    **options: Unpack[RunOptions],
) -> Expert:
    """`train_gate` on texts that the base with this expert writes itself (`write_task`), so that no data are needed.

    provenance["gate"]["task"]["source"] says that the rows were generated, how, how many, and how many were unusable.

    Args:
        config: of the gate's training. writing: of the texts. prompts: as for `write_task`.
        options: work_folder, report and loggers, as for `train_gate`.

    Raises:
        TrainingError, BaseModelError, StorageError: as for `write_task` and `train_gate`.
    """
    if unexpected := options.keys() - RunOptions.__annotations__:  # now, and not after the texts are written
        raise TypeError(f"train_generated_gate() got unexpected keyword arguments: {sorted(unexpected)}")
    folder, report = options.get("work_folder"), options.get("report")
    task = write_task(base, expert, writing, prompts=prompts, work_folder=folder, report=report)
    return train_gate(base, expert, task, config, **options)


def write_task(
    base: Base | PreTrainedModel,
    expert: Expert,
    config: WritingConfig | None = None,
    *,
    prompts: Sequence[str] = (),
    work_folder: str | Path | None = None,
    report: Report | None = None,
) -> Task:
    """A task of texts that the base writes with `expert` on every token, sampled with a seed.

    Without prompts, texts begin with the beginning-of-text token (or the end token, if the tokenizer has no other). The
    first half of a text's words is a row's input, the rest its target. With prompts, which are used in turn, the prompt
    is the input and the whole text the target. Texts that are empty, too short to split, duplicates, or that repeat
    themselves are left out and counted (`source["texts"]`); those cut off at `max_new_tokens` are kept and counted.

    Args:
        work_folder: keeps finished batches, from which the same call continues.

    Raises:
        TrainingError: an encoder–decoder without prompts, routing attached to the base, logits that aren't finite, less
            than a quarter of the wanted rows, or a work folder with other texts.
        RoutingError, BaseModelError: the expert doesn't fit the base.
    """
    base, config = as_base(base), config or WritingConfig()
    prompts = tuple(map(strip_prompt, prompts))
    _check_can_write(base, prompts)
    key = {
        "config": config.to_json(),
        "prompts": list(prompts),
        "expert": replace(expert, gates=None).hash,
        "base": base.facts(),
    }
    with work_place(work_folder) as folder:
        found, counts = _write_all(base, expert, config, prompts, folder / FOLDER / FILE, key, report)
    if len(found) * MIN_SHARE < config.rows:
        raise TrainingError(
            f"the base with expert {expert.name!r} wrote {len(found)} usable texts, {config.rows} were wanted "
            f"({_describe_counts(counts)}): give prompts of the kind it is for, or change temperature or "
            "max_new_tokens."
        )
    kept = max(1, len(found) // 10) if len(found) > 1 else 0
    source = {
        "spec": f"generated:{expert.name}",
        "source": "generated",
        "written_by": "the base with the expert on every token",
        "prompts": {"number": len(prompts), "sha256": sha256_json(list(prompts))} if prompts else None,
        "config": config.to_json(),
        "texts": counts,
        "rows": {"train": len(found) - kept, "validation": kept, "test": 0},
    }
    return Task(f"generated:{expert.name}", tuple(found[kept:]), tuple(found[:kept]), (), source)


def _check_can_write(base: Base, prompts: Sequence[str]) -> None:
    if any(not p for p in prompts):
        raise TrainingError("a prompt is empty.")
    if base.is_encoder_decoder and not prompts:
        raise TrainingError(
            "an encoder–decoder writes nothing without an input to read: give prompts (--prompts FILE, one a line)."
        )
    if PartialState().num_processes > 1:
        raise TrainingError(
            "texts are written by one process: start it without torchrun or accelerate launch."
        )
    if routing_of(base) is not None:
        raise TrainingError("routing is attached to the base: call unroute(base) first.")


def _write_all(
    base: Base,
    expert: Expert,
    config: WritingConfig,
    prompts: Sequence[str],
    file: Path,
    key: dict[str, Any],
    report: Report | None,
) -> tuple[list[Example], dict[str, int]]:
    """(at most config.rows usable rows, the number of texts of each kind). Saves every batch in `file` at once."""
    batches = _load_batches(file, key)
    with expert_attached(base, expert), display(f"texts {expert.name}", config.rows) as bar:
        show = report or bar
        while True:
            rows, counts = usable_rows(batches, prompts, config)
            label = f"texts {expert.name}"
            show(Progress(label, min(len(rows), config.rows), config.rows, None, None, 0.0, math.inf))
            if len(rows) >= config.rows or len(batches) * config.rows_per_batch >= ATTEMPTS * config.rows:
                return rows[: config.rows], counts
            batches.append(write_batch(base, config, prompts, len(batches)))
            write_json(file, {"key": key, "batches": batches})


def _load_batches(file: Path, key: dict[str, Any]) -> list[list[Text]]:
    if not file.exists():
        return []
    found = read_json(file, TrainingError)
    if not isinstance(found, dict) or sha256_json(found.get("key")) != sha256_json(key):
        raise TrainingError(
            f"{file} holds texts of another expert, base or settings: choose another work_folder, or delete it to "
            "start afresh."
        )
    return [[(str(text), bool(cut)) for text, cut in batch] for batch in found["batches"]]


def _describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {number}" for kind, number in counts.items())
