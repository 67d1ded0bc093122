"""What one contributor does: trains an expert on their own task, then its gates, once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.experts.expert import Expert
from phatgoose.files import sha256_json
from phatgoose.models.base import Base
from phatgoose.records import Task
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.gate import train_gate
from phatgoose.training.progress import Report

KEY = "contribution_key"


def contribution_key(base: Base, task: Task, expert: ExpertConfig, gate: GateConfig) -> str:
    """sha256 of everything the result depends on."""
    return sha256_json([expert.key(), gate.key(), task.hash, base.fingerprint.to_json()])


def contribute(
    base: Base,
    task: Task,
    expert: ExpertConfig,
    gate: GateConfig,
    *,
    name: str,
    folder: Path,
    work: Path,
    report: Report | None = None,
) -> Expert:
    """The expert with gates in `folder`: found there if it is whole and of this very base, task and settings, else trained.

    Args:
        work: what an interrupted training needs to go on; removed at the end.

    Raises:
        ExpertError: what is in `folder` is damaged.
        TrainingError, StorageError: as `train_expert`.
    """
    key = contribution_key(base, task, expert, gate)
    found = finished(folder, key)
    if found is None:
        trained = train_expert(base, task, expert, name=name, work_folder=work / "expert", report=report)
        gated = train_gate(base, trained, task, gate, work_folder=work / "gate", report=report)
        replace(gated, provenance={**gated.provenance, KEY: key}).save(folder)
        found = Expert.load(folder)
    shutil.rmtree(work, ignore_errors=True)
    return found


def finished(folder: Path, key: str) -> Expert | None:
    """The expert in `folder` if it is whole and was made so."""
    if not folder.exists():
        return None
    expert = Expert.load(folder)
    return expert if expert.provenance.get(KEY) == key else None


def record(expert: Expert, task: Task) -> dict[str, Any]:
    """What the training cost, for results."""
    made, gate = expert.provenance, expert.provenance["gate"]
    return {
        "name": expert.name,
        "task": task.name,
        "spec": task.source.get("spec", task.name),
        "rows": len(task.train),
        "rank": max(u.width for u in expert.updates.values()),
        "parameters": expert.parameters,
        "gate_parameters": sum(g.numel() for g in (expert.gates or {}).values()),
        "steps": made["config"]["steps"],
        "gate_steps": gate["config"]["steps"],
        "expert_seconds": made["seconds"],
        "gate_seconds": gate["seconds"],
        "gate_share": gate["seconds"] / made["seconds"],
    }
