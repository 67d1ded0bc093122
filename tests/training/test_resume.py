"""A training that is killed and started again ends in the same bits as one that never was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_once
from test_train_expert import equal
from training_helpers import LORA, SMALL, make_task, state_of
from transformers import TrainerCallback

from phatgoose.errors import StorageError, TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.gate import train_gate
from phatgoose.training.trainer import checkpoints
from phatgoose.training.trainer.progress import silent

CONFIG = ExpertConfig(**SMALL, **LORA, learning_rate=2e-3, dropout=0.2)


@pytest.fixture
def task():
    return make_task()


class Steps(list):
    """Remembers the steps that were done, and stops after one."""

    def __init__(self, stop=None, error=KeyboardInterrupt):
        super().__init__()
        self.stop, self.error = stop, error

    def __call__(self, progress):
        self.append(progress.step)
        if progress.step == self.stop:
            raise self.error("stopped by the test")


def same_record(one, other):
    skipped = ("seconds", "finished", "cost_share")
    return {k: v for k, v in one.items() if k not in skipped} == {
        k: v for k, v in other.items() if k not in skipped
    }


@pytest.mark.slow(7)
@pytest.mark.parametrize("stop", [1, 7, 12])
def test_interrupted_anywhere(make_base, task, tmp_path, stop):
    whole = train_expert(make_base("llama"), task, CONFIG, report=silent)
    base = make_base("llama")
    before = state_of(base.model)
    with pytest.raises(KeyboardInterrupt):
        train_expert(base, task, CONFIG, work_folder=tmp_path, report=Steps(stop))
    assert state_of(base.model) == before
    again = Steps()
    resumed = train_expert(base, task, CONFIG, work_folder=tmp_path, report=again)
    # A report comes before the checkpoint of its step is written.
    assert again[0] == (stop - 1) // 3 * 3
    assert equal(resumed, whole)
    assert same_record(resumed.provenance, whole.provenance)


@pytest.mark.slow(3)
def test_interrupted_again_and_again(make_base, task, tmp_path):
    whole = train_expert(make_base("t5"), task, CONFIG, report=silent)
    base = make_base("t5")
    for stop in (4, 8, 12):
        with pytest.raises(RuntimeError):
            train_expert(base, task, CONFIG, work_folder=tmp_path, report=Steps(stop, RuntimeError))
    assert equal(train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent), whole)


@pytest.mark.slow(8)
@pytest.mark.parametrize("how", ["kill-step-8", "kill-save-2"])
def test_killed(tmp_path, make_base, how):
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, train_once.__file__, str(tmp_path), how], env={**os.environ, **threads}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "expert-training"
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [
        "checkpoint-6" if how == "kill-step-8" else "checkpoint-3"
    ]
    steps = Steps()
    base = make_base("llama")
    resumed = train_expert(base, make_task(), train_once.CONFIG, work_folder=tmp_path, report=steps)
    assert steps[0] == (6 if how == "kill-step-8" else 3)
    assert equal(resumed, train_expert(base, make_task(), train_once.CONFIG, report=silent))
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow(7)
def test_an_empty_path_is_the_current_folder(make_base, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_expert(make_base("llama"), task, CONFIG, work_folder="", report=Steps(7))
    assert (tmp_path / "expert-training" / "checkpoint-6").is_dir()


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "empty"])
def test_an_incomplete_checkpoint_is_passed_over(make_base, task, tmp_path, damage):
    base = make_base("llama")
    with pytest.raises(KeyboardInterrupt):
        train_expert(base, task, CONFIG, work_folder=tmp_path, report=Steps(7))
    good = tmp_path / "expert-training" / "checkpoint-6"
    bad = good.with_name("checkpoint-9")
    bad.mkdir()
    if damage != "empty":
        for file in good.iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
    if damage == "missing":
        (bad / "optimizer.pt").unlink()
    elif damage == "truncated":
        (bad / "optimizer.pt").write_bytes((good / "optimizer.pt").read_bytes()[:-7])
    elif damage == "manifest":
        (bad / "manifest.json").write_text("{")
    steps = Steps()
    resumed = train_expert(base, task, CONFIG, work_folder=tmp_path, report=steps)
    assert steps[0] == 6
    assert equal(resumed, train_expert(base, task, CONFIG, report=silent))


def test_what_is_finished_is_not_done_again(make_base, task, tmp_path):
    base = make_base("llama")
    first = train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    steps = Steps()
    second = train_expert(base, task, CONFIG, name="other", work_folder=tmp_path, report=steps)
    assert steps == []
    assert equal(first, second)
    assert (second.name, second.provenance) == ("other", first.provenance)
    # save_every doesn't change the result
    settings = {**CONFIG.to_json(), "save_every": 1}
    train_expert(base, task, ExpertConfig(**settings), work_folder=tmp_path, report=steps)
    assert steps == []


def test_a_folder_of_another_training_is_refused(make_base, task, tmp_path):
    base = make_base("llama")
    train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    other_config = ExpertConfig(**{**CONFIG.to_json(), "seed": 1})
    for changed, what in (
        ((base, task, other_config), "config"),
        ((base, make_task(20), CONFIG), "task"),
        ((make_base("llama", seed=1), task, CONFIG), "base"),
        ((make_base("llama", dtype=torch.bfloat16), task, CONFIG), "base"),
    ):
        with pytest.raises(TrainingError, match=f"training of another {what};.*Choose another work_folder"):
            train_expert(*changed, work_folder=tmp_path, report=silent)
    assert equal(
        Expert.from_peft(tmp_path / "adapter"), train_expert(base, task, CONFIG, work_folder=tmp_path)
    )


def test_a_changed_result_is_refused(make_base, task, tmp_path):
    base = make_base("llama")
    train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=r"adapter_model.safetensors is no longer what"):
        train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)


def test_a_full_disk_leaves_the_older_checkpoint(make_base, task, tmp_path, monkeypatch):
    base = make_base("llama")
    write_bytes = Path.write_bytes

    def full(path, content):
        if "checkpoint-6" in str(path) and path.name == "optimizer.pt":
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match="no space left"):
            train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    steps = Steps()
    resumed = train_expert(base, task, CONFIG, work_folder=tmp_path, report=steps)
    assert steps[0] == 3
    assert equal(resumed, train_expert(base, task, CONFIG, report=silent))


@pytest.mark.slow(6)
@pytest.mark.parametrize("stop", [4, 12])
def test_gates_resume_too(make_base, task, tmp_path, stop):
    base = make_base("llama")
    expert = train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    config = GateConfig(**SMALL)
    whole = train_gate(base, expert, task, config, report=silent)
    with pytest.raises(KeyboardInterrupt):
        train_gate(base, expert, task, config, work_folder=tmp_path, report=Steps(stop))
    steps = Steps()
    resumed = train_gate(base, expert, task, config, work_folder=tmp_path, report=steps)
    assert steps[0] == (stop - 1) // 3 * 3
    assert all(torch.equal(resumed.gates[p], whole.gates[p]) for p in whole.gates)
    assert same_record(resumed.provenance["gate"], whole.provenance["gate"])
    read = train_gate(base, expert, task, config, work_folder=tmp_path, report=steps)
    assert all(torch.equal(read.gates[p], whole.gates[p]) for p in whole.gates)
    other = train_expert(base, task, ExpertConfig(**{**CONFIG.to_json(), "seed": 1}), report=silent)
    with pytest.raises(TrainingError, match="training of another expert"):
        train_gate(base, other, task, config, work_folder=tmp_path, report=silent)


def test_nothing_is_written_outside_the_work_folder(make_base, task, tmp_path, monkeypatch):
    here, work = tmp_path / "here", tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    train_expert(make_base("llama"), task, CONFIG, work_folder=work, report=silent)
    train_expert(make_base("llama"), task, CONFIG, report=silent)
    assert list(here.iterdir()) == []
    assert sorted(p.name for p in work.iterdir()) == ["adapter", "expert-training"]
    assert sorted(p.name for p in (work / "expert-training").iterdir()) == ["result.json", "training.json"]


def test_loggers_are_told(make_base, task):
    told = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            told.append((state.global_step, logs))

    expert = train_expert(make_base("llama"), task, CONFIG, loggers=[Logger()], report=silent)
    validation = [[step, logs["eval_loss"]] for step, logs in told if "eval_loss" in logs]
    assert validation == expert.provenance["validation_losses"]
    ((step, logs),) = [pair for pair in told if "loss" in pair[1]]
    assert step == 10
    assert logs["loss"] == pytest.approx(
        sum(loss for _, loss in expert.provenance["losses"][:10]) / 10, rel=1e-4
    )
    with pytest.raises(TrainingError, match="can't be set up"):
        train_expert(make_base("llama"), task, CONFIG, loggers=["no-such-logger"], report=silent)


@pytest.mark.slow(12)
def test_two_processes_train_the_same_expert(tmp_path, make_base):
    """torchrun with gloo: same rows in a step, shared out; each process returns the expert, one writes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--standalone",
    ]
    script = [train_once.__file__, str(tmp_path / "work"), "whole", str(tmp_path / "expert")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *script], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (Expert.load(tmp_path / f"expert-{rank}") for rank in (0, 1))
    alone = train_expert(make_base("llama"), make_task(), train_once.CONFIG, report=silent)
    assert equal(first, second)
    assert first.provenance["processes"] == 2
    assert first.provenance["losses"][0][1] == pytest.approx(alone.provenance["losses"][0][1], rel=1e-4)
    for key, tensor in alone.tensors.items():
        torch.testing.assert_close(first.tensors[key], tensor, rtol=1e-3, atol=3e-5)
    assert first.provenance["validation_losses"][-1][1] == pytest.approx(
        alone.provenance["validation_losses"][-1][1], rel=1e-4
    )


def test_checkpoints_are_small(make_base, task, tmp_path):
    """Only what is trained and its optimizer's state, not the base."""
    with pytest.raises(KeyboardInterrupt):
        train_expert(make_base("llama"), task, CONFIG, work_folder=tmp_path, report=Steps(7))
    folder = tmp_path / "expert-training" / "checkpoint-6"
    parameters = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    names = {p.name for p in folder.iterdir()}
    assert names == {
        checkpoints.TRAINED, checkpoints.BEST, checkpoints.HISTORY, checkpoints.MANIFEST, "optimizer.pt",
        "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    assert parameters < 2 * 4 * 7000 + 20000
