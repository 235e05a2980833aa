"""The scheduler as a process: it starts on an empty home, records, ends cleanly, and never lives on half dead."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from scheduler.db.schema import migrate
from scheduler.job import JobState
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.job_queue import JobQueue
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.durable_stage import DurableStage, chat_job
from tests.queue_cases import claim_one, enqueue, succeed

Process = asyncio.subprocess.Process


@asynccontextmanager
async def running_scheduler(settings: Settings, **environment: str) -> AsyncIterator[tuple[Process, Callable[[], str]]]:
    """The process, and a function that reads its log so far."""
    log = settings.home / "scheduler.log"
    env = {
        **os.environ,
        "SPILLWAY_HOME": str(settings.home),
        "SPILLWAY_REDIS_URL": settings.redis_url or "",
        "SPILLWAY_SHARD": settings.shard,
        **environment,
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.cli", "scheduler", env=env, stdout=output, stderr=output
        )
    try:
        yield process, log.read_text
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ended(process: Process) -> int:
    async with asyncio.timeout(30):
        return await process.wait()


async def started(log: Callable[[], str]) -> None:
    await wait_until(lambda: "scheduler runs" in log(), within_s=60)


def recorded(home: Path) -> list[str]:
    connection = sqlite3.connect(home / "spillway.db")
    rows = connection.execute("SELECT id FROM finished_jobs").fetchall()
    connection.close()
    return [row[0] for row in rows]


async def test_it_migrates_records_sweeps_and_ends_on_sigterm(queue: JobQueue, settings: Settings) -> None:
    async with running_scheduler(settings) as (process, log):
        await started(log)
        job_id = await enqueue(queue)
        await succeed(queue, await claim_one(queue))
        await wait_until(lambda: recorded(settings.home) == [job_id])
        lost = await enqueue(queue)
        await queue.claim("gone:1", "demo", 1, 1, 10**9)
        await wait_until(lambda: _is_queued(queue, lost))
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
        assert "scheduler stopped" in log() and "Traceback" not in log()


async def _is_queued(queue: JobQueue, job_id: str) -> bool:
    view = await queue.view(job_id)
    return view is not None and view.state is JobState.QUEUED


async def test_it_brings_accepted_jobs_to_the_queue_and_their_answers_to_sql_also_after_a_flushall(
    redis: Redis, settings: Settings
) -> None:
    await asyncio.to_thread(migrate, settings)
    stage = DurableStage(redis, settings)
    lost, held = await stage.hold(chat_job("before"), chat_job("after"))
    await stage.change(lost, stage="sent")  # as if Redis had it before it lost everything
    async with stage.working(), running_scheduler(settings):
        for job_id, said in ((lost, "before "), (held, "after ")):
            await wait_until(lambda job_id=job_id: stage.is_done(job_id), within_s=60)
            assert await stage.said(job_id) == said
    await stage.close()


async def test_it_ends_when_whoever_started_it_dies(redis: Redis, settings: Settings) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    log = settings.home / "scheduler.log"
    env = {**os.environ, "SPILLWAY_HOME": str(settings.home), "SPILLWAY_REDIS_URL": settings.redis_url or ""}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "api.cli",
            "scheduler",
            env=env | {"SPILLWAY_SHARD": settings.shard, "SPILLWAY_PARENT_PIPE": str(reading)},
            pass_fds=(reading,),
            stdout=output,
            stderr=output,
        )
    os.close(reading)
    try:
        await started(log.read_text)
    finally:
        os.close(writing)
    assert await ended(process) == 0


async def test_a_loop_that_dies_ends_the_process_with_a_failure(redis: Redis, settings: Settings) -> None:
    """A key of the wrong type is an error that the recorder cannot wait out."""
    await redis.set(f"sw:{{{settings.shard}}}:done", "not a stream", px=60_000)
    async with running_scheduler(settings) as (process, log):
        assert await ended(process) == 1
        assert "a loop of the scheduler died" in log() and "WRONGTYPE" in log()


async def test_without_redis_it_waits_then_says_so_in_one_line(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, shard="t", redis_url=f"unix://{tmp_path}/none.sock")
    async with running_scheduler(settings, SPILLWAY_REDIS_WAIT_S="1") as (process, log):
        assert await ended(process) == 1
        assert [line for line in log().splitlines() if "critical" in line and "Redis cannot be used" in line]
        assert "Traceback" not in log()


async def test_it_waits_for_a_redis_that_starts_after_it(settings: Settings) -> None:
    home = settings.home / "late"
    server = EmbeddedRedis(home)
    socket = home / "redis" / "redis.sock"
    late = settings.model_copy(update={"redis_url": f"unix://{socket}"})
    async with running_scheduler(late) as (process, log):
        await asyncio.to_thread(server.start)
        try:
            assert server.url == late.redis_url
            await started(log)
            process.terminate()
            assert await ended(process) == 0
        finally:
            await asyncio.to_thread(server.stop)


async def test_a_bad_setting_is_named_in_one_line(settings: Settings) -> None:
    async with running_scheduler(settings, SPILLWAY_LEASE_TTL_MS="fast") as (process, log):
        assert await ended(process) == 1
        assert log().startswith("Bad configuration: SPILLWAY_LEASE_TTL_MS: ") and log().count("\n") == 1
