"""The loops of the scheduler that durable jobs need, stager and recorder, on the event loop of an API stage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api.dialect import HttpDialect
from scheduler.db.durable_outcomes import DurableOutcomes
from scheduler.db.jobs import JobStore
from scheduler.db.outbox_rows import OutboxRows
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.recorder import Recorder
from scheduler.loops.stager import Stager
from scheduler.outbox import Outbox
from scheduler.queue.connection import connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.outcome_reader import OutcomeReader
from tests.api_stage import Stage, running_api_alone


@contextmanager
def running_durable_api(folder: Path, **settings: Any) -> Iterator[Stage]:
    """A stage that brings accepted jobs to Redis and their ends to SQL."""
    with running_api_alone(folder, **settings) as stage, scheduling(stage):
        yield stage


@contextmanager
def scheduling(stage: Stage) -> Iterator[None]:
    """Stager and recorder of this stage, until the block ends."""
    stop, running = stage.call(_start(stage))
    try:
        yield
    finally:
        stage.loop.call_soon_threadsafe(stop.set)
        running.result(timeout=20)


async def _start(stage: Stage) -> tuple[asyncio.Event, Future[None]]:
    stop = asyncio.Event()
    return stop, asyncio.run_coroutine_threadsafe(_run(stage, stop), stage.loop)


async def _run(stage: Stage, stop: asyncio.Event) -> None:
    services, settings = stage.services, stage.settings
    blocking = connect(settings, "blocking")
    rows = OutboxRows(services.database, settings.shard)
    reader = OutcomeReader(services.redis, settings)
    writer = OutcomeWriter(reader, DurableOutcomes(services.database), HttpDialect())
    done, store = DoneLog(blocking, settings), JobStore(services.database)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(Stager(rows, Outbox(rows, services.lifecycle), settings).run(stop))
            group.create_task(Recorder(done, store, writer, services.queue, settings).run(stop))
    finally:
        await blocking.aclose()
