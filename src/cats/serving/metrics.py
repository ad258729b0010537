"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cats.serving.models import Models, ServedModel

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters of one server; several may run in one process.

    Attributes:
        requests: HTTP requests by route and status.
        prompt_tokens: Tokens of prompts, by model.
        cached_tokens: Those among them that the cache held.
        new_tokens: Tokens of answers.
        ends: Answers by why they ended.
        refused: Requests that found no place.
        first_token: Seconds from a request to its first token.
        each_token: Seconds per token after the first one.
        whole: Seconds from a request to its end.
    """

    def __init__(self, models: Models) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cats_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(
                f"cats_{name}", text, ["model"], buckets=tuple(buckets), registry=registry
            )

        self.requests = counter("requests", "HTTP requests.", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "model")
        self.cached_tokens = counter(
            "cached_prompt_tokens", "Tokens of prompts that the cache held.", "model"
        )
        self.new_tokens = counter("new_tokens", "Tokens of answers.", "model")
        self.ends = counter("answers", "Answers, by why they ended.", "model", "reason")
        self.refused = counter("refused_requests", "Requests that found no place.", "model")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self.each_token = histogram(
            "time_per_token_seconds", "Per token after the first one.", _TOKEN_SECONDS
        )
        self.whole = histogram("answer_seconds", "From the request to its end.", _SECONDS)
        open_answers = Gauge(
            "cats_open_answers", "Answers that decode or wait.", ["model"], registry=registry
        )
        waiting = Gauge("cats_waiting_answers", "Answers that wait.", ["model"], registry=registry)
        for model in models:
            open_answers.labels(model.id).set_function(_reader(model, lambda m: m.queue.open))
            waiting.labels(model.id).set_function(_reader(model, lambda m: m.queue.waiting))

    def text(self) -> bytes:
        """All of them in Prometheus' own form."""
        return generate_latest(self._registry)


def _reader(model: ServedModel, read: Callable[[ServedModel], int]) -> Callable[[], float]:
    return lambda: float(read(model))
