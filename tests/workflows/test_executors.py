"""Executors: every step's outcome, whatever happened to its neighbours; killed workers cost one attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phatgoose.cli.main import app
from phatgoose.errors import PhatgooseError
from phatgoose.workflows.experiment.executors import Executor, Processes, Step

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "smoke.toml"


def step(name, function, **arguments):
    return Step(name, f"step_functions:{function}", arguments)


def steps(tmp_path):
    """(steps, expected): every way for a step to end."""
    return [
        *(step(f"double {i}", "double", x=i) for i in range(4)),
        step("refuses", "refuse", folder=str(tmp_path / "refuse")),
        step("fails once", "fail_once", folder=str(tmp_path / "fail")),
        step("dies once", "die", folder=str(tmp_path / "die"), times=1),
        step("dies always", "die", folder=str(tmp_path / "always"), times=99),
    ]


def check(found, tmp_path, deaths):
    assert [found[f"double {i}"].value for i in range(4)] == [0, 2, 4, 6]
    assert found["refuses"].error == "PhatgooseError: this can't be done: try another way"
    assert len(list((tmp_path / "refuse").iterdir())) == 1  # what is refused would be refused again
    assert found["fails once"].value == "second time"
    assert found["dies once"].value == "survived"
    assert not found["dies always"].ok
    assert deaths in found["dies always"].error
    assert len(list((tmp_path / "always").iterdir())) == 2


def test_processes_outlive_their_workers(tmp_path):
    told = []
    executor = Processes(2, retries=1)
    try:
        found = executor.run(steps(tmp_path), lambda s, state, why: told.append((s.name, state)))
        check(found, tmp_path, "the worker process died (signal 9)")
        assert found["dies once"].attempts == 2
        assert ("dies once", "retry") in told
        assert ("dies always", "failed") in told
        # Workers are kept, and there is one thread's worth of cores for each.
        pids = executor.run([step(f"p{i}", "process_number") for i in range(6)], lambda *_: None)
        assert len({o.value for o in pids.values()}) <= 2
        threads = executor.run([step("t", "threads")], lambda *_: None)["t"].value
        assert threads == (os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // 2)))
        assert os.getpid() not in {o.value for o in pids.values()}
    finally:
        executor.close()


def test_a_worker_that_ends_while_it_waits_costs_nothing():
    executor = Processes(1, retries=0)
    try:
        first = executor.run([step("a", "process_number")], lambda *_: None)["a"].value
        executor._workers[0].connection.close()  # as if it had ended between the look at it and the sending
        second = executor.run([step("b", "process_number")], lambda *_: None)["b"]
        assert second.ok
        assert second.value != first
    finally:
        executor.close()


def gone(process):
    """Whether it ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(tmp_path, end):
    run = (
        "import sys; from phatgoose.workflows.experiment.executors import Processes, Step\n"
        "if __name__ == '__main__':\n"
        "    step = Step('linger', 'step_functions:linger', {'folder': sys.argv[1]})\n"
        "    Processes(1).run([step], lambda *said: None)\n"
    )
    (tmp_path / "run.py").write_text(run)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    parent = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    )
    try:
        until(lambda: (tmp_path / "pid").exists(), 60)
        worker = int((tmp_path / "pid").read_text())
        assert not gone(worker)
    finally:
        parent.send_signal(end)
        parent.wait()
    until(lambda: gone(worker), 20)


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_inline_runs_here_and_keeps_going(tmp_path):
    found = Executor(retries=1).run(steps(tmp_path)[:6], lambda *_: None)
    assert found["double 3"].value == 6
    assert found["fails once"].attempts == 2
    assert "try another way" in found["refuses"].error
    assert (
        not Executor().run([step("f", "fail_once", folder=str(tmp_path / "again"))], lambda *_: None)["f"].ok
    )


def test_settings_are_checked():
    with pytest.raises(PhatgooseError, match="0 workers"):
        Processes(0)


def test_gpus_are_dealt_out_and_none_is_made_up(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    dealt = [s["CUDA_VISIBLE_DEVICES"] for s in Processes(5, gpus=2).settings]
    assert dealt == ["0", "1", "0", "1", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in Processes(1).settings[0]  # its one process may see them all
    with pytest.raises(PhatgooseError, match="shows 2 GPUs, so 4 can't be dealt out"):
        Processes(4, gpus=4)
    with pytest.raises(PhatgooseError, match="2 workers would all take the first of 2 GPUs"):
        Processes(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert [s["CUDA_VISIBLE_DEVICES"] for s in Processes(3, gpus=1).settings] == ["6", "6", "6"]
    for options, says in (
        (("--workers", "2", "--gpus", "0.5"), "only with --ray can a step ask for a part of a GPU"),
        (("--workers", "0", "--gpus", "1"), "GPUs are dealt out to workers, and --workers is 0"),
        (("--workers", "2", "--cpus", "2"), "only with --ray does a step ask for CPUs"),
        (("--ray", "local", "--workers", "2"), "with --ray, as many steps run as its CPUs and GPUs allow"),
        (("--gpus", "inf"), "expected a number that is finite"),
        (("--ray", "local", "--cpus", "0"), "all steps would start at once"),
        (("--ray", "local", "--cpus", "inf"), "expected a number that is finite"),
    ):
        shown = CliRunner().invoke(app, ["experiment", str(RECIPE), *options])
        assert shown.exit_code == 1
        assert says in " ".join(shown.output.split())


RAY = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_executors import step, steps
from phatgoose.errors import PhatgooseError
from phatgoose.workflows.experiment.ray_executor import RayExecutor
for asked in ({{"cpus": 4096}}, {{"gpus": 64}}, {{"gpus": 1.5}}):
    try:
        RayExecutor(**asked)
    except PhatgooseError as error:
        print("REFUSED", error)
executor = RayExecutor(cpus=1, retries=1)
told = []
slow = step("slow", "slow", seconds=6.0)
found = executor.run([*steps(Path({folder!r})), slow], lambda s, state, why: told.append([s.name, state]))
executor.close()
print("RESULT" + json.dumps([{{n: [o.value, o.error, o.attempts] for n, o in found.items()}}, told]))
"""


def test_ray_outlives_its_workers(tmp_path):
    """A real local cluster in a process of its own: Ray leaves threads and sockets behind,
    which are errors in this one."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'phatgoose[ray]'")
    from phatgoose.workflows.experiment.executors import Outcome

    environment = os.environ | {"PYTHONPATH": str(HERE), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RAY.format(here=str(HERE), folder=str(tmp_path))],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REFUSED a step asks for 4096 CPUs, and this machine has" in done.stdout  # it would wait for ever
    assert "REFUSED a step asks for 64 GPUs, and this machine has" in done.stdout
    assert "REFUSED a step asks for 1.5 GPUs: Ray gives a part of one, or whole ones" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found, told = json.loads(line.removeprefix("RESULT"))
    outcomes = {name: Outcome(*values) for name, values in found.items()}
    check(outcomes, tmp_path, "WorkerCrashedError")
    assert outcomes["fails once"].attempts == 2
    assert ["dies always", "failed"] in told
    assert [state for name, state in told if name == "slow"] == ["queued", "running", "done"]
