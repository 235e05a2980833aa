"""A worker process without a model, `python -m tests.chaos.scripted_worker`: it stands for the cloud kind.

The product's own consumer runs it, so claims, leases, fences, cancels and takeovers are the real ones; only the
computation is scripted (script.py). A poison script kills the whole process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from scheduler.errors import StartupError
from scheduler.job import ClaimedJob
from scheduler.lifecycle import Lifecycle
from scheduler.loops.sweeper import run_sweeper
from scheduler.model_card import ModelCard
from scheduler.parent_watch import watch
from scheduler.queue.connection import check_server, connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.request import Usage, decode_request
from scheduler.settings import Settings, load_settings
from scheduler.telemetry import configure
from scheduler.tokens import ChoiceDelta
from tests.chaos.script import MODEL, Script, decode_script
from workers.backend import (
    BackendEvent,
    BackendStatus,
    Capacity,
    ChoiceProgress,
    JobDone,
    JobError,
    JobProgress,
)
from workers.consumer import Consumer
from workers.shutdown import Shutdown

ROWS = 8
_LAST_WORDS_S = 0.02  # so that what was said before a poisoned word is delivered, as it would be by a real engine


class ScriptedBackend:
    """See workers/backend.py for the contract."""

    def __init__(self) -> None:
        self._playing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ready: asyncio.Queue[BackendEvent] = asyncio.Queue()

    async def start(self) -> ModelCard:
        return ModelCard(id=MODEL, context_tokens=100_000, position=9, max_rows=ROWS, kv_budget_tokens=1_000_000)

    def capacity(self) -> Capacity:
        return Capacity(rows=max(0, ROWS - len(self._playing)), kv_tokens=1_000_000)

    def status(self) -> BackendStatus:
        return BackendStatus(pid=os.getpid(), engine_pid=None, kind="cloud", busy_rows=len(self._playing))

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        said = sum(len(choice.token_ids) for choice in progress)
        finished = any(choice.finish_reason for choice in progress)
        self._playing[job.id, job.attempt] = asyncio.create_task(self._play(job, said, finished))

    async def cancel(self, job_id: str, attempt: int) -> None:
        task = self._playing.pop((job_id, attempt), None)
        if task is not None:
            task.cancel()

    async def events(self) -> list[BackendEvent]:
        events = [await self._ready.get()]
        while not self._ready.empty():
            events.append(self._ready.get_nowait())
        return events

    async def close(self) -> None:
        for key in list(self._playing):
            await self.cancel(*key)

    async def _play(self, job: ClaimedJob, said: int, finished: bool) -> None:
        script = decode_script(decode_request(job.body).messages[-1].content)
        for position in range(said, script.words):
            await asyncio.sleep(script.pause_ms / 1000)
            if script.poison_at is not None and position >= script.poison_at:
                await asyncio.sleep(_LAST_WORDS_S)
                os.kill(os.getpid(), signal.SIGKILL)
            if job.failures < script.failures and position >= script.words // 2:
                self._end(JobError(job.id, job.attempt, "engine_failure", "scripted failure"))
                return
            self._ready.put_nowait(JobProgress(job.id, job.attempt, (_delta(script, position),)))
        if not finished and said >= script.words:
            self._ready.put_nowait(JobProgress(job.id, job.attempt, (ChoiceDelta(index=0, finish_reason="stop"),)))
        self._end(JobDone(job.id, job.attempt, Usage(prompt_tokens=1, completion_tokens=script.words)))

    def _end(self, event: JobDone | JobError) -> None:
        self._ready.put_nowait(event)
        self._playing.pop((event.job_id, event.attempt), None)


def _delta(script: Script, position: int) -> ChoiceDelta:
    last = position == script.words - 1
    return ChoiceDelta(
        index=0, token_ids=(position,), text=script.word(position), finish_reason="stop" if last else None
    )


async def serve(settings: Settings) -> None:
    """One consumer until a signal or the runner's death."""
    shutdown, over = Shutdown(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, shutdown.request)
    redis = connect(settings, "command")
    queue = JobQueue(redis, settings)
    try:
        await check_server(redis, wait_s=settings.redis_wait_s)
        fleet = Fleet(redis, settings)
        consumer = Consumer(ScriptedBackend(), Lifecycle(queue, fleet, settings), fleet, settings, shutdown)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_sweeper(queue, settings, over))
            assert settings.parent_pipe is not None
            parent = group.create_task(watch(settings.parent_pipe, shutdown.at_once))
            await consumer.run()
            over.set()
            parent.cancel()
    finally:
        await queue.aclose()
        await redis.aclose()


def main() -> int:
    settings = load_settings()
    configure(settings, "worker")
    try:
        asyncio.run(serve(settings))
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
