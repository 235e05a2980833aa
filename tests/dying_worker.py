"""A worker process around the counting backend that kills itself with -9 at a named point, or lives in another time.

    python -m tests.dying_worker POINT [clock_s]

Settings come from the environment, as for `python -m workers`; SIGTERM asks it to drain.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from scheduler.job import ClaimedJob
from scheduler.lifecycle import Lifecycle
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Outcome
from scheduler.settings import Settings, load_settings
from tests.counting_backend import CountingBackend
from workers.backend import BackendEvent, ChoiceProgress
from workers.consumer import Consumer
from workers.shutdown import Shutdown

Point = Literal["claim", "prefill", "decode", "last_token", "drain", "never"]
POINTS: tuple[Point, ...] = get_args(Point)
DECODE_STEPS = 15


class _Backend(CountingBackend):
    """Dies with the first job that it is given, before its first step, or in the middle of its steps."""

    def __init__(self, point: Point) -> None:
        super().__init__(step_s=0.02)
        self._point = point
        self._steps = 0

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        if self._point == "claim":
            _die()
        await super().submit(job, progress)

    async def events(self) -> list[BackendEvent]:
        if self._point == "prefill" and self.status().busy_rows:
            _die()
        events = await super().events()
        self._steps += 1
        if self._point == "decode" and self._steps > DECODE_STEPS:
            _die()
        return events


class _Lifecycle(Lifecycle):
    """Dies where the last token is in the log and the end is not, or where the second job is to be handed back."""

    point: Point = "never"
    handed = 0

    async def end(self, worker: str, endings: Sequence[tuple[ClaimedJob, Outcome]]) -> None:
        if self.point == "last_token" and endings:
            _die()
        await super().end(worker, endings)

    async def hand_back(self, worker: str, job: ClaimedJob, **options: Any) -> bool:
        self.handed += 1
        if self.point == "drain" and self.handed == 2:
            _die()
        return await super().hand_back(worker, job, **options)


@contextmanager
def running(settings: Settings, point: Point, clock_s: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Such a worker; it is gone at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPILLWAY_")}
    command = [sys.executable, "-m", "tests.dying_worker", point, str(clock_s)]
    process = subprocess.Popen(command, env={**clean, **settings.as_environment()}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def _work(point: Point, settings: Settings) -> None:
    redis = connect(settings, "command")
    queue, shutdown = JobQueue(redis, settings), Shutdown()
    fleet = Fleet(redis, settings)
    lifecycle = _Lifecycle(queue, fleet, settings)
    lifecycle.point = point
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.request)
    await Consumer(_Backend(point), lifecycle, fleet, settings, shutdown).run()
    await queue.aclose()
    await redis.aclose()


def main() -> None:
    point, clock_s = sys.argv[1], int(sys.argv[2])
    true_time = time.time
    time.time = lambda: true_time() + clock_s
    asyncio.run(_work(next(one for one in POINTS if one == point), load_settings()))


if __name__ == "__main__":
    main()
