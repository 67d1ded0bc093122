"""Training speed: an expert and its gates, compared with the same expert by PEFT and transformers' Trainer.

    python benchmarks/training.py [--tasks bigbench:NAME …] [--steps 6] [--repeats 3] [--out RESULT.json]

Both train a LoRA of rank 16 at all linear layers on the same rows: a base in bfloat16, adapters in float32,
AdamW, 16 rows a step. PEFT and Trainer are used as their documentation shows: each batch is padded to its
longest row, and logits are computed at every position. The two take turns. The result is the median time from
one step's end to the next's, without set-up, the first step and validation.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from bench_machine import machine, options_parser
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from phatgoose import (
    Base,
    Expert,
    ExpertConfig,
    GateConfig,
    Task,
    load_base,
    load_task,
    train_expert,
    train_gate,
)

ROWS = 16
TASKS = ["bigbench:linguistic_mappings/past_tense_json", "bigbench:intent_recognition"]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Seconds from each step's end to the next's, but the last one, whose end waits for validation."""
        return [b - a for a, b in itertools.pairwise(self.ends)][:-1]


def ours(base: Base, task: Task, steps: int) -> tuple[list[float], Expert]:
    clock = Clock()
    config = ExpertConfig(
        steps=steps,
        rows_per_step=ROWS,
        rows_per_batch=ROWS,
        learning_rate=1e-3,
        validate_every=steps,
        validation_rows=ROWS,
    )
    expert = train_expert(base, task, config, report=quiet, loggers=[clock])
    return clock.gaps(), expert


def gate(base: Base, task: Task, expert: Expert, steps: int) -> list[float]:
    clock = Clock()
    config = GateConfig(
        steps=steps, rows_per_step=ROWS, rows_per_batch=ROWS, validate_every=steps, validation_rows=ROWS
    )
    train_gate(base, expert, task, config, report=quiet, loggers=[clock])
    return clock.gaps()


def quiet(_: object) -> None: ...


def peft_and_trainer(base: Base, task: Task, steps: int) -> list[float]:
    """The same rows and settings, as PEFT's and transformers' documentation trains a LoRA on a seq2seq-like task."""
    tokenizer, clock = base.tokenizer, Clock()
    rows = []
    for example in task.train[: steps * ROWS]:
        prompt = tokenizer(example.input)["input_ids"]
        answer = [
            *tokenizer(example.targets[0], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    config = LoraConfig(r=16, lora_alpha=1, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = get_peft_model(base.model, config)
        try:
            collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
            Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[clock]).train()
        finally:
            model.unload()
    return clock.gaps()


def measure(base: Base, task: Task, steps: int, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"expert": [], "gate": [], "PEFT and Trainer": []}
    for _ in range(repeats):
        gaps, expert = ours(base, task, steps)
        times["expert"] += gaps
        times["PEFT and Trainer"] += peft_and_trainer(base, task, steps)
        times["gate"] += gate(base, task, expert, steps)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    lengths = [
        len(base.tokenizer(e.input)["input_ids"])
        + len(base.tokenizer(e.targets[0], add_special_tokens=False)["input_ids"])
        + 1
        for e in task.train[: steps * ROWS]
    ]
    return {
        "task": task.name,
        "steps": steps,
        "repeats": repeats,
        "rows_per_step": ROWS,
        "tokens_per_row": statistics.mean(lengths),
        "seconds_per_step": seconds,
        "all_seconds": times,
        "PEFT over expert": seconds["PEFT and Trainer"] / seconds["expert"],
        "gate over expert": seconds["gate"] / seconds["expert"],
    }


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base, result = load_base(options.base, dtype="bfloat16"), {"machine": machine(), "tasks": []}
    for name in options.tasks:
        found = measure(base, load_task(name), options.steps, options.repeats)
        print({k: v for k, v in found.items() if k != "all_seconds"}, flush=True)
        result["tasks"].append(found)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
