"""Train gates without the contributor's data, on texts that the base with the expert writes.

This is for experts whose contributor trained no gate. docs/results.md has measurements of such gates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.files import read_json, sha256_json, work_place, write_json
from phatgoose.models.base.base import Base, as_base, end_tokens
from phatgoose.models.text.capabilities import generation_groups
from phatgoose.models.text.encoding import prompt_ids
from phatgoose.models.text.generate import answer_settings, run_generate
from phatgoose.records import Example, Task
from phatgoose.tasks.examples import strip_prompt
from phatgoose.training.config import GateConfig, WritingConfig
from phatgoose.training.gate import train_gate
from phatgoose.training.trainer.job import RunOptions
from phatgoose.training.trainer.preserve import expert_attached, preserved_random_state, refuse_routed
from phatgoose.training.trainer.progress import Progress, Report, display

FOLDER, FILE = "generated", "texts.json"
ATTEMPTS = 4
"""At most this many texts are written per wanted row, in case most of them are unusable."""
MIN_SHARE = 4
"""With fewer than 1/MIN_SHARE of the wanted rows, no task is made."""
Text = tuple[str, bool]
"""(a text, whether it was cut off)."""


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
    with work_place(work_folder) as folder:
        found, counts = _write_all(base, expert, config, prompts, folder / FOLDER / FILE, report)
    if len(found) * MIN_SHARE < config.rows:
        said = ", ".join(f"{kind.replace('_', ' ')} {number}" for kind, number in counts.items())
        raise TrainingError(
            f"the base with expert {expert.name!r} wrote {len(found)} usable texts, {config.rows} were wanted "
            f"({said}): give prompts of the kind it is for, or change temperature or "
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
            "an encoder–decoder writes nothing without an input to read: give prompts (--prompts FILE, one per line)."
        )
    if PartialState().num_processes > 1:
        raise TrainingError(
            "texts are written by one process: start it without torchrun or accelerate launch."
        )
    refuse_routed(base)


def _write_all(
    base: Base,
    expert: Expert,
    config: WritingConfig,
    prompts: Sequence[str],
    file: Path,
    report: Report | None,
) -> tuple[list[Example], dict[str, int]]:
    """(at most config.rows usable rows, the number of texts of each kind). Saves every batch in `file` at once."""
    key = {
        "config": config.to_json(),
        "prompts": list(prompts),
        "expert": replace(expert, gates=None).hash,
        "base": base.facts(),
    }
    found = read_json(file, TrainingError) if file.exists() else {"key": key, "batches": []}
    if not isinstance(found, dict) or sha256_json(found.get("key")) != sha256_json(key):
        raise TrainingError(
            f"{file} holds texts of another expert, base or settings: choose another work_folder, or delete it to "
            "start afresh."
        )
    batches = [[(str(text), bool(cut)) for text, cut in batch] for batch in found["batches"]]
    label = f"texts {expert.name}"
    with expert_attached(base, expert), display(label, config.rows, report) as show:
        while True:
            rows, counts = usable_rows(batches, prompts)
            show(Progress(label, min(len(rows), config.rows), config.rows))
            if len(rows) >= config.rows or len(batches) * config.rows_per_batch >= ATTEMPTS * config.rows:
                return rows[: config.rows], counts
            batches.append(write_batch(base, config, prompts, len(batches)))
            write_json(file, {"key": key, "batches": batches})


def write_batch(base: Base, config: WritingConfig, prompts: Sequence[str], number: int) -> list[Text]:
    """Writes batch `number`. Its texts depend only on the settings and this number."""
    model, tokenizer, size = base.model, base.tokenizer, config.rows_per_batch
    ends = end_tokens(model, tokenizer.eos_token_id)
    if prompts:
        texts = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
        inputs = [list(prompt_ids(tokenizer, text, base.is_encoder_decoder)) for text in texts]
    else:
        inputs = [[_first_token(base)]] * size
    settings = answer_settings(base, config.max_new_tokens, config.temperature)
    found: list[Text] = [("", False)] * size
    with preserved_random_state():
        seed = hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:7]
        torch.manual_seed(int.from_bytes(seed, "big"))
        for part in generation_groups(model, inputs, config.max_new_tokens):
            answers = _sample(base, [inputs[i] for i in part], settings)
            for i, tokens in zip(part, answers, strict=True):
                end = next((n for n, token in enumerate(tokens) if token in ends), None)
                text: Any = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                found[i] = text.strip(), end is None
    return found


def _sample(base: Base, inputs: Sequence[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The tokens written after each input."""
    try:
        out = run_generate(base.model, inputs, settings)
    except RuntimeError as cause:
        if "probability tensor" not in str(cause):
            raise
        raise TrainingError(
            "the base with this expert computes logits that aren't finite, from which nothing can be sampled."
        ) from cause
    return out[:, 1 if base.is_encoder_decoder else max(map(len, inputs)) :].tolist()


def usable_rows(
    batches: Sequence[Sequence[Text]], prompts: Sequence[str]
) -> tuple[list[Example], dict[str, int]]:
    """(the usable rows without duplicates, the number of texts of each kind)."""
    rows: dict[Example, None] = {}
    counts: Counter[str] = Counter()
    for i, (text, cut) in enumerate(text for batch in batches for text in batch):
        prompt, target = (prompts[i % len(prompts)], text) if prompts else _split_in_half(text)
        if not text:
            kind = "empty"
        elif not prompt or not target:
            kind = "too_short"
        elif _repeats_itself(text.split()):
            kind = "circular"
        elif (row := Example(prompt, (target,))) in rows:
            kind = "repeated"
        else:
            rows[row] = None
            kind = "usable"
            counts["cut_off"] += cut
        counts[kind] += 1
    kinds = ("usable", "cut_off", "empty", "too_short", "circular", "repeated")
    written = sum(map(len, batches))
    return list(rows), {"written": written, **{kind: counts[kind] for kind in kinds}}


def _split_in_half(text: str) -> tuple[str, str]:
    """The text split at the space nearest to its middle, which encoding adds again; ("", "") if it has none inside."""
    spaces = [
        i
        for i in range(1, len(text) - 1)
        if text[i] == " " and not text[i - 1].isspace() and not text[i + 1].isspace()
    ]
    if not spaces:
        return "", ""
    middle = min(spaces, key=lambda i: abs(2 * i - len(text)))
    return text[:middle], text[middle + 1 :]


def _repeats_itself(words: Sequence[str]) -> bool:
    """True if more than half of all runs of three words occurred before."""
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(runs) > 5 and len(set(runs)) * 2 < len(runs)


def _first_token(base: Base) -> int:
    tokenizer = base.tokenizer
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise TrainingError("the tokenizer has no token to begin a text with: give prompts.")
    return int(found)
