"""A worker process: `python -m workers local --model REF [--model REF2]`, one consumer and one engine per model.

SIGTERM or SIGINT drains, a second one hands running jobs back at once; so does the death of `spillway up`.
Exit status: 0 drained, 2 it cannot run (the last log line says why).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

import uvloop

from scheduler.errors import StartupError
from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.parent_watch import watch
from scheduler.queue.connection import check_server, connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.settings import Settings, load_settings
from scheduler.telemetry import configure, get_logger
from workers.consumer import Consumer
from workers.local import LocalBackend
from workers.shutdown import Shutdown

_log = get_logger(__name__)
EXIT_CANNOT_RUN = 2


def main() -> int:
    """Parse, run, and turn what went wrong into one line and an exit status."""
    arguments = _arguments()
    try:
        settings = load_settings()
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return EXIT_CANNOT_RUN
    configure(settings, "worker")
    refs: Sequence[str] = arguments.model or settings.model_refs
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(refs, settings))
    except StartupError as error:
        _log.critical(error.message)
        return EXIT_CANNOT_RUN
    return 0


async def serve(refs: Sequence[str], settings: Settings) -> None:
    """Run one consumer per model until a signal or the parent's death; raises StartupError."""
    shutdown = Shutdown()
    _obey_signals(shutdown)
    redis = connect(settings, "command")
    queue = JobQueue(redis, settings)
    try:
        await check_server(redis, wait_s=settings.redis_wait_s)
        fleet = Fleet(redis, settings)
        lifecycle = Lifecycle(queue, fleet, settings)
        engines = len(refs) * settings.workers
        backends = [LocalBackend(ref, settings, position, engines) for position, ref in enumerate(refs)]
        consumers = [Consumer(backend, lifecycle, fleet, settings, shutdown) for backend in backends]
        await _run(consumers, queue, settings, shutdown)
    finally:
        await queue.aclose()
        await redis.aclose()


async def _run(consumers: Sequence[Consumer], queue: JobQueue, settings: Settings, shutdown: Shutdown) -> None:
    over = asyncio.Event()
    failures: list[StartupError] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(run_sweeper(queue, settings, over))
        parent = None
        if settings.parent_pipe is not None:
            parent = group.create_task(watch(settings.parent_pipe, shutdown.at_once))
        async with asyncio.TaskGroup() as working:
            for consumer in consumers:
                working.create_task(_work(consumer, shutdown, failures))
        over.set()
        if parent is not None:
            parent.cancel()
    if failures:
        raise failures[0]


async def _work(consumer: Consumer, shutdown: Shutdown, failures: list[StartupError]) -> None:
    """One that cannot run ends the process, but not before the others have handed their jobs back."""
    try:
        await consumer.run()
    except StartupError as error:
        failures.append(error)
        shutdown.at_once()


def _obey_signals(shutdown: Shutdown) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.request)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    local = kinds.add_parser("local", help="serve models on this machine")
    local.add_argument("--model", action="append", help="demo, a directory or a Hugging Face repo id; repeatable")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
