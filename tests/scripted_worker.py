"""A worker without a model: it claims through the real queue and says what the request's last message tells it to.

The last user message is a JSON `Script`, or plain text that is said back word by word.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from scheduler.histogram import Histogram
from scheduler.job import ClaimedJob
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.queue.job_queue import JobQueue
from scheduler.request import InferenceRequest, Usage, decode_request
from scheduler.settings import Settings
from scheduler.tokens import ChoiceDelta, Delta, EventId, PositionLogprobs, TokenLogprob, encode_event

ROWS = 64
PROMPT_TOKENS = 5
CACHED_TOKENS = 2


class Script(msgspec.Struct):
    """What to do with a job. Every attempt says what is left of `say`; `die_after` counts tokens of the first one."""

    say: list[str] = []
    finish: str = "stop"
    pause_s: float = 0.0
    start_after_s: float = 0.0
    hold: bool = False  # say nothing more and wait to be cancelled
    die_after: int | None = None
    fail: str | None = None  # an error code, after `say`
    forget_reason: bool = False


STATS = {
    "steps": 3.0, "decode_tokens": 7.0, "jobs_failed": 1.0, "waiting_age_s_low": 2.5, "prefix_ram_pages": 4.0,
    "prefix_disk_pages": 2.0, "shoes": 9.0,
}  # fmt: skip
GAPS = Histogram((0.01, 0.1), [5, 1, 2], 3.5)


class ScriptedWorker:
    """One worker of pool `demo`; `requests` and `cancelled` are what tests look at, by job id."""

    def __init__(self, queue: JobQueue, fleet: Fleet, settings: Settings, name: str) -> None:
        self.name = name
        self.requests: dict[str, InferenceRequest] = {}
        self.claims: dict[str, ClaimedJob] = {}
        self.cancelled: set[str] = set()
        self._queue = queue
        self._lifecycle = Lifecycle(queue, fleet, settings)
        self._fleet = fleet

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def publish(self) -> None:
        now_ms = int(time.time() * 1000)
        view = WorkerView(
            id=self.name, pid=1, engine_pid=2, host="here", models=("demo",), busy_rows=1, max_rows=ROWS,
            started_ms=now_ms - 5000, seen_ms=now_ms, stats=STATS, histograms={"token_gaps": GAPS},
        )  # fmt: skip
        await self._fleet.publish(
            view,
            ModelCard(id="demo", context_tokens=512, created_s=1_760_000_000, details={"lane": "slots", "compiled": 1}),
        )
        other = ModelCard(id="org/other-model", context_tokens=4096, created_s=1_760_000_000, position=1)
        await self._fleet.publish(view, other)

    async def _run(self) -> None:
        publish_at = 0.0
        async with asyncio.TaskGroup() as group:
            while True:
                if time.monotonic() >= publish_at:
                    await self.publish()
                    publish_at = time.monotonic() + 1
                jobs = (await self._lifecycle.claim(self.name, "demo", ROWS, ROWS, 1_000_000)).jobs
                for job in jobs:
                    group.create_task(self._play(job))
                await self._queue.sweep()
                if not jobs:
                    await self._lifecycle.wait_for_work("demo", 0.3)

    async def _play(self, job: ClaimedJob) -> None:
        request = decode_request(job.body)
        self.requests[job.id], self.claims[job.id] = request, job
        script = _script(request)
        said = sum(len(choice.token_ids) for choice in await self._lifecycle.progress(job.id)) // request.n
        await asyncio.sleep(script.start_after_s)
        seq = 0
        for position in range(said, len(script.say)):
            if script.die_after == position and job.attempt == 1:
                await self._lifecycle.worker_died(self.name)
                return
            seq += 1
            if not await self._say(job, EventId(job.attempt, seq), _delta(request, script, position)):
                return
            await asyncio.sleep(script.pause_s)
        while script.hold:
            seq += 1
            if not await self._say(job, EventId(job.attempt, seq), Delta(choices=())):
                return
            await asyncio.sleep(0.02)
        await self._end(job, request, script)

    async def _say(self, job: ClaimedJob, at: EventId, delta: Delta) -> bool:
        result = await self._lifecycle.emit(self.name, [(job.id, at, encode_event(delta))])
        if job.id in result.cancelled:
            self.cancelled.add(job.id)
            await self._lifecycle.cancelled(self.name, job)
        return job.id not in result.cancelled | result.fenced

    async def _end(self, job: ClaimedJob, request: InferenceRequest, script: Script) -> None:
        if script.fail is not None:
            await self._lifecycle.fail(self.name, job, script.fail, f"scripted {script.fail}")
            return
        spoken = len(script.say) * request.n
        usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=spoken, cached_tokens=CACHED_TOKENS)
        await self._lifecycle.complete(self.name, job, usage)


def _script(request: InferenceRequest) -> Script:
    text = request.messages[-1].content
    if text.startswith("{"):
        return msgspec.json.decode(text, type=Script)
    return Script(say=[f"{word} " for word in text.split()])


def _delta(request: InferenceRequest, script: Script, position: int) -> Delta:
    text = script.say[position]
    last = position == len(script.say) - 1 and not script.hold and not script.forget_reason and script.fail is None
    logprobs = (PositionLogprobs(TokenLogprob(text, -0.25, tuple(text.encode()))),) if request.sampling.logprobs else ()
    return Delta(
        choices=tuple(
            ChoiceDelta(
                index=index,
                token_ids=(position,),
                text=text,
                finish_reason="stop" if last and script.finish == "stop" else "length" if last else None,
                logprobs=logprobs,
            )
            for index in range(request.n)
        )
    )
