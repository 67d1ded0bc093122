"""Servers with pools against the same server on the bare base, under load.

    python benchmarks/serving.py [--experts 8 166] [--minutes 5] [--clients 64] [--base B] [--pool FOLDER]
    [--out FOLDER]

Starts one `phatgoose serve` without a pool and one for each pool size, each with clients of its own. Each
client sends one request after the other: prompts of 16 to 256 random tokens and answers of 32 to 96, every
second one as a stream. It waits when it gets a 429. The servers take turns of half a minute until each has had
its minutes. All but one are stopped (SIGSTOP) in the middle of their work, so every turn begins under load,
and a busy moment of the machine affects all of them. Tokens are counted by the server. Random experts of rank
16 at all linear layers are the most expensive case, since no two tokens choose alike. Prints tokens a second,
their ratio to the base's in each turn, times to the first token (not counting those during which a server was
stopped), memory, and every status.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
from bench_machine import machine, options_parser

RESULTS = Path(__file__).parent / "results"


@dataclass
class Turn:
    """The results of one server's turn."""

    seconds: float = 0.0
    answer_tokens: float = 0.0
    prompt_tokens: float = 0.0
    requests: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    resident_mb: int = 0

    @property
    def speed(self) -> float:
        return self.answer_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_second": round(self.speed, 2),
            "prompt_tokens_per_second": round(self.prompt_tokens / self.seconds, 2),
            "requests": self.requests,
            "statuses": dict(self.statuses),
            "failures": self.failures,
            "resident_mb": self.resident_mb,
        }


class Server:
    """A `phatgoose serve` that can be stopped and continued, and its clients."""

    def __init__(self, options: argparse.Namespace, pool: Path | None, log: Path):
        self.options, self.log, self.turn, self.over = options, log, Turn(), asyncio.Event()
        clients = options.clients
        command = [
            sys.executable,
            "-m",
            "phatgoose.cli.main",
            "serve",
            "--base",
            options.base,
            "--port",
            "0",
            "--dtype",
            options.dtype,
            "--max-running",
            str(clients),
            "--max-waiting",
            str(clients),
            "--cache-tokens",
            str(clients * 384),
            "--timeout-seconds",
            "3600",
            "--body-seconds",
            "3600",
            *(() if pool is None else ("--pool", str(pool))),
        ]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)
        url = f"http://127.0.0.1:{self._port()}"
        # A connection that is kept alive would be closed while its server is stopped.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx2.AsyncClient(base_url=url, timeout=3600, limits=limits)
        self._ran, self._since = 0.0, time.monotonic()
        self.stop()

    def _port(self) -> int:
        while True:
            for line in self.log.read_text().splitlines():
                if line.startswith("{") and (found := json.loads(line)).get("event") == "ready":
                    return int(found["port"])
            if self.process.poll() is not None:
                raise SystemExit(
                    f"the server ended with {self.process.returncode}: {self.log.read_text()[-2000:]}"
                )
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        self._ran, self._since = self.clock(), None

    def go_on(self) -> None:
        self._since = time.monotonic()
        self.process.send_signal(signal.SIGCONT)

    def clock(self) -> float:
        """Seconds for which it has run."""
        return self._ran + (0.0 if self._since is None else time.monotonic() - self._since)

    def resident_mb(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) // 1024

    async def counted(self) -> dict[str, float]:
        """Tokens by phase that the server has counted since its start."""
        found = {"prompt": 0.0, "answer": 0.0}
        for line in (await self.client.get("/metrics")).text.splitlines():
            if line.startswith("phatgoose_tokens_total"):
                found["prompt" if 'phase="prompt"' in line else "answer"] += float(line.rsplit(" ", 1)[1])
        return found

    async def one_client(self, source: random.Random) -> None:
        while not self.over.is_set():
            try:
                await one_request(self, asked(source, self.options.vocabulary))
            except (httpx2.HTTPError, json.JSONDecodeError) as error:
                self.turn.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=120)


def asked(source: random.Random, vocabulary: int) -> dict[str, Any]:
    """One request."""
    prompt = [source.randrange(20, vocabulary) for _ in range(source.randint(16, 256))]
    stream = source.random() < 0.5
    body = {"prompt": prompt, "max_tokens": source.randint(32, 96), "temperature": 0, "stream": stream}
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


async def one_request(server: Server, body: dict[str, Any]) -> None:
    """Sends it and notes what came of it."""
    began, first, usage = server.clock(), None, None
    async with server.client.stream("POST", "/v1/completions", json=body) as found:
        server.turn.statuses[found.status_code] += 1
        if found.status_code == 429:
            await found.aread()
            await asyncio.sleep(int(found.headers["retry-after"]))
            return
        if found.status_code != 200:
            server.turn.failures.append((await found.aread()).decode()[:300])
            return
        if body["stream"]:
            async for line in found.aiter_lines():
                if line.startswith("data: {"):
                    first = first or server.clock()
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    if "error" in event:
                        server.turn.failures.append(str(event))
        else:
            usage = json.loads(await found.aread())["usage"]
    if usage is None or not 0 < usage["completion_tokens"] <= body["max_tokens"]:
        server.turn.failures.append(f"usage: {usage}")
    server.turn.requests += 1
    if first is not None:
        server.turn.first_token_seconds.append(first - began)


async def one_turn(server: Server, seconds: float) -> Turn:
    server.turn = Turn()
    server.go_on()
    began, before = time.monotonic(), await server.counted()
    await asyncio.sleep(seconds)
    server.turn.seconds, after = time.monotonic() - began, await server.counted()
    server.stop()
    server.turn.answer_tokens = after["answer"] - before["answer"]
    server.turn.prompt_tokens = after["prompt"] - before["prompt"]
    server.turn.resident_mb = server.resident_mb()
    return server.turn


def make_pool(base: str, experts: int, folder: Path) -> Path:
    """A packed pool of random experts on disk, made in a process of its own, whose memory then is free."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[4])\n"
        "from bench_models import random_pool\nfrom phatgoose import load_base\nfrom "
        "phatgoose.experts.packed.pack import pack\nbase = load_base(sys.argv[1], dtype='bfloat16')\n"
        "random_pool(base.model, int(sys.argv[2]), 16).save(sys.argv[3])\npack(sys.argv[3])\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, base, str(experts), str(folder), here], check=True)
    return folder


async def take_turns(servers: dict[str, Server], options: argparse.Namespace) -> dict[str, list[Turn]]:
    """Brings each server to where each of its clients had an answer on average, and then lets them take turns."""
    turns: dict[str, list[Turn]] = {name: [] for name in servers}
    tasks: dict[str, list[asyncio.Task[None]]] = {}
    for name, server in servers.items():
        server.go_on()
        sources = [random.Random(number) for number in range(options.clients)]
        tasks[name] = [asyncio.create_task(server.one_client(source)) for source in sources]
        while server.turn.requests + len(server.turn.failures) < options.clients:
            await asyncio.sleep(0.1)
        server.stop()
        print(f"    {name:12} is warm after {server.clock():.0f} s", flush=True)
    for number in range(max(1, round(options.minutes * 60 / options.turn_seconds))):
        for name in list(servers)[:: 1 if number % 2 else -1]:
            turn = await one_turn(servers[name], options.turn_seconds)
            turns[name].append(turn)
            statuses, failed = dict(turn.statuses), f"  {len(turn.failures)} failed" * bool(turn.failures)
            print(
                f"{number + 1:3} {name:12} {turn.speed:7.1f} tokens/s {turn.resident_mb:6} MB {statuses}{failed}",
                flush=True,
            )
    for name, server in servers.items():  # begun requests are finished, and failed ones are counted
        server.over.set()
        server.go_on()
        await asyncio.gather(*tasks[name])
        await server.client.aclose()
        server.stop()
    return turns


def compare(options: argparse.Namespace, pools: dict[str, Path | None], work: Path) -> dict[str, Any]:
    """All servers, in turns."""
    with ExitStack() as stack:
        servers = {}
        for name, pool in pools.items():
            servers[name] = Server(options, pool, work / f"{name.replace(' ', '-')}.log")
            stack.callback(servers[name].end)
        turns = asyncio.run(take_turns(servers, options))
    return {name: summary(own, turns["base"]) for name, own in turns.items()}


def summary(own: list[Turn], base: list[Turn]) -> dict[str, Any]:
    """Medians over turns, the ratio to the base's turns, and every turn."""
    firsts = sorted(t for turn in own for t in turn.first_token_seconds)
    return {
        "tokens_per_second": round(statistics.median(t.speed for t in own), 2),
        "of_the_base": round(statistics.median(t.speed / b.speed for t, b in zip(own, base, strict=True)), 3),
        "first_token_seconds": {
            name: round(firsts[int(len(firsts) * share)], 3)
            for name, share in (("median", 0.5), ("95 %", 0.95))
            if firsts
        },
        "requests": sum(t.requests for t in own),
        "statuses": dict(sum((t.statuses for t in own), Counter())),
        "failures": sum(len(t.failures) for t in own),
        "resident_mb": [t.resident_mb for t in own],
        "turns": [t.to_json() for t in own],
    }


def options_of(words: list[str] | None) -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 166], help="sizes of random pools")
    parser.add_argument(
        "--pool", type=Path, nargs="*", default=[], help="folders of pools, beside random ones"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes of load for each server")
    parser.add_argument("--turn-seconds", type=float, default=30.0)
    parser.add_argument("--vocabulary", type=int, default=40000, help="prompts are of tokens below this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = options_of(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # otherwise the servers would outlive this process
    record: dict[str, Any] = {
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("GOMP_", "OMP_", "KMP_"))},
        "load_average_before": list(os.getloadavg()),
    }
    with tempfile.TemporaryDirectory(prefix="phatgoose-serving-") as temporary:
        work = Path(temporary)
        pools: dict[str, Path | None] = {"base": None, **{f"pool {p.name}": p for p in options.pool}}
        for experts in options.experts:
            pools[f"{experts} experts"] = make_pool(options.base, experts, work / f"pool-{experts}")
        record["servers"] = compare(options, pools, work)
    for name, found in record["servers"].items():
        print(
            f"{name:12} {found['tokens_per_second']:7.1f} tokens/s, {found['of_the_base']:.2f} of the base's"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"serving-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
