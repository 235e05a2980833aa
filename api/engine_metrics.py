"""What engines report, as Prometheus families: the one place that knows their names. docs/operations.md lists them.

Times are in seconds, counters count since the engine's start and fall to 0 when it starts again, as rate() expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from scheduler.histogram import Histogram
from scheduler.job import Priority
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import WorkerView

_WHO = ("worker", "model")


@dataclass(frozen=True, slots=True)
class _Number:
    """Where a number goes: the family `spillway_engine_<name>`, and labels that tell it from others of the family."""

    kind: Literal["counter", "gauge"]
    name: str
    text: str
    labels: dict[str, str] = field(default_factory=dict[str, str])


def _counter(name: str, text: str, **labels: str) -> _Number:
    return _Number("counter", name, text, labels)


def _gauge(name: str, text: str, **labels: str) -> _Number:
    return _Number("gauge", name, text, labels)


_PAGES = "KV pages in memory by state; cached ones are used by no row"
_HITS = "KV pages of prompts that were found and not computed, by the tier that had them"
_AGE = "How long the longest waiting row has been waiting inside the engine"
_NUMBERS = {
    "steps": _counter("steps", "Rounds of the engine, prefills and decode steps"),
    "decode_steps": _counter("decode_steps", "Decode steps"),
    "decode_tokens": _counter("decode_tokens", "Tokens drawn"),
    "prefill_steps": _counter("prefill_steps", "Prefill launches"),
    "prefill_tokens": _counter("prefill_tokens", "Prompt tokens computed"),
    "cached_tokens": _counter("cached_tokens", "Prompt tokens found in the prefix cache"),
    "preemptions": _counter("preemptions", "Rows sent back to make room"),
    "failed_steps": _counter("failed_steps", "Steps that raised and were retried in parts"),
    "jobs_done": _counter("jobs", "Jobs that ended in the engine", outcome="done"),
    "jobs_failed": _counter("jobs", "Jobs that ended in the engine", outcome="failed"),
    "rows": _gauge("rows", "Rows by state", state="running"),
    "waiting": _gauge("rows", "Rows by state", state="waiting"),
    **{f"waiting_age_s_{p.value}": _gauge("waiting_age_seconds", _AGE, priority=p.value) for p in Priority},
    "pages_used": _gauge("pages", _PAGES, state="used"),
    "pages_free": _gauge("pages", _PAGES, state="free"),
    "pages_cached": _gauge("pages", _PAGES, state="cached"),
    "pages_evicted": _counter("pages_evicted", "KV pages that made room for others"),
    "prefix_ram_pages": _counter("prefix_hit_pages", _HITS, tier="ram"),
    "prefix_disk_pages": _counter("prefix_hit_pages", _HITS, tier="disk"),
    "disk_pages": _gauge("disk_pages", "KV pages on disk"),
    "disk_bytes": _gauge("disk_bytes", "Bytes of KV pages on disk"),
    "disk_pages_written": _counter("disk_pages_written", "KV pages written to disk"),
    "disk_pages_dropped": _counter("disk_pages_dropped", "KV pages the disk was too slow for"),
    "disk_pages_corrupt": _counter("disk_pages_corrupt", "KV pages on disk that failed their check and were not used"),
    "disk_errors": _counter("disk_errors", "Failed reads and writes of KV pages on disk"),
    "snapshot_hits": _counter("snapshot_hits", "Prompts that went on from a snapshot of windows or states"),
    "slot_bytes": _gauge("slot_bytes", "KV of running rows"),
    "kv_bytes": _gauge("kv_bytes", "KV in memory, running rows and kept pages"),
}
_HISTOGRAMS = {
    "token_gaps": ("inter_token_seconds", "Time between two tokens of a row"),
    "prefill_stalls": ("prefill_stall_seconds", "How long a prefill launch held up running rows"),
    "batch_rows": ("batch_rows", "Rows of a decode step"),
}


def engine_families(workers: list[WorkerView]) -> Iterator[Metric]:
    """Numbers and histograms of all engines; a number that is not known here goes to spillway_engine by its name."""
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    others = GaugeMetricFamily("spillway_engine", "Further numbers of engines", labels=[*_WHO, "stat"])
    for worker in workers:
        who = [worker.id, ",".join(worker.models)]
        for name, value in sorted(worker.stats.items()):
            known = _NUMBERS.get(name)
            if known is None:
                others.add_metric([*who, name], value)
            else:
                family = families.setdefault(known.name, _family(known))
                family.add_metric([*who, *known.labels.values()], value)
    yield from families.values()
    yield others
    yield from _histograms(workers)


def model_family(cards: list[ModelCard]) -> Metric:
    """What the probes at load found of each model, as labels of a constant 1."""
    traits = ("lane", "groups", "compiled", "dtype", "model_type")
    family = GaugeMetricFamily(
        "spillway_model_info", "How a model runs: lane, groups of rows, compiled steps", labels=["model", *traits]
    )
    for card in cards:
        family.add_metric([card.id, *(str(card.details.get(trait, "")) for trait in traits)], 1)
    return family


def _family(known: _Number) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if known.kind == "counter" else GaugeMetricFamily
    return kind(f"spillway_engine_{known.name}", known.text, labels=[*_WHO, *known.labels])


def _histograms(workers: list[WorkerView]) -> Iterator[Metric]:
    for name, (title, text) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"spillway_engine_{title}", text, labels=_WHO)
        for worker in workers:
            histogram = worker.histograms.get(name)
            if histogram is not None:
                family.add_metric([worker.id, ",".join(worker.models)], _buckets(histogram), histogram.total)
        yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
