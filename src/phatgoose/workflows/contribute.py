"""What one contributor does, each once: an expert, its gates, its data signature."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.experts.expert import Expert
from phatgoose.files import sha256_json
from phatgoose.models.base.base import Base
from phatgoose.models.base.sentence_encoder import load_encoder
from phatgoose.models.text.encoding import chat_template_key
from phatgoose.records import Task
from phatgoose.tasks.load import without_paths
from phatgoose.training.config import ExpertConfig, GateConfig, SignatureConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.gate import train_gate
from phatgoose.training.signature import make_signature, signature_key
from phatgoose.training.trainer.progress import silent

KEY = "contribution_key"


def contribution_key(base: Base, task: Task, expert: ExpertConfig, gate: GateConfig | None) -> str:
    """sha256 of everything the result depends on."""
    rendered = list(chat_template_key(base, task).values())
    return sha256_json([expert.key(), gate and gate.key(), task.hash, base.fingerprint.to_json(), *rendered])


def contribute(
    base: Base,
    task: Task,
    expert: ExpertConfig,
    gate: GateConfig | None,
    *,
    name: str,
    folder: Path,
    work: Path,
) -> Expert:
    """The expert with gates in `folder`: read if it was made from this very base, task and settings, else trained.

    Args:
        gate: None: without gates.
        work: the folder of what an interrupted training needs to go on; removed at the end.

    Raises:
        ExpertError: what is in `folder` is damaged.
        TrainingError, StorageError: as `train_expert`.
    """
    key = contribution_key(base, task, expert, gate)
    found = Expert.load(folder) if folder.exists() else None
    if found is None or found.provenance.get(KEY) != key:
        trained = train_expert(base, task, expert, name=name, work_folder=work / "expert", report=silent)
        if gate is not None:
            trained = train_gate(base, trained, task, gate, work_folder=work / "gate", report=silent)
        replace(trained, provenance={**trained.provenance, KEY: key}).save(folder)
        found = Expert.load(folder)
    shutil.rmtree(work, ignore_errors=True)
    return found


def sign(base: Base, task: Task, config: SignatureConfig, *, folder: Path, work: Path) -> Expert:
    """The expert in `folder` with its data signature: read if it was made from these very rows and settings, else made.

    Args:
        work: the folder of what an interrupted run needs to go on; removed at the end.

    Raises:
        ExpertError: what is in `folder` is damaged. TrainingError, BaseModelError: as `make_signature`.
    """
    expert = Expert.load(folder)
    encoder = load_encoder(config.encoder) if config.texts else None
    made = expert.provenance.get("signature")
    key = signature_key(base, expert, task, config, encoder)
    if expert.signature is None or not isinstance(made, dict) or made.get("key") != key:
        make_signature(base, expert, task, config, work_folder=work, report=silent).save(folder)
        expert = Expert.load(folder)
    shutil.rmtree(work, ignore_errors=True)
    return expert


def record(expert: Expert, task: Task) -> dict[str, Any]:
    """What an expert's training cost, for results."""
    made, gate = expert.provenance, expert.provenance.get("gate")
    found = {
        "name": expert.name,
        "task": task.name,
        "spec": without_paths(task.source).get("spec", task.name),
        "rows": len(task.train),
        **sizes(expert),
        "steps": made["config"]["steps"],
        "expert_seconds": made["seconds"],
    }
    if gate is not None:
        found["gate_steps"], found["gate_seconds"] = gate["config"]["steps"], gate["seconds"]
        found["gate_token_share"] = gate["tokens"] / made["tokens"]
    return found


def sizes(expert: Expert) -> dict[str, int]:
    """The size of an expert and its gates."""
    return {
        "rank": max(u.width for u in expert.updates.values()),
        "parameters": expert.parameters,
        "gate_parameters": sum(g.numel() for g in (expert.gates or {}).values()),
    }
