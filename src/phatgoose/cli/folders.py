"""Where train and gate write: what may be replaced, what is finished already, and what to clear away afterwards."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError
from phatgoose.experts.card import CARD_FILE, own_card
from phatgoose.experts.card_facts import lowest_loss
from phatgoose.experts.data_signature import SIGNATURE_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.expert_folder import RECORD_FILE
from phatgoose.experts.formats import WEIGHTS_FILES
from phatgoose.experts.gates import GATES_FILE
from phatgoose.experts.peft import CONFIG_FILE
from phatgoose.experts.pool import MANIFEST
from phatgoose.fingerprints import same_base
from phatgoose.models.base import Base
from phatgoose.records import Fingerprint, Task
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import autocast_dtype

OWN_FILES = frozenset({CONFIG_FILE, *WEIGHTS_FILES, GATES_FILE, SIGNATURE_FILE, RECORD_FILE})


def check_target(folder: Path, keeps_card: bool = False) -> None:
    """Refuses to write an expert over anything that isn't one: replacing a folder deletes whatever else is in it.

    A README.md that somebody wrote may be there only if it `keeps_card`: if the expert was read from this very folder.

    Raises:
        ExpertError: a file, a folder with other files, or a folder that belongs to a pool.
    """
    pool = folder.absolute().parent.parent
    if folder.absolute().parent.name == "experts" and (pool / MANIFEST).exists():
        raise ExpertError(
            f"{folder} belongs to the pool {pool}, which records its files' hashes: write to another folder with --out, "
            "then use `phatgoose pool remove` and `phatgoose pool add`."
        )
    if folder.exists() and not folder.is_dir():
        raise ExpertError(f"{folder} is a file; give a folder.")
    own = OWN_FILES | ({CARD_FILE} if keeps_card or own_card(folder) is None else set())
    others = sorted(p.name for p in folder.iterdir() if p.name not in own) if folder.exists() else []
    if others:
        raise ExpertError(
            f"{folder} holds files that are no expert's ({', '.join(others[:4])}{', …' if len(others) > 4 else ''}), which "
            "would be lost: choose another folder with --out."
        )


def made_so(record: Mapping[str, Any], base: Base | None, task: Task | None, config: LoopConfig) -> bool:
    """Whether a training's record says that it was this training; without a base or task, as far as that can be said."""
    try:
        settings = type(config)(**record["config"]).key()
        same = _json(settings) == _json(config.key())
        if task is not None:
            same = same and record["task"]["hash"] == task.hash
        if not same or base is None:
            return same
        precision = str(autocast_dtype(base.model, config) or "torch.float32").removeprefix("torch.")
        found = Fingerprint.from_json(record["base"])
        return same_base(found, base.fingerprint).level == "same" and record["precision"] == precision
    except (KeyError, TypeError, ValueError):  # somebody else's record
        return False


def clear_work(work: Path) -> None:
    """Removes what trainings left in a work folder, and the folder if that was all."""
    for name in ("expert-training", "adapter", "gate-training", "gates", "generated", "signature"):
        shutil.rmtree(work / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def best_loss(expert: Expert) -> float | None:
    """The lowest validation loss in an expert's record, nats per target token."""
    return lowest_loss(expert.provenance)


def validation(record: Mapping[str, Any]) -> str:
    """The validation losses of a training in a few words."""
    best = lowest_loss(record)
    if best is None:
        return "none (validate_every is 0)"
    first, last = record["validation_losses"][0], record["validation_losses"][-1]
    text = f"{best:.4f} nats per target token, at step {record.get('best_step', last[0])}"
    return text + (
        f" (step {first[0]}: {first[1]:.4f}, step {last[0]}: {last[1]:.4f})" if first != last else ""
    )


def _json(data: Any) -> Any:
    return json.loads(json.dumps(data))
