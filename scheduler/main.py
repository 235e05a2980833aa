"""The scheduler process: sweeper, recorder and periodic jobs. `spillway scheduler` starts it and hands in the dialect.

Several may run against one Redis and one database. A loop that dies ends the process with a non-zero status, so that
whoever started it (`spillway up`, compose, a process manager) notices and starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop
from redis.asyncio import Redis

from scheduler import parent_watch
from scheduler.batch import EXPAND_BATCH
from scheduler.batches.keeper import BatchKeeper, make_keeper
from scheduler.db.durable_outcomes import DurableOutcomes
from scheduler.db.durable_retention import DurableRetention
from scheduler.db.files import FileStore
from scheduler.db.jobs import JobStore
from scheduler.db.outbox_rows import OutboxRows
from scheduler.db.schedules import ScheduleStore
from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.dialect import Dialect
from scheduler.errors import CapacityError, InternalError, StartupError
from scheduler.lifecycle import Lifecycle
from scheduler.loops.control_plane import HOUR_S, ControlKick, ControlPlane
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.pruner import prune_durable_jobs, prune_finished_jobs
from scheduler.loops.reconciler import Reconciler
from scheduler.loops.recorder import Recorder
from scheduler.loops.recurrence import Recurrence
from scheduler.loops.stager import Stager
from scheduler.loops.sweeper import run_sweeper
from scheduler.loops.webhook_jobs import webhook_jobs
from scheduler.outbox import Outbox
from scheduler.queue.connection import check_server, connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.outcome_reader import OutcomeReader
from scheduler.schedules import Turns
from scheduler.settings import Settings, load_settings
from scheduler.telemetry import configure, get_logger

FILE_SWEEP_S = 600
PRUNE_AT_S = 17 * 60  # of every hour

log = get_logger(__name__)


def main(dialect: Dialect) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    try:
        settings = load_settings()
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return 1
    configure(settings, "scheduler")
    try:
        migrate(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, dialect))
    except (StartupError, CapacityError) as error:
        log.critical(error.message)
        return 1
    except ExceptionGroup as group:
        log.critical("a loop of the scheduler died", exc_info=group)
        return 1
    return 0


async def _serve(settings: Settings, dialect: Dialect) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    database = Database(settings)
    commands, blocking = connect(settings, "command"), connect(settings, "blocking")
    try:
        await check_server(commands, owned=settings.redis_url is None, wait_s=settings.redis_wait_s)
        await _run_loops(settings, dialect, database, commands, blocking, stop)
    finally:
        await commands.aclose()
        await blocking.aclose()
        await database.close()


async def _run_loops(
    settings: Settings, dialect: Dialect, database: Database, commands: Redis, blocking: Redis, stop: asyncio.Event
) -> None:
    store = JobStore(database)
    control = ControlPlane(settings)
    retention = DurableRetention(database)
    for name, prune in (
        ("prune_finished_jobs", lambda: prune_finished_jobs(store, settings, _now_ms())),
        ("prune_durable_jobs", lambda: prune_durable_jobs(retention, settings, _now_ms())),
    ):
        control.every(HOUR_S, name, prune, offset_s=PRUNE_AT_S)
    async with (
        contextlib.aclosing(ControlKick(settings)) as kick,
        webhook_jobs(control, settings, database),
        asyncio.TaskGroup() as group,
    ):
        batches = _batch_keeper(control, settings, dialect, database, commands, kick)
        until_stop = functools.partial(_until_stop, stop)
        group.create_task(until_stop("sweeper", run_sweeper(JobQueue(commands, settings), settings, stop)))
        group.create_task(until_stop("batches", batches.run(stop)))
        for name, run in _job_loops(settings, dialect, database, commands, blocking, kick):
            group.create_task(until_stop(name, run(stop)))
        endless = [group.create_task(until_stop("control plane", control.run()))]
        if settings.parent_pipe is not None:
            endless.append(group.create_task(parent_watch.watch(settings.parent_pipe, stop.set)))
        log.info("scheduler runs", shard=settings.shard)
        await stop.wait()
        for task in endless:
            task.cancel()
    log.info("scheduler stopped")


def _job_loops(
    settings: Settings, dialect: Dialect, database: Database, commands: Redis, blocking: Redis, kick: ControlKick
) -> list[tuple[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]]]:
    """What brings accepted jobs to Redis and their ends to SQL."""
    queue, fleet = JobQueue(commands, settings), Fleet(commands, settings)
    rows, reader = OutboxRows(database, settings.shard), OutcomeReader(commands, settings)
    writer = OutcomeWriter(reader, DurableOutcomes(database), dialect, kick)
    stager = Stager(rows, Outbox(rows, Lifecycle(queue, fleet, settings)), settings)
    recorder = Recorder(DoneLog(blocking, settings), JobStore(database), writer, queue, settings)
    reconciler = Reconciler(rows, reader, writer, settings)
    schedules = ScheduleStore(database)
    recurrence = Recurrence(schedules, Turns(schedules, fleet, dialect, settings.shard), settings)
    loops = {"stager": stager.run, "recorder": recorder.run, "reconciler": reconciler.run, "recurrence": recurrence.run}
    return list(loops.items())


def _batch_keeper(
    control: ControlPlane, settings: Settings, dialect: Dialect, database: Database, commands: Redis, kick: ControlKick
) -> BatchKeeper:
    files, fleet = FileStore(database, settings), Fleet(commands, settings)
    lifecycle = Lifecycle(JobQueue(commands, settings), fleet, settings)
    keeper = make_keeper(database, files, lifecycle, fleet, dialect, kick, settings)
    control.every(1, "settle_batches", keeper.settle)
    control.function(EXPAND_BATCH, keeper.expand)
    control.every(FILE_SWEEP_S, "sweep_files", lambda: files.sweep(_now_ms()))
    return keeper


async def _until_stop(stop: asyncio.Event, name: str, loop: Coroutine[Any, Any, None]) -> None:
    await loop
    if not stop.is_set():
        raise InternalError(f"the {name} loop ended by itself")


def _now_ms() -> int:
    return int(time.time() * 1000)
