"""Metrics for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

from phatgoose.serving.engine.engine import Engine, GenerationJob

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """A server's metrics, in a registry of their own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phatgoose_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"phatgoose_{name}", text, buckets=SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests by path and HTTP status.", "path", "status")
        self.tokens = counter(
            "tokens", "Tokens read (prompt) and written (answer), by kind of model.", "phase", "kind"
        )
        self.first_token = histogram(
            "first_token_seconds", "From a request to the first token of each answer."
        )
        self.seconds = histogram("answer_seconds", "From a request to the end of its answer.")
        self.left = counter("left", "Requests whose client left before the answer was finished.")
        self.weight = counter(
            "expert_weight",
            "An expert's routing weight, over modules and tokens of the tracked passes.",
            "expert",
        )
        self.choices = counter("choices", "Choices at all modules in the tracked passes.")
        for name, text, value in (
            ("waiting", "Answers that wait for their turn.", lambda: engine.waiting),
            ("running", "Answers that are being written.", lambda: engine.running),
            ("passes", "Passes of the model since the start.", lambda: engine.passes),
            ("up", "1 while the engine works.", lambda: int(engine.failure is None)),
        ):
            Gauge(f"phatgoose_{name}", text, registry=self.registry).set_function(value)
        engine.on_load = self.count_load

    def count_tokens(self, kind: str, job: GenerationJob, tokens: int) -> None:
        """Counts an answer's new tokens; with the first ones, also its prompt's."""
        if not job.output:
            self.first_token.observe(time.perf_counter() - job.arrived)
            self.tokens.labels("prompt", kind).inc(len(job.prompt))
        self.tokens.labels("answer", kind).inc(tokens)

    def count_load(self, job: GenerationJob, weights: Tensor, choices: int) -> None:
        """Counts what the experts did for one job in a tracked pass."""
        assert job.route is not None
        names = job.route.version.pool.names
        for i in weights.nonzero().squeeze(1).tolist():
            self.weight.labels(names[i]).inc(float(weights[i]))
        self.choices.inc(choices)

    def text(self) -> bytes:
        return generate_latest(self.registry)
