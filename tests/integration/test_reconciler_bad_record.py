"""A job's hash that contradicts itself ends no loop: what the reconciler cannot record, it leaves alone."""

from __future__ import annotations

import asyncio
import json

from redis.asyncio import Redis

from scheduler.db.durable import Stage
from scheduler.db.schema import migrate
from scheduler.job import JobState
from scheduler.queue.keys import Keys
from scheduler.settings import Settings
from tests.conftest import SHARD, wait_until
from tests.durable_stage import DurableStage, chat_job, now_ms
from tests.queue_cases import state_of

FAILS = json.dumps({"fail": "context_length_exceeded"})


async def test_a_waiting_job_with_the_time_of_an_end_hinders_no_other(redis: Redis, settings: Settings) -> None:
    """Seen in a soak run: the scheduler ended over one such job, and again as often as it was started."""
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    async with stage.working() as worker:
        await worker.publish()
        odd, other = await stage.hold(chat_job(FAILS), chat_job(FAILS))
        await stage.stager.turn()
        for job_id in (odd, other):
            await wait_until(lambda job_id=job_id: _has_failed(stage, job_id))
    await redis.execute_command("HSET", Keys(SHARD).job(odd), "state", "queued")
    for _ in range(2):  # the first look leaves an end to the recorder
        await stage.reconciler.turn(now_ms())
    assert await stage.state(other) == (Stage.DONE, JobState.FAILED)
    assert await stage.state(odd) == (Stage.SENT, JobState.QUEUED)
    await stage.close()


async def _has_failed(stage: DurableStage, job_id: str) -> bool:
    return await state_of(stage.queue, job_id) is JobState.FAILED
