"""Servers with pools against the same server on the bare base, under load.

    python benchmarks/serving.py [--experts 8 166] [--minutes 5] [--clients 64] [--base B] [--pool FOLDER] [--out FOLDER]

One `phatgoose serve` without a pool and one for each pool size run side by side and are loaded in turns, half a minute each, until each
has had its minutes. Each client sends one request after the other, prompts of 16 to 256 random tokens and answers of 32 to 96, every
second one as a stream; a 429 is obeyed. A turn counts the tokens that the server's own counter saw between two moments at which all
clients were busy; what was begun is finished afterwards. Random experts at all linear layers, of rank 16, are the dearest case: tokens
agree about nothing. Prints tokens a second, their ratio to the base's turn by turn, times to the first token, memory, and every status.
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
from bench_machine import machine

RESULTS = Path(__file__).parent / "results"


@dataclass
class Turn:
    """What came of one server's turn. Tokens and seconds are of the time that counts, requests of the whole turn."""

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


@dataclass
class Server:
    """A `phatgoose serve` of our own."""

    process: subprocess.Popen[bytes]
    port: int

    @staticmethod
    def start(options: argparse.Namespace, pool: Path | None, log: Path) -> Server:
        clients = options.clients
        command = [
            sys.executable, "-m", "phatgoose.cli.main", "serve", "--base", options.base, "--port", "0", "--dtype", options.dtype,
            "--max-running", str(clients), "--max-waiting", str(clients), "--cache-tokens", str(clients * 384),
            *(() if pool is None else ("--pool", str(pool))),
        ]  # fmt: skip
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)
        while True:
            for line in log.read_text().splitlines():
                if line.startswith("{") and (found := json.loads(line)).get("event") == "ready":
                    return Server(process, found["port"])
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
            time.sleep(0.5)

    def resident_mb(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) // 1024

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
    if usage is None or not 0 < usage["completion_tokens"] <= body["max_tokens"]:
        turn.failures.append(f"usage: {usage}")
    turn.requests += 1
    if first is not None:
        turn.first_token_seconds.append(first - began)


async def counted(client: httpx2.AsyncClient) -> dict[str, float]:
    """Tokens by phase that the server has counted since its start."""
    found = {"prompt": 0.0, "answer": 0.0}
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("phatgoose_tokens_total"):
            found["prompt" if 'phase="prompt"' in line else "answer"] += float(line.rsplit(" ", 1)[1])
    return found


async def load(server: Server, options: argparse.Namespace, seconds: float, seed: str) -> Turn:
    """All clients at one server."""
    turn, source, over = Turn(), random.Random(seed), asyncio.Event()
    limits = httpx2.Limits(max_connections=options.clients + 1)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one_client(own: random.Random) -> None:
            while not over.is_set():
                try:
                    await one_request(client, asked(own, options.vocabulary), turn)
                except (httpx2.HTTPError, json.JSONDecodeError) as error:
                    turn.failures.append(f"{type(error).__name__}: {error}")

        tasks = [
            asyncio.create_task(one_client(random.Random(source.random()))) for _ in range(options.clients)
        ]
        await asyncio.sleep(seconds / 6)  # until prompts and answers are mixed as they will be
        began, before = time.monotonic(), await counted(client)
        await asyncio.sleep(seconds)
        turn.seconds, after = time.monotonic() - began, await counted(client)
        turn.answer_tokens = after["answer"] - before["answer"]
        turn.prompt_tokens = after["prompt"] - before["prompt"]
        over.set()
        await asyncio.gather(*tasks)
    turn.resident_mb = server.resident_mb()
    return turn


def make_pool(base: str, experts: int, folder: Path) -> Path:
    """A packed pool of random experts on disk, made in a process of its own, whose memory then is free."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[4])\n"
        "from bench_models import random_pool\nfrom phatgoose import load_base\nfrom phatgoose.experts.packing import pack\n"
        "base = load_base(sys.argv[1], dtype='bfloat16')\n"
        "random_pool(base.model, int(sys.argv[2]), 16).save(sys.argv[3])\npack(sys.argv[3])\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, base, str(experts), str(folder), here], check=True)
    return folder


def compare(options: argparse.Namespace, pools: dict[str, Path | None], work: Path) -> dict[str, Any]:
    """All servers, in turns."""
    turns: dict[str, list[Turn]] = {name: [] for name in pools}
    rounds = max(1, round(options.minutes * 60 / options.turn_seconds))
    with ExitStack() as stack:
        servers = {}
        for name, pool in pools.items():
            servers[name] = Server.start(options, pool, work / f"{name.replace(' ', '-')}.log")
            stack.callback(servers[name].end)
        for number in range(rounds + 1):  # the first round warms up
            order = list(servers) if number % 2 else list(servers)[::-1]
            for name in order:
                seconds = options.turn_seconds if number else min(options.turn_seconds, 5.0)
                turn = asyncio.run(load(servers[name], options, seconds, f"{number}"))
                if number:
                    turns[name].append(turn)
                    statuses, failed = (
                        dict(turn.statuses),
                        f"  {len(turn.failures)} failed" * bool(turn.failures),
                    )
                    print(
                        f"{number:3} {name:12} {turn.speed:7.1f} tokens/s {turn.resident_mb:6} MB {statuses}{failed}",
                        flush=True,
                    )
    return {name: summary(own, turns["base"]) for name, own in turns.items()}


def summary(own: list[Turn], base: list[Turn]) -> dict[str, Any]:
    """Medians over turns, the ratio to the base's turns, and every turn."""
    firsts = sorted(t for turn in own for t in turn.first_token_seconds)
    return {
        "tokens_per_second": round(statistics.median(t.speed for t in own), 2),
        "of_the_base": round(statistics.median(t.speed / b.speed for t, b in zip(own, base, strict=True)), 3),
        "first_token_seconds": {
            name: round(firsts[int(len(firsts) * share)], 3) for name, share in (("median", 0.5), ("95 %", 0.95)) if firsts
        },
        "requests": sum(t.requests for t in own),
        "statuses": dict(sum((t.statuses for t in own), Counter())),
        "failures": sum(len(t.failures) for t in own),
        "resident_mb": [t.resident_mb for t in own],
        "turns": [t.to_json() for t in own],
    }  # fmt: skip


def options_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 166], help="sizes of random pools")
    parser.add_argument(
        "--pool", type=Path, nargs="*", default=[], help="folders of pools, beside random ones"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0, help="of load for each server")
    parser.add_argument("--turn-seconds", type=float, default=30.0)
    parser.add_argument("--vocabulary", type=int, default=40000, help="prompts are of tokens below this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = options_of(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the servers would outlive us
    record: dict[str, Any] = {
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
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
