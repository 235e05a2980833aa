"""The sweep loop: expired leases, due jobs, deadlines. Every worker and the scheduler run it; Redis limits the rate."""

from __future__ import annotations

import asyncio
import contextlib
import random

from scheduler.errors import QueueUnavailable
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import SweepResult
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

log = get_logger(__name__)


async def run_sweeper(queue: JobQueue, settings: Settings, stop: asyncio.Event) -> None:
    """Sweeps every `sweep_interval_ms` ± 20 % until `stop` is set; outlives whatever fails."""
    failing = False
    while not stop.is_set():
        try:
            _report(await queue.sweep())
            failing = False
        except QueueUnavailable as error:
            if not failing:
                log.warning("sweep failed; trying on", error=error.message)
            failing = True
        except Exception:  # no worker may lose its jobs over a sweep; told once, not at each try
            if not failing:
                log.exception("sweep failed; trying on")
            failing = True
        pause = settings.sweep_interval_ms / 1000 * random.uniform(0.8, 1.2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()


def _report(result: SweepResult) -> None:
    if result.graced:
        log.warning("Redis stood still; extended leases instead of reaping", leases=result.graced)
    if result.workers:
        log.warning("workers lost", workers=result.workers, requeued=result.queued, dead=result.dead)
