"""Real worker processes with a tiny model over the session's Redis, and clients that follow their jobs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.job import Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.queue.token_bus import TokenBus
from scheduler.request import InferenceRequest, Message, SamplingParams
from scheduler.settings import Settings
from scheduler.tokens import Delta, EventId, Failed, Finished, Started, TokenEvent
from tests.conftest import wait_until

MODEL = "tiny"
START_S = 90.0


class WorkerProcess:
    """`python -m workers local`, its log in a file."""

    def __init__(self, settings: Settings, refs: Sequence[str], log: Path, pass_fds: tuple[int, ...] = ()) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SPILLWAY_")}
        command = [sys.executable, "-m", "workers", "local"]
        for ref in refs:
            command += ["--model", ref]
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**clean, **settings.as_environment(), "SPILLWAY_LOG_FORMAT": "json"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_status(self, within_s: float = 30.0) -> int:
        return await asyncio.to_thread(self._process.wait, within_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)


class Workers:
    """The worker processes of one test module; `ensure` replaces those that a test has ended."""

    def __init__(self, settings: Settings, model_path: Path, folder: Path) -> None:
        self.settings = settings
        self.model_path = model_path
        self._folder = folder
        self._started: list[WorkerProcess] = []

    def start(self, *refs: str, pass_fds: tuple[int, ...] = (), **changes: Any) -> WorkerProcess:
        settings = self.settings.model_copy(update=changes)
        log = self._folder / f"worker-{len(self._started)}.log"
        worker = WorkerProcess(settings, refs or (str(self.model_path),), log, pass_fds)
        self._started.append(worker)
        return worker

    async def ensure(self, count: int, fleet: Fleet) -> list[WorkerView]:
        """Exactly `count` workers run, are listed and can be reached; returns their entries."""
        running = [worker for worker in self._started if worker.is_running]
        for worker in running[count:]:
            worker.kill()
        for _ in range(count - len(running)):
            self.start()
        return await self.listed(fleet) if count else []

    async def listed(self, fleet: Fleet) -> list[WorkerView]:
        """The entries of all running workers, as soon as each has one of its own."""

        async def look() -> list[WorkerView]:
            pids = {worker.pid for worker in self._started if worker.is_running}
            views = [view for view in await fleet.workers() if view.pid in pids]
            return views if {view.pid for view in views} == pids and len(views) == len(pids) else []

        return await wait_until(look, within_s=START_S)

    def of(self, view: WorkerView) -> WorkerProcess:
        return next(worker for worker in self._started if worker.pid == view.pid)

    def stop(self) -> None:
        for worker in self._started:
            if worker.is_running:
                worker.kill()


@dataclass
class Stream:
    """What a client saw of one job; fails on a gap, a repeat or an event of an older attempt."""

    job_id: str
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    text: dict[int, str] = field(default_factory=dict[int, str])
    reasons: dict[int, str] = field(default_factory=dict[int, str])
    attempts: list[str] = field(default_factory=list[str])
    last: EventId = field(default_factory=lambda: EventId(0, 0))
    end: Finished | Failed | None = None

    @property
    def token_count(self) -> int:
        return sum(map(len, self.tokens.values()))

    def take(self, at: EventId, event: TokenEvent) -> None:
        assert at > self.last, f"{at} after {self.last}"
        starts_attempt = at.seq == 0 and at.attempt > self.last.attempt  # a failover may leave numbers out
        assert self.last.precedes(at) or at.is_terminal or starts_attempt, f"{at} after {self.last}"
        self.last = at
        match event:
            case Started():
                self.attempts.append(event.worker)
            case Delta():
                for choice in event.choices:
                    self.tokens.setdefault(choice.index, []).extend(choice.token_ids)
                    self.text[choice.index] = self.text.get(choice.index, "") + choice.text
                    if choice.finish_reason is not None:
                        self.reasons[choice.index] = choice.finish_reason
            case Finished() | Failed():
                self.end = event


@dataclass(frozen=True)
class Client:
    """Submits requests and follows them, as the API does."""

    lifecycle: Lifecycle
    bus: TokenBus
    settings: Settings

    @asynccontextmanager
    async def stream(
        self, text: str, *, n: int = 1, **sampling: Any
    ) -> AsyncIterator[tuple[Stream, asyncio.Task[None]]]:
        """A submitted job: what is seen of it so far, and the task that follows it to its end."""
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 64, **sampling})
        request = InferenceRequest(model=MODEL, messages=(Message(role="user", content=text),), sampling=params, n=n)
        job_id = new_job_id(self.settings.shard)
        async with self.bus.subscribe(job_id) as subscription:
            await self.lifecycle.submit(request, job_id=job_id, tenant="ann", priority=Priority.NORMAL)
            stream = Stream(job_id)

            async def follow() -> None:
                async with asyncio.timeout(90):
                    while not subscription.ended:
                        for at, event in await subscription.read(1.0):
                            stream.take(at, event)

            task = asyncio.create_task(follow())
            try:
                yield stream, task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def answer(self, text: str, *, n: int = 1, **sampling: Any) -> Stream:
        async with self.stream(text, n=n, **sampling) as (stream, following):
            await following
            return stream
