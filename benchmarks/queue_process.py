"""The processes of benchmarks/queue: `python -m benchmarks.queue_process work|produce SYSTEM URL [OPTIONS as JSON]`.

A producer prints one JSON line, a `Measured`; a worker runs until SIGTERM. Both on uvloop where there is a choice.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass

import uvloop

from benchmarks.queue_system import Producer, System

# Each in a module of its own: no environment can import all of them.
_SYSTEMS = {
    "spillway": ("queue_spillway", "SPILLWAY"),
    "drain": ("queue_spillway", "DRAIN"),
    "arq": ("queue_arq", "TUNED"),
    "arq-default": ("queue_arq", "DEFAULT"),
    "saq": ("queue_saq", "SAQ"),
    "taskiq-list": ("queue_taskiq", "LIST"),
    "taskiq-stream": ("queue_taskiq", "STREAM"),
    "celery-prefork": ("queue_celery", "PREFORK"),
    "celery-solo": ("queue_celery", "SOLO"),
}
_LOOK_S = 0.005
_WARM_UP_TRIPS = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn of one queue: jobs per second from the first enqueue to the last outcome, idle round trips in ms."""

    jobs_per_s: float
    enqueued_per_s: float
    start_ms: list[float]
    result_ms: list[float]


def system(name: str) -> System:
    """The queue of that name; its packages are imported when it is used."""
    module, attribute = _SYSTEMS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), attribute)


async def _round_trips(producer: Producer, trips: int, within_s: float) -> Measured:
    stop_s = time.monotonic() + within_s
    seen = [await producer.round_trip()]
    while len(seen) < trips and time.monotonic() < stop_s:
        seen.append(await producer.round_trip())
    return Measured(0.0, 0.0, [1000 * one.start_s for one in seen], [1000 * one.result_s for one in seen])


async def _throughput(producer: Producer, jobs: int) -> tuple[float, float]:
    began_s = time.monotonic()
    await producer.enqueue(jobs)
    accepted_s = time.monotonic()
    while await producer.unfinished() > 0:  # noqa: ASYNC110 - it happens in Redis
        await asyncio.sleep(_LOOK_S)
    return jobs / (time.monotonic() - began_s), jobs / (accepted_s - began_s)


async def _produce(name: str, url: str, jobs: int, trips: int, within_s: float) -> Measured:
    measured = system(name)
    producer = measured.producer(url)
    await producer.open()
    await _round_trips(producer, _WARM_UP_TRIPS, within_s)
    idle = await _round_trips(producer, trips, within_s)
    rate, accepted = await _throughput(producer, max(1, int(jobs * measured.share)))
    await producer.close()
    return Measured(rate, accepted, idle.start_ms, idle.result_ms)


def main() -> None:
    role, name, url = sys.argv[1:4]
    if role == "work":
        uvloop.run(system(name).work(url))
    else:
        print(json.dumps(asdict(uvloop.run(_produce(name, url, **json.loads(sys.argv[4]))))))


if __name__ == "__main__":
    main()
