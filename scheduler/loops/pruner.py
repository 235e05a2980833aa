"""Retention: finished jobs older than SPILLWAY_FINISHED_JOB_RETENTION_DAYS leave SQL. Run by cron.py."""

from __future__ import annotations

from scheduler.db.jobs import JobStore
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

DAY_MS = 24 * 3600 * 1000
STEP_ROWS = 1000

log = get_logger(__name__)


async def prune_finished_jobs(store: JobStore, settings: Settings, now_ms: int) -> int:
    """Delete what is past its retention, in small steps; how many rows that were."""
    before_ms = now_ms - settings.finished_job_retention_days * DAY_MS
    total = 0
    while (removed := await store.prune(before_ms, STEP_ROWS)) > 0:
        total += removed
    if total:
        log.info("removed old finished jobs", count=total, older_than_days=settings.finished_job_retention_days)
    return total
