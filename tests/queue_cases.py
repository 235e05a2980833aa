"""Small builders for tests of the queue: jobs, events, and the moves of a worker."""

from __future__ import annotations

import dataclasses
from typing import Any

from redis.asyncio import Redis

from scheduler.job import ClaimedJob, JobState, NewJob, Priority, new_job_id
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import EmitResult, Outcome
from scheduler.queue.scripts import raw
from scheduler.request import Usage
from scheduler.settings import Settings
from scheduler.tokens import ChoiceDelta, Delta, EventId, Finished, encode_event
from tests.conftest import SHARD

POOL = "demo"
WORKER = "mac-1:100"
PLENTY = 10**9


def new_job(**fields: Any) -> NewJob:
    job = NewJob(
        id=new_job_id(SHARD),
        pool=POOL,
        priority=Priority.NORMAL,
        tenant="ann",
        cost_tokens=100,
        body=b"body",
        model="demo",
    )
    return dataclasses.replace(job, **fields)


def changed(settings: Settings, **fields: Any) -> Settings:
    return settings.model_copy(update=fields)


def delta(text: str) -> bytes:
    return encode_event(Delta(choices=(ChoiceDelta(index=0, token_ids=tuple(text.encode()), text=text),)))


async def ask(redis: Redis, *words: str | bytes | int | float) -> Any:
    """One plain Redis command; redis-py's own methods are typed for sync and async at once."""
    return await raw(redis)(*words)


async def enqueue(queue: JobQueue, **fields: Any) -> str:
    return (await queue.enqueue(new_job(**fields))).job_id


async def claim(
    queue: JobQueue, worker: str = WORKER, rows: int = 32, kv: int = PLENTY, total: int = 32
) -> list[ClaimedJob]:
    return list((await queue.claim(worker, POOL, rows, total, kv)).jobs)


async def claim_one(queue: JobQueue, worker: str = WORKER) -> ClaimedJob:
    (job,) = await claim(queue, worker, rows=1)
    return job


async def emit(queue: JobQueue, job: ClaimedJob, seq: int, text: str, worker: str = WORKER) -> EmitResult:
    return await queue.emit(worker, [(job.id, EventId(job.attempt, seq), delta(text))])


async def succeed(queue: JobQueue, job: ClaimedJob, worker: str = WORKER, usage: Usage | None = None) -> bool:
    usage = usage or Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1)
    outcome = Outcome(JobState.SUCCEEDED, encode_event(Finished(usage)), usage)
    return await queue.finish(worker, job.id, job.attempt, outcome)


async def log_ids(queue: JobQueue, job_id: str) -> list[str]:
    return [str(at) for at, _ in await queue.read_events(job_id, None)]


async def state_of(queue: JobQueue, job_id: str) -> JobState:
    view = await queue.view(job_id)
    assert view is not None
    return view.state
