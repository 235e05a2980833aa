"""The durable side of one scheduler for tests: stores, outbox, stager, recorder and reconciler over real servers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis
from sqlmodel import col, select, update

from api.dialect import CHAT, HttpDialect
from scheduler.acceptance import Acceptance
from scheduler.db.durable import DurableStore, DurableView, NewDurable, Stage
from scheduler.db.durable_outcomes import DurableOutcomes
from scheduler.db.jobs import JobStore
from scheduler.db.models import Batch, DurableJob, WebhookDelivery, WebhookEndpoint
from scheduler.db.outbox_rows import OutboxRows
from scheduler.db.session import Database
from scheduler.job import JobState, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.loops.outcome_writer import OutcomeWriter
from scheduler.loops.reconciler import Reconciler
from scheduler.loops.recorder import Recorder
from scheduler.loops.stager import Stager
from scheduler.outbox import Outbox
from scheduler.queue.connection import connect
from scheduler.queue.done_log import DoneLog
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.outcome_reader import OutcomeReader
from scheduler.request import InferenceRequest, Message, encode_request
from scheduler.settings import Settings
from tests.conftest import SHARD
from tests.scripted_worker import ScriptedWorker


def now_ms() -> int:
    return int(time.time() * 1000)


def chat_job(script: str = "one two", *, model: str = "demo", n: int = 1, **fields: Any) -> NewDurable:
    """A job whose worker follows `script`; one that was made a while ago, so that the reconciler looks at it."""
    request = InferenceRequest(model=model, messages=(Message(role="user", content=script),), n=n)
    job = NewDurable(
        id=new_job_id(SHARD),
        tenant="ann",
        endpoint=CHAT,
        model=model,
        priority=Priority.NORMAL,
        request=encode_request(request),
        created_ms=now_ms() - 60_000,
    )
    return replace(job, **fields)


class DurableStage:
    """Everything open; the loops run only where a test asks for it."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.database = Database(settings)
        self.queue, self.fleet = JobQueue(redis, settings), Fleet(redis, settings)
        self.lifecycle = Lifecycle(self.queue, self.fleet, settings)
        self.store, self.finished = DurableStore(self.database), JobStore(self.database)
        self.rows, self.reader = OutboxRows(self.database, settings.shard), OutcomeReader(redis, settings)
        self.outbox = Outbox(self.rows, self.lifecycle)
        self.acceptance = Acceptance(self.store, self.outbox, self.fleet, settings)
        self.writer = OutcomeWriter(self.reader, DurableOutcomes(self.database), HttpDialect())
        self.stager = Stager(self.rows, self.outbox, settings)
        self.reconciler = Reconciler(self.rows, self.reader, self.writer, settings)

    async def close(self) -> None:
        await self.queue.aclose()
        await self.database.close()

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[ScriptedWorker]:
        queue = JobQueue(self.redis, self.settings)
        worker = ScriptedWorker(queue, self.fleet, self.settings, "scripted-0")
        async with worker.running():
            yield worker
        await queue.aclose()

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncGenerator[None]:
        """The loops of these names: stager, recorder, reconciler."""
        stop = asyncio.Event()
        blocking = connect(self.settings, "blocking")
        recorder = Recorder(DoneLog(blocking, self.settings), self.finished, self.writer, self.queue, self.settings)
        loops = {"stager": self.stager.run, "recorder": recorder.run, "reconciler": self.reconciler.run}
        try:
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(loops[name](stop))
                yield
                stop.set()
        finally:
            await blocking.aclose()

    async def hold(self, *jobs: NewDurable) -> list[str]:
        """Accept without sending."""
        return [accepted.job_id for accepted in await self.store.accept(jobs)]

    async def row(self, job_id: str) -> DurableView:
        row = await self.store.get(job_id, with_answer=True)
        assert row is not None
        return row

    async def is_done(self, job_id: str) -> bool:
        return (await self.row(job_id)).stage is Stage.DONE

    async def state(self, job_id: str) -> tuple[Stage, JobState]:
        row = await self.row(job_id)
        return row.stage, row.state

    async def said(self, job_id: str) -> str:
        """The text of the stored answer."""
        answer = (await self.row(job_id)).answer
        assert answer is not None
        return json.loads(answer)["choices"][0]["message"]["content"]

    async def change(self, job_id: str, **values: Any) -> None:
        async with self.database.session() as session:
            await session.exec(update(DurableJob).where(col(DurableJob.id) == job_id).values(values))
            await session.commit()

    async def add_batch(self, batch_id: str, lines: int, script: str = "line") -> list[str]:
        """A batch in progress whose lines are held."""
        jobs = [
            chat_job(script, batch_id=batch_id, line=line, custom_id=f"row-{line}", priority=Priority.BATCH)
            for line in range(1, lines + 1)
        ]
        async with self.database.session() as session:
            session.add(
                Batch(
                    id=batch_id,
                    tenant="ann",
                    endpoint=CHAT,
                    status="in_progress",
                    input_file_id="file-1",
                    completion_window="24h",
                    created_ms=now_ms(),
                    expires_ms=now_ms() + 3_600_000,
                )
            )
            await self.store.add_lines(session, jobs)
            await session.commit()
        return [job.id for job in jobs]

    async def add_webhook(self) -> None:
        """An endpoint of the tenant that wants every event."""
        async with self.database.session() as session:
            endpoint = WebhookEndpoint(id="wh-1", tenant="ann", url="https://example.com", secret=b"s", created_ms=1)
            session.add(endpoint)
            await session.commit()

    async def events(self) -> list[str]:
        """Types of the webhook events written so far."""
        async with self.database.session() as session:
            return sorted(await session.exec(select(WebhookDelivery.type)))
