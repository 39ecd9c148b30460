"""Metrics for Prometheus, with vLLM's names."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from llama_jax.serve import request

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_REASONS = {"end": "stop", "cancelled": "abort", "deadline": "abort"}
"""vLLM's ``finished_reason``; the others have the same names."""


class Metrics(request.Metrics):
    """Counters and histograms, which the engine updates.

    Args:
      model: name of the base, the label of all metrics.
    """

    def __init__(self, model: str):
        self._model, self._registry = model, CollectorRegistry()
        counter = lambda name, text: Counter(
            f"vllm:{name}", text, ["model_name"], registry=self._registry
        ).labels(model)
        histogram = lambda name, text, buckets: Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        ).labels(model)
        self._prompt = counter("prompt_tokens", "Tokens of the prompts of ended requests")
        self._new = counter("generation_tokens", "Generated tokens of ended requests")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache")
        self._ended = Counter(
            "vllm:request_success", "Ended requests by reason", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._queue = histogram("request_queue_time_seconds", "Time in the queue", _LONG)
        self._first = histogram("time_to_first_token_seconds", "Time to the first token", _LONG)
        self._next = histogram("inter_token_latency_seconds", "Time between tokens", _SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "Time to the end", _LONG)

    def watch(self, status: Callable[[], request.Status]) -> None:
        """Also report the state of an engine."""
        self._registry.register(_State(self._model, status))

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def admitted(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def finished(
        self, reason: str, prompt_tokens: int, cached_tokens: int, new_tokens: int, seconds: float
    ) -> None:
        self._prompt.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached_tokens)
        self._new.inc(new_tokens)
        self._whole.observe(seconds)
        self._ended.labels(self._model, _REASONS.get(reason, reason)).inc()


class _State(Collector):
    """The state of the engine when the metrics are read."""

    def __init__(self, model: str, status: Callable[[], request.Status]):
        self._model, self._status = model, status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._status()
        used = status.pages_used / max(1, status.pages)
        for name, text, value in (
            ("num_requests_running", "Requests that run", status.running),
            ("num_requests_waiting", "Requests in the queue", status.waiting),
            ("kv_cache_usage_perc", "Fraction of the cache's pages that requests use", used),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
