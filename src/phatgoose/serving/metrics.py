"""What Prometheus reads."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

from phatgoose.serving.engine.engine import Engine
from phatgoose.serving.engine.job import Job

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One registry a server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "phatgoose_requests",
            "Requests by path and HTTP status.",
            ["path", "status"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "phatgoose_tokens",
            "Tokens read (prompt) and written (answer), by kind of model.",
            ["phase", "kind"],
            registry=self.registry,
        )
        self.first = Histogram(
            "phatgoose_first_token_seconds",
            "From a request to the first token of each answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "phatgoose_answer_seconds",
            "From a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.left = Counter(
            "phatgoose_left",
            "Requests whose client left before the answer was finished.",
            registry=self.registry,
        )
        self.weight = Counter(
            "phatgoose_expert_weight",
            "Routing weight that an expert had, over modules and tokens of the passes that were watched.",
            ["expert"],
            registry=self.registry,
        )
        self.choices = Counter(
            "phatgoose_choices",
            "Choices at all modules in the passes that were watched.",
            registry=self.registry,
        )
        for name, what, value in (
            ("phatgoose_waiting", "Answers that wait for their turn.", lambda: engine.waiting),
            ("phatgoose_running", "Answers that are being written.", lambda: engine.running),
            ("phatgoose_passes", "Passes of the model since the start.", lambda: engine.passes),
            ("phatgoose_up", "1 while the engine works.", lambda: int(engine.trouble is None)),
        ):
            Gauge(name, what, registry=self.registry).set_function(value)
        engine.on_load = self.take_load

    def heard(self, kind: str, job: Job, tokens: int) -> None:
        """New tokens of an answer; with the first, that its prompt was read."""
        if not job.written:
            self.first.observe(time.perf_counter() - job.began)
            self.tokens.labels("prompt", kind).inc(len(job.prompt))
        self.tokens.labels("answer", kind).inc(tokens)

    def take_load(self, job: Job, weights: Tensor, choices: int) -> None:
        """One job's part in a watched pass."""
        assert job.route is not None
        names = job.route.version.pool.names
        for i in weights.nonzero().squeeze(1).tolist():
            self.weight.labels(names[i]).inc(float(weights[i]))
        self.choices.inc(choices)

    def text(self) -> bytes:
        return generate_latest(self.registry)
