"""The reconciler reads Redis in steps; a job that runs again between two of them is left to its new end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from redis.asyncio import Redis

from scheduler.db.durable import Stage
from scheduler.db.schema import migrate
from scheduler.job import JobState, JobView
from scheduler.loops.reconciler import Reconciler
from scheduler.queue.outcome_reader import OutcomeReader
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job, now_ms
from tests.queue_cases import state_of

FAILS = json.dumps({"fail": "context_length_exceeded"})


class _ReplayedMeanwhile(OutcomeReader):
    """Somebody replays this job just before its view is read."""

    replayed = ""

    async def views(self, job_ids: Sequence[str]) -> list[JobView]:
        await self.stage.queue.replay(self.replayed)
        return await super().views(job_ids)

    stage: DurableStage


async def test_a_job_that_is_replayed_while_its_end_is_read_ends_nothing_but_itself(
    redis: Redis, settings: Settings
) -> None:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    reader = _ReplayedMeanwhile(redis, settings)
    reader.stage = stage
    reconciler = Reconciler(stage.rows, reader, stage.writer, settings)
    async with stage.working() as worker:
        await worker.publish()
        again, other = await stage.hold(chat_job(FAILS), chat_job(FAILS))
        await stage.stager.turn()
        for job_id in (again, other):
            await wait_until(lambda job_id=job_id: _is_failed(stage, job_id))
    reader.replayed = again
    for _ in range(2):
        await reconciler.turn(now_ms())
    assert await stage.state(other) == (Stage.DONE, JobState.FAILED)
    assert await stage.state(again) == (Stage.SENT, JobState.QUEUED)
    await stage.close()


async def _is_failed(stage: DurableStage, job_id: str) -> bool:
    return await state_of(stage.queue, job_id) is JobState.FAILED
