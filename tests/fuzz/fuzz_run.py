"""Feeds changed files to every reader (`fuzz_targets`) and reports what doesn't end in success or a PhatgooseError.

    python tests/fuzz/fuzz_run.py --count 1000000                    make fuzz
    python tests/fuzz/fuzz_run.py --only config:1234 --keep folder   one input again, its files kept

Inputs are numbered and depend on nothing but the seed, the target and the number. A process works through many
of them, with bounded memory (RLIMIT_AS); this one watches it, and notes where it hung or died.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import IO, Any, NoReturn

import fuzz_mutations
import psutil
import torch
from fuzz_targets import BROKEN, TARGETS

from phatgoose.errors import PhatgooseError
from phatgoose.experts.adapters import peft_patterns as patterns

MEMORY_BYTES = 2**30
"""What one input's reading may allocate."""
SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
"""Of processor time, for one input."""
STUCK_SECONDS = 120.0
"""Of waiting, for one input."""
MESSAGE_LENGTH = 4000
TALLY = 1000
"""After so many inputs a process says how they ended: what it said is kept when it dies."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all, shared out by weight")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--targets", default="", help="comma-separated; all if empty")
    parser.add_argument("--only", help="TARGET:NUMBER")
    parser.add_argument("--keep", type=Path, help="with --only: where to put the input's files")
    parser.add_argument("--findings", type=Path, help="append findings to this file as JSON lines")
    options = parser.parse_args()
    if options.only:
        return once(options.seed, *options.only.split(":"), options.keep)
    return drive(options)


def drive(options: argparse.Namespace) -> int:
    """Runs all targets, one process at a time; prints a line a target and every kind of finding once."""
    names = [n for n in options.targets.split(",") if n] or list(TARGETS)
    weights = {name: (TARGETS | BROKEN)[name].weight for name in names}
    findings: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    began, done, told = time.monotonic(), 0, set[str]()
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        for name in names:
            count = -(-options.count * weights[name] // sum(weights.values()))
            start = time.monotonic()
            tally = _run_target(options, name, count, Path(folder), findings)
            seconds, done = time.monotonic() - start, done + count
            print(f"{name:12} {count:8} inputs  {count / seconds:7.0f}/s  {dict(tally)}", flush=True)
            for kind in [k for k in findings if k not in told]:
                told.add(kind)
                print(f"  ! {kind}", flush=True)
    seconds = time.monotonic() - began
    print(f"{done} inputs in {seconds:.0f} s, {done / seconds:.0f}/s; {len(findings)} kinds of finding")
    for kind, found in sorted(findings.items()):
        first = found[0]
        print(
            f"\n{len(found)} × {kind}\n"
            f"  --seed {options.seed} --only {first['target']}:{first['number']}\n{first['what']}"
        )
        if options.findings:
            with options.findings.open("a") as file:
                file.write(
                    json.dumps({"kind": kind, "times": len(found), "seed": options.seed, **first}) + "\n"
                )
    return int(bool(findings))


def _run_target(
    options: argparse.Namespace,
    name: str,
    count: int,
    folder: Path,
    findings: dict[str, list[dict[str, Any]]],
) -> collections.Counter[str]:
    tally: collections.Counter[str] = collections.Counter()
    progress, number, deaths = folder / "progress", 0, 0
    while number < count:
        progress.write_bytes(bytes(8))
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()  # torch is imported once; a child may die or be ended
            if child == 0:
                _become_worker(options.seed, name, number, count, progress, output, errors)
            reason = _watch(child, progress)
            output.seek(0)
            errors.seek(0)
            for line in output:
                if line.startswith("{"):
                    found = json.loads(line)
                    if "tally" in found:
                        tally.update(found["tally"])
                    else:
                        findings[found.pop("kind")].append(found | {"target": name})
            if reason is None:
                return tally
            at = int.from_bytes(progress.read_bytes(), "little")
            if at == 0:
                raise SystemExit(f"the worker for {name} can't start:\n{errors.read()[-4000:]}")
            findings[f"{name}: {reason}"].append(
                {"target": name, "number": at - 1, "what": errors.read()[-2000:]}
            )
            number, deaths = at, deaths + 1
            if deaths > 20:
                print(f"{name}: given up after {deaths} processes")
                return tally
    return tally


def _become_worker(
    seed: str, name: str, start: int, end: int, progress: Path, output: IO[str], errors: IO[str]
) -> NoReturn:
    """What a child does and ends with."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    code = 1
    try:
        work(seed, name, start, end, progress)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(child: int, progress: Path) -> str | None:
    """Waits for a worker, and ends it when one input takes too long: None, or how it ended badly."""
    process, last, since, used = psutil.Process(child), -1, time.monotonic(), 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with {code}"
        time.sleep(0.1)
        at = int.from_bytes(progress.read_bytes(), "little")
        cpu = sum(process.cpu_times()[:2])
        if at != last or at == 0:
            last, since, used = at, time.monotonic(), cpu
        elif cpu - used > SECONDS or time.monotonic() - since > STUCK_SECONDS:
            process.kill()
            os.waitpid(child, 0)
            return (
                f"hangs ({cpu - used:.0f} s of processor time, {time.monotonic() - since:.0f} s of waiting)"
            )


def work(seed: str, name: str, start: int, end: int, progress: Path) -> None:
    """In a process of its own: inputs `start` to `end`, findings and a tally on standard output."""
    reader, parent = Reader(seed, name), os.getppid()
    tally: collections.Counter[str] = collections.Counter()
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as place:
        _bound_memory()
        for number in range(start, end):
            if number % TALLY == 0:
                print(json.dumps({"tally": tally}), flush=True)
                tally.clear()
                if os.getppid() != parent:  # whoever watched this is gone
                    return
            place[:] = (number + 1).to_bytes(8, "little")
            began, before = time.process_time(), _peak_bytes()
            kind, what = reader.outcome(number)
            if time.process_time() - began > SECONDS / 2:
                kind, what = f"{name}: takes {SECONDS / 2:.0f} s or more", what
            if _peak_bytes() - before > MEMORY_BYTES // 2:
                kind, what = f"{name}: takes {MEMORY_BYTES // 2} bytes or more", what
            tally["read" if kind == "read" else "refused" if kind == "refused" else "findings"] += 1
            if kind not in ("read", "refused"):
                print(json.dumps({"kind": kind, "number": number, "what": what}), flush=True)
        print(json.dumps({"tally": tally}), flush=True)
    reader.close()


def once(seed: str, name: str, number: str, keep: Path | None) -> int:
    reader = Reader(seed, name)
    kind, what = reader.outcome(int(number))
    print(kind, what, sep="\n")
    if keep is not None:
        shutil.copytree(reader.folder, keep, symlinks=True)
    reader.close()
    return int(kind not in ("read", "refused"))


class Reader:
    """One target with its seeds in memory, and a scratch folder that inputs are written into."""

    def __init__(self, seed: str, name: str):
        torch.set_num_threads(1)
        patterns.SECONDS = 0.1
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        self.seed, self.name, self.target = seed, name, (TARGETS | BROKEN)[name]
        self._root = Path(tempfile.mkdtemp(dir=_scratch(), prefix="fuzz-"))
        self.folder = self._root / "input"
        made = self.target.seeds(self._root / "seeds")
        self.seeds = [
            {str(p.relative_to(one)): p.read_bytes() for p in sorted(one.rglob("*")) if p.is_file()}
            for one in made
        ] or [{}]
        shutil.rmtree(self._root / "seeds", ignore_errors=True)
        self.others = [raw for one in self.seeds for raw in one.values()] or [b""]
        self._there: dict[str, bytes] = {}

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def outcome(self, number: int) -> tuple[str, str]:
        """("read", ""), ("refused", the message) or (what went wrong, its traceback)."""
        rng = random.Random(f"{self.seed}:{self.name}:{number}")
        self._write(self._input(rng))
        try:
            self.target.read(self.folder, rng)
        except PhatgooseError as error:
            message = str(error)
            if len(message) > MESSAGE_LENGTH:
                return f"{self.name}: a message of more than {MESSAGE_LENGTH} characters", message[:1000]
            try:
                message.encode()
            except UnicodeEncodeError:
                return f"{self.name}: a message that can't be written", repr(message[:1000])
            return "refused", message
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "phatgoose" in f.filename or "fuzz" in f.filename][-1]
            where = f"{Path(own.filename).name}:{own.lineno} {own.name}"
            return f"{type(error).__name__} in {where}", "".join(traceback.format_exception(error))[-3000:]
        return "read", ""

    def _input(self, rng: random.Random) -> dict[str, bytes]:
        files = dict(rng.choice(self.seeds))
        names = sorted(n for n in files if n.endswith(self.target.files))
        for _ in range(rng.choice([1, 1, 1, 2])):
            if names:
                name = rng.choice(names)
                files[name] = fuzz_mutations.mutated(rng, name, files[name], self.others)
        return files

    def _write(self, files: dict[str, bytes]) -> None:
        """Writes what isn't there already: reading may have changed the folder only where the target says so."""
        if self.name == "change-pool":
            shutil.rmtree(self.folder, ignore_errors=True)
            self._there = {}
        for name in self._there.keys() - files.keys():
            (self.folder / name).unlink()
        for name, raw in files.items():
            if self._there.get(name) != raw:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(raw)
        self._there = files


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
