"""Where train, gate and signature write: what may be replaced, and what is finished."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phatgoose import locks
from phatgoose.errors import ExpertError
from phatgoose.experts.card.card import lowest_loss
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import all_identical
from phatgoose.experts.folder import check_replaceable
from phatgoose.experts.names import MANIFEST
from phatgoose.fingerprints import same_base
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.records import Fingerprint, Task
from phatgoose.training.config import LoopConfig
from phatgoose.training.student import autocast_dtype

LEFT = {
    "train": ("expert-training", "adapter"),
    "gate": ("gate-training", "gates", "generated"),
    "signature": ("signature",),
}
"""What each command's own training leaves in its work folder."""


def check_target(folder: Path, keeps_card: bool = False) -> None:
    """Refuses to write an expert over anything that isn't one; `keeps_card` as in `check_replaceable`."""
    if folder.is_dir() and Path.cwd().is_relative_to(folder.resolve()):
        raise ExpertError(
            f"{folder} is replaced as a whole, and you are in it: run this from outside, or choose another folder "
            "with --out."
        )
    pool = folder.absolute().parent.parent
    if folder.absolute().parent.name == "experts" and (pool / MANIFEST).exists():
        raise ExpertError(
            f"{folder} belongs to the pool {pool}, which records its files' hashes: write to another folder with "
            "--out, then use `phatgoose pool remove` and `phatgoose pool add`."
        )
    if folder.exists() and not folder.is_dir():
        raise ExpertError(f"{folder} is a file; give a folder.")
    check_replaceable(folder, keeps_card)


@contextlib.contextmanager
def only_run(folder: Path, command: str, work: Path) -> Iterator[None]:
    """Locks `folder` while `command` makes what goes there; then removes what it left in `work`, unless it failed.

    Of torchrun's processes, the first does this for all. The folder `work` goes too if nothing else is in it.
    """
    # RANK alone doesn't make a process one of several: clusters set it for each machine, torchrun sets both.
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
        yield
        return
    with locks.only_run(folder, folder.absolute().parent / f".{folder.name}.{command}.lock"):
        yield
        clear(work, command)


def clear(work: Path, command: str) -> None:
    """Removes what `command` left in `work`, and `work` if nothing else is in it."""
    for name in LEFT[command]:
        shutil.rmtree(work / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def made_so(record: Mapping[str, Any], base: Base | None, task: Task | None, config: LoopConfig) -> bool:
    """Whether a record is of this very training; without a base or task, as far as the record tells."""
    try:
        if type(config)(**record["config"]).key() != config.key():
            return False
        if task is not None and record["task"]["hash"] != task.hash:
            return False
        if base is None:
            return True
        if task is not None:
            recorded = record["task"].get("chat_template")
            if recorded != chat_template_key(base, task).get("chat_template"):
                return False
        precision = str(autocast_dtype(base.model, config) or "torch.float32").removeprefix("torch.")
        found = Fingerprint.from_json(record["base"])
        return same_base(found, base.fingerprint).level == "same" and record["precision"] == precision
    except (KeyError, TypeError, ValueError):  # somebody else's record
        return False


def taken(folder: Path, holds: str) -> ExpertError:
    """The refusal to replace what is in `folder`."""
    return ExpertError(
        f"{folder} holds {holds}: choose another --out, or replace what is there with --overwrite."
    )


def existing_expert(folder: Path) -> Expert | None:
    """The expert in a folder, None if there is nothing."""
    return Expert.load(folder) if folder.exists() and any(folder.iterdir()) else None


def is_main_process() -> bool:
    """Whether this process writes the result; waits until no other one of torchrun's reads the work folder any more."""
    from accelerate import PartialState

    processes = PartialState()
    processes.wait_for_everyone()
    return bool(processes.is_main_process)


def save_onto(target: Path, made: Expert, before: Expert | None, part: str, work: Path) -> Expert:
    """Saves an expert with new gates or a new signature, merged onto the expert that is in `target` by now.

    While one of the two was made, another command may have added the other one.

    Args:
        before: the expert that was there when this began, None if there was none.
        part: what is new, "gate" or "signature".
    """
    if (now := existing_expert(target)) is not None:
        where = f"The result is in {work}: run the same command again with another --out and --work {work}."
        made = merged(target, now, made, before, part, where)
    made.save(target)
    return made


def merged(
    target: Path, now: Expert, made: Expert, before: Expert | None, part: str, where: str = ""
) -> Expert:
    """The expert that is there by `now`, with what was `made`. Arguments as for `save_onto`.

    Args:
        where: what to do if `now` isn't what was there `before`, for the refusal (an ExpertError).
    """
    if before is None or not (all_identical(now.tensors, before.tensors) and _same_part(now, before, part)):
        said = f"{target} was changed while its {part} was made, and isn't replaced. {where}"
        raise ExpertError(said.rstrip())
    if not all_identical(now.tensors, made.tensors):  # it is another expert, to be replaced
        return made
    if part == "gate":
        assert made.gates is not None
        return now.with_gates(made.gates, made.provenance["gate"])
    assert made.signature is not None
    return now.with_signature(made.signature, made.provenance["signature"])


def _same_part(a: Expert, b: Expert, part: str) -> bool:
    if part == "gate":
        return all_identical(a.gates or {}, b.gates or {})
    return b.signature is None if a.signature is None else a.signature.equals(b.signature)


def pool_next(target: Path) -> list[tuple[str, str]]:
    """The last rows of a summary: where the expert is saved, and how a pool is made of it."""
    return [
        ("saved", str(target)),
        ("next", shlex.join(["phatgoose", "pool", "create", "POOL", str(target), "..."])),
    ]


def validation(record: Mapping[str, Any]) -> str:
    """The validation losses of a training, summarised."""
    best = lowest_loss(record)
    if best is None:
        return "none (validate_every is 0)"
    first, last = record["validation_losses"][0], record["validation_losses"][-1]
    text = f"{best:.4f} nats per target token, at step {record.get('best_step', last[0])}"
    return text + (
        f" (step {first[0]}: {first[1]:.4f}, step {last[0]}: {last[1]:.4f})" if first != last else ""
    )
