"""A pool's server against the same server on the bare base, under load.

    python benchmarks/serving.py [--experts 8 166] [--minutes 5] [--clients 64] [--base B] [--pool FOLDER] [--out FOLDER]

For each pool size, two servers are started, `phatgoose serve` with and without the pool, and loaded in turns, half a minute each, until
each has had its minutes. Each client sends one request after the other, prompts of 16 to 256 random tokens and answers of 32 to 96,
every second one as a stream; a 429 is obeyed. Random experts at all linear layers, of rank 16, are the dearest case: tokens agree about
nothing. Prints tokens a second, their ratio turn by turn, times to the first token, memory, and every status but 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
from bench_machine import machine

RESULTS = Path(__file__).parent / "results"
TURN_SECONDS = 30.0


@dataclass
class Turn:
    """What came of one server's turn."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    requests: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    resident_mb: float = 0.0

    @property
    def speed(self) -> float:
        return self.answer_tokens / self.seconds


@dataclass
class Server:
    """A `phatgoose serve` of our own."""

    process: subprocess.Popen[str]
    port: int

    @staticmethod
    def start(base: str, pool: Path | None, dtype: str, clients: int, log: Path) -> Server:
        command = [
            sys.executable, "-m", "phatgoose.cli.main", "serve", "--base", base, "--port", "0", "--dtype", dtype,
            "--max-running", str(clients), "--max-waiting", str(clients), "--cache-tokens", str(clients * 384),
            *(() if pool is None else ("--pool", str(pool))),
        ]  # fmt: skip
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink, text=True)
        while True:
            for line in log.read_text().splitlines():
                if line.startswith("{") and (found := json.loads(line)).get("event") == "ready":
                    return Server(process, found["port"])
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}; see {log}")
            time.sleep(0.5)

    def resident_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) / 1024

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=120)


def asked(source: random.Random, vocabulary: int) -> dict[str, Any]:
    """One request."""
    prompt = [source.randrange(20, vocabulary) for _ in range(source.randint(16, 256))]
    stream = source.random() < 0.5
    body = {"prompt": prompt, "max_tokens": source.randint(32, 96), "temperature": 0, "stream": stream}
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


async def one_request(client: httpx2.AsyncClient, body: dict[str, Any], turn: Turn) -> None:
    """Sends it and notes what came of it."""
    began, first, usage = time.monotonic(), None, None
    async with client.stream("POST", "/v1/completions", json=body) as found:
        turn.statuses[found.status_code] += 1
        if found.status_code == 429:
            await found.aread()
            await asyncio.sleep(int(found.headers["retry-after"]))
            return
        if found.status_code != 200:
            turn.failures.append((await found.aread()).decode()[:300])
            return
        if body["stream"]:
            async for line in found.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.monotonic()
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    if "error" in event:
                        turn.failures.append(str(event))
        else:
            usage = json.loads(await found.aread())["usage"]
    assert usage is not None
    turn.requests += 1
    turn.prompt_tokens += usage["prompt_tokens"]
    turn.answer_tokens += usage["completion_tokens"]
    if first is not None:
        turn.first_token_seconds.append(first - began)


async def load(server: Server, clients: int, seconds: float, seed: str, vocabulary: int) -> Turn:
    """All clients at one server until the time is over; what was begun is finished, and counts."""
    turn, source = Turn(), random.Random(seed)
    limits = httpx2.Limits(max_connections=clients)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.monotonic()

        async def one_client(own: random.Random) -> None:
            while time.monotonic() - began < seconds:
                try:
                    await one_request(client, asked(own, vocabulary), turn)
                except (httpx2.HTTPError, AssertionError, json.JSONDecodeError) as error:
                    turn.failures.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(one_client(random.Random(source.random())) for _ in range(clients)))
        turn.seconds = time.monotonic() - began
    turn.resident_mb = server.resident_mb()
    return turn


def make_pool(base: str, experts: int, work: Path) -> Path:
    """A packed pool of random experts on disk, made in a process of its own, whose memory then is free."""
    folder = work / f"pool-{experts}"
    code = (
        "import sys; sys.path.insert(0, sys.argv[4])\n"
        "from bench_models import random_pool\nfrom phatgoose import load_base\nfrom phatgoose.experts.packing import pack\n"
        "base = load_base(sys.argv[1], dtype='bfloat16')\n"
        "random_pool(base.model, int(sys.argv[2]), 16).save(sys.argv[3])\npack(sys.argv[3])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, base, str(experts), str(folder), str(Path(__file__).parent)], check=True
    )
    return folder


def compare(options: argparse.Namespace, pool: Path, work: Path) -> dict[str, Any]:
    """Both servers, in turns."""
    servers = {
        name: Server.start(options.base, folder, options.dtype, options.clients, work / f"{name}.log")
        for name, folder in (("base", None), ("routed", pool))
    }
    turns: dict[str, list[Turn]] = {name: [] for name in servers}
    rounds = max(1, round(options.minutes * 60 / options.turn_seconds))
    try:
        for number in range(rounds + 1):  # the first turn warms up
            for name in list(servers) if number % 2 else list(servers)[::-1]:
                seconds = options.turn_seconds if number else min(options.turn_seconds, 10.0)
                turn = asyncio.run(
                    load(servers[name], options.clients, seconds, f"{number}", options.vocabulary)
                )
                if number:
                    turns[name].append(turn)
                    print(
                        f"  {name:7} {turn.speed:7.1f} tokens/s  {turn.resident_mb:6.0f} MB  {dict(turn.statuses)}"
                    )
    finally:
        for server in servers.values():
            server.end()
    return summary(turns)


def summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians over turns, ratios of neighbouring turns, and everything that wasn't as it should be."""
    found: dict[str, Any] = {}
    for name, own in turns.items():
        firsts = sorted(t for turn in own for t in turn.first_token_seconds)
        found[name] = {
            "tokens_per_second": statistics.median(t.speed for t in own),
            "prompt_tokens_per_second": sum(t.prompt_tokens for t in own) / sum(t.seconds for t in own),
            "requests": sum(t.requests for t in own),
            "first_token_seconds": {
                q: firsts[int(len(firsts) * p)] for q, p in (("median", 0.5), ("95 %", 0.95))
            }
            if firsts
            else {},
            "statuses": dict(sum((t.statuses for t in own), Counter())),
            "failures": [f for t in own for f in t.failures][:20],
            "resident_mb": [round(t.resident_mb) for t in own],
        }
    pairs = zip(turns["routed"], turns["base"], strict=True)
    found["ratio"] = statistics.median(r.speed / b.speed for r, b in pairs)
    found["turns"] = {
        name: [
            {
                "tokens_per_second": t.speed,
                "requests": t.requests,
                "statuses": dict(t.statuses),
                "resident_mb": round(t.resident_mb),
            }
            for t in own
        ]
        for name, own in turns.items()
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 166], help="sizes of random pools")
    parser.add_argument("--pool", type=Path, help="a pool's folder, instead of random ones")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0, help="of load for each server")
    parser.add_argument("--turn-seconds", type=float, default=TURN_SECONDS)
    parser.add_argument("--vocabulary", type=int, default=40000, help="prompts are of tokens below this")
    parser.add_argument(
        "--work", type=Path, help="where pools and logs are written; a temporary folder if not given"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "pools": {},
    }
    work = options.work or Path(tempfile.mkdtemp(prefix="phatgoose-serving-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        for experts in [0] if options.pool else options.experts:
            pool = options.pool or make_pool(options.base, experts, work)
            name = str(options.pool) if options.pool else f"{experts} experts"
            print(name)
            found = record["pools"][name] = compare(options, pool, work)
            print(f"  routed / base: {found['ratio']:.2f}")
            if not options.pool:
                shutil.rmtree(pool)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    record["load_average_after"] = list(os.getloadavg())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"serving-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
