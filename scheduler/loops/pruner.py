"""Retention: what is older than the settings say leaves SQL, in small steps. The control plane runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from scheduler.db.durable_retention import DurableRetention
from scheduler.db.jobs import JobStore
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

DAY_MS = 24 * 3600 * 1000
STEP_ROWS = 1000

log = get_logger(__name__)


async def prune_finished_jobs(store: JobStore, settings: Settings, now_ms: int) -> int:
    """Delete what is past its retention, in small steps; how many rows that were."""
    before_ms = now_ms - settings.finished_job_retention_days * DAY_MS
    total = await _all(lambda: store.prune(before_ms, STEP_ROWS))
    if total:
        log.info("removed old finished jobs", count=total, older_than_days=settings.finished_job_retention_days)
    return total


async def prune_durable_jobs(retention: DurableRetention, settings: Settings, now_ms: int) -> int:
    """The same for durable jobs, and for lines whose batch was removed. Idempotency-Keys last a day."""
    await _all(lambda: retention.forget_keys(now_ms - DAY_MS, STEP_ROWS))
    before_ms = now_ms - settings.durable_job_retention_days * DAY_MS
    total = await _all(lambda: retention.prune(before_ms, STEP_ROWS))
    for batch_id in await retention.removed_batches():
        total += await _all(lambda batch_id=batch_id: retention.prune_lines(batch_id, STEP_ROWS))
    if total:
        log.info("removed old durable jobs", count=total, older_than_days=settings.durable_job_retention_days)
    return total


async def _all(step: Callable[[], Awaitable[int]]) -> int:
    total = 0
    while removed := await step():
        total += removed
    return total
