"""One small training in a process of its own: `train_once.py FOLDER HOW [OUT]`. Run by the tests, to be killed
or by torchrun.

HOW: "kill-step-N" ends the process by SIGKILL after step N, "kill-save-N" in the midst of writing the N-th checkpoint,
"whole" lets it finish and saves the expert to OUT (by the first process).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training_helpers import LORA, SMALL, make_task

from conftest import make_model, make_tokenizer
from phatgoose.models.base.base import Base
from phatgoose.training.config import ExpertConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.trainer import checkpoints
from phatgoose.training.trainer.progress import Progress

CONFIG = ExpertConfig(**{**SMALL, "rows_per_batch": 1}, **LORA, learning_rate=2e-3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, how: str, out: str = "") -> None:
    kind, _, number = how.rpartition("-")

    def report(progress: Progress) -> None:
        if kind == "kill-step" and progress.step == int(number):
            die()

    if kind == "kill-save":
        written: list[Path] = []
        write_json = checkpoints.write_json

        def dying(path: Path, data: object) -> None:
            if path.name == checkpoints.MANIFEST:
                written.append(path)
                if len(written) == int(number):
                    (path.parent / checkpoints.TRAINED).write_bytes(b"half")
                    die()
            write_json(path, data)

        checkpoints.write_json = dying
    base = Base(make_model("llama"), make_tokenizer(), spec="tiny-llama-0")
    expert = train_expert(base, make_task(), CONFIG, work_folder=folder, report=report)
    rank = int(os.environ.get("RANK", "0"))
    expert.save(f"{out}-{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
