"""Prometheus metrics of this API process, and of the queue and fleet as they stand at scrape time.

Label values are bounded: route templates, known methods, model ids that served a job, live workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.engine_metrics import engine_families, model_family
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import QueueView
from scheduler.request import Usage

disable_created_metrics()  # a second series per counter that says nothing here

SCRAPE_CACHE_S = 1.0
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})
_TTFT_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 60.0, 300.0)
_TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.5)
_REQUEST_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)


class ApiMetrics:
    """What this process counts as requests pass."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "spillway_http_requests", "Answered requests", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "spillway_http_request_seconds",
            "Time from request to the end of its response",
            ["route"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._answers = Gauge(
            "spillway_open_answers", "Clients waiting for or reading an answer", registry=self.registry
        )
        self._ttft = Histogram(
            "spillway_time_to_first_token_seconds",
            "From the accepted request to its first visible token",
            ["model"],
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "spillway_time_per_output_token_seconds",
            "Mean time between the tokens of one answer",
            ["model"],
            buckets=_TPOT_BUCKETS,
            registry=self.registry,
        )
        self._tokens = Counter("spillway_tokens", "Tokens of answered jobs", ["model", "kind"], registry=self.registry)

    def request_ended(self, route: str, method: str, status: int, took_s: float) -> None:
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(took_s)

    def answering(self) -> AbstractContextManager[None]:
        """Held while a client waits for its answer or reads it."""
        return self._answers.track_inprogress()

    def first_token(self, model: str, after_s: float) -> None:
        self._ttft.labels(model).observe(after_s)

    def answered(self, model: str, usage: Usage, decode_s: float) -> None:
        """A job ended well; `decode_s` is the time from its first visible token to its end."""
        self._tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model, "cached").inc(usage.cached_tokens)
        self._tokens.labels(model, "completion").inc(usage.completion_tokens)
        if usage.completion_tokens > 1:
            self._tpot.labels(model).observe(decode_s / (usage.completion_tokens - 1))


class Scrape:
    """The text of /metrics, made at most once a second however many scrapers there are."""

    def __init__(self, metrics: ApiMetrics, queue: JobQueue, fleet: Fleet) -> None:
        self._metrics = metrics
        self._queue = queue
        self._fleet = fleet
        self._cached: tuple[float, bytes] | None = None

    async def text(self) -> bytes:
        """Prometheus exposition format. Raises QueueUnavailable where Redis cannot be asked."""
        now = time.monotonic()
        if self._cached is None or now >= self._cached[0]:
            found = await self._queue.queues(), await self._fleet.workers(), await self._fleet.models()
            registry = CollectorRegistry()
            registry.register(_FleetCollector(*found))
            text = generate_latest(self._metrics.registry) + generate_latest(registry)
            self._cached = (now + SCRAPE_CACHE_S, text)
        return self._cached[1]


class _FleetCollector(Collector):
    """One reading of the queue and the fleet, as metric families."""

    def __init__(self, queues: list[QueueView], workers: list[WorkerView], cards: list[ModelCard]) -> None:
        self._queues = queues
        self._workers = workers
        self._cards = cards

    def collect(self) -> Iterable[Metric]:
        yield from self._queue_families()
        yield from self._worker_families()
        yield model_family(self._cards)
        yield from engine_families(self._workers)

    def _queue_families(self) -> Iterator[Metric]:
        labels = ["pool", "priority"]
        depth = GaugeMetricFamily("spillway_queue_depth", "Waiting jobs", labels=labels)
        running = GaugeMetricFamily("spillway_queue_running", "Jobs that workers hold", labels=labels)
        age = GaugeMetricFamily(
            "spillway_queue_age_seconds",
            "How long the first waiting job has been waiting for a worker",
            labels=labels,
        )
        for queue in self._queues:
            which = [queue.pool, queue.priority.value]
            depth.add_metric(which, queue.waiting)
            running.add_metric(which, queue.running)
            age.add_metric(which, (queue.oldest_ms or 0) / 1000)
        yield from (depth, running, age)

    def _worker_families(self) -> Iterator[Metric]:
        busy = GaugeMetricFamily("spillway_worker_busy_rows", "Rows computing", labels=["worker", "kind"])
        rows = GaugeMetricFamily("spillway_worker_max_rows", "Rows that fit at once", labels=["worker", "kind"])
        for worker in self._workers:
            busy.add_metric([worker.id, worker.kind], worker.busy_rows)
            rows.add_metric([worker.id, worker.kind], worker.max_rows)
        yield from (busy, rows)
