"""The backend that runs jobs on this machine: one engine process with one model, and the account of what it holds.

start ──Ready──► serving ──process ends, hangs or babbles──► BackendDied ──close──► start again
  ├── LoadFailed, early exit ──► StartupError
  └── killed while loading ──► BackendDied
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.errors import StartupError
from scheduler.histogram import Histogram
from scheduler.job import ClaimedJob
from scheduler.model_card import ModelCard
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from workers import kernel_cache
from workers.backend import (
    PRIORITY_RANKS,
    BackendDied,
    BackendEvent,
    BackendStatus,
    Capacity,
    ChoiceProgress,
    JobProgress,
)
from workers.engine.protocol import Cancel, FromEngine, LoadFailed, Loading, Ready, Step, Submit
from workers.engine_environment import engine_environment, make_temporary
from workers.engine_pipe import EnginePipe

_log = get_logger(__name__)

_LOADING_NOTE_S = 15.0
_SEND_TIMEOUT_S = 30.0
# A body's size says roughly what its prompt needs, until the engine has counted: bytes per token, and some output.
_BYTES_PER_TOKEN, _OUTPUT_TOKENS = 4, 256


@dataclass(slots=True)
class _HeldJob:
    """A job that the engine works on; `rows` counts its choices that have not finished."""

    rows: int


@dataclass(slots=True)
class _Account:
    """What the engine said last, and what was submitted since."""

    last: Step | None = None
    stats: dict[str, float] = field(default_factory=dict[str, float])
    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    submitted: int = 0
    uncounted: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])

    def submit(self, kv_tokens: int) -> None:
        self.submitted += 1
        self.uncounted.append((self.submitted, kv_tokens))

    def update(self, step: Step) -> None:
        self.last = step
        if step.stats:
            self.stats, self.histograms = step.stats, step.histograms
        while self.uncounted and self.uncounted[0][0] <= step.accepted:
            self.uncounted.popleft()

    @property
    def uncounted_tokens(self) -> int:
        return sum(tokens for _, tokens in self.uncounted)


class LocalBackend:
    """See workers/backend.py for the contract; after `close`, `start` may be called again."""

    def __init__(self, ref: str, settings: Settings, position: int = 0, engines: int = 1) -> None:
        self._ref = ref
        self._settings = settings
        self._position = position
        self._engines = engines
        self._pipe: EnginePipe | None = None
        self._temporary: Path | None = None
        self._card: ModelCard | None = None
        self._held: dict[tuple[str, int], _HeldJob] = {}
        self._account = _Account()

    async def start(self) -> ModelCard:
        assert self._pipe is None, "close before starting again"
        preparing = asyncio.ensure_future(asyncio.to_thread(self._prepare_temporary))
        try:
            temporary = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            self._temporary = await preparing  # the thread goes on; `close` removes what it makes
            raise
        self._temporary = temporary
        environment = engine_environment(self._settings, temporary, self._engines)
        command = [sys.executable, "-m", "workers.engine", "--model", self._ref, "--position", str(self._position)]
        self._pipe = await EnginePipe.spawn(command, environment)
        try:
            self._card = await self._until_ready(self._pipe)
        except BaseException:
            await self.close()
            raise
        await asyncio.to_thread(kernel_cache.keep, self._settings.home, temporary)
        return self._card

    def capacity(self) -> Capacity:
        if self._card is None or self._pipe is None:
            return Capacity(rows=0, kv_tokens=0)
        rows = self._card.max_rows - sum(min(job.rows, self._card.max_rows) for job in self._held.values())
        free = self._card.kv_budget_tokens if self._account.last is None else self._account.last.free_kv_tokens
        return Capacity(rows=max(0, rows), kv_tokens=max(0, free - self._account.uncounted_tokens))

    def status(self) -> BackendStatus:
        last = self._account.last
        return BackendStatus(
            pid=os.getpid(),
            engine_pid=None if self._pipe is None else self._pipe.pid,
            kind="local",
            busy_rows=0 if last is None else last.busy_rows,
            stats={} if last is None else {**self._account.stats, "waiting": last.waiting, "steps": last.step_count},
            histograms=self._account.histograms,
        )

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        pipe = self._running()
        finished = sum(choice.finish_reason is not None for choice in progress)
        self._held[job.id, job.attempt] = _HeldJob(rows=max(1, job.rows - finished))
        self._account.submit(len(job.body) // _BYTES_PER_TOKEN + _OUTPUT_TOKENS)
        rank = PRIORITY_RANKS[job.priority]
        tag = job.tenant if self._settings.prefix_sharing == "tenant" else ""
        await self._send(pipe, Submit(job.id, job.attempt, job.body, rank, progress, tag))

    async def cancel(self, job_id: str, attempt: int) -> None:
        if self._held.pop((job_id, attempt), None) is not None:
            await self._send(self._running(), Cancel(job_id, attempt))

    async def events(self) -> list[BackendEvent]:
        pipe = self._running()
        while True:
            events = [event for message in await self._read(pipe) for event in self._take(message)]
            if events:
                return events

    async def close(self) -> None:
        pipe, self._pipe = self._pipe, None
        temporary, self._temporary = self._temporary, None
        self._held.clear()
        self._account = _Account()
        if pipe is not None:
            await pipe.end()
        if temporary is not None:
            await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)

    def _prepare_temporary(self) -> Path:
        try:
            temporary = make_temporary(self._settings.home)
            kernel_cache.seed(self._settings.home, temporary)
        except OSError as error:
            raise StartupError(f"Cannot write below {self._settings.home}: {error}") from error
        return temporary

    def _running(self) -> EnginePipe:
        if self._pipe is None:
            raise BackendDied(f"No engine runs for {self._ref}")
        return self._pipe

    async def _until_ready(self, pipe: EnginePipe) -> ModelCard:
        while True:
            for message in await self._read_loading(pipe):
                match message:
                    case Ready():
                        return message.card
                    case LoadFailed():
                        raise StartupError(message.message)
                    case Loading():
                        _log.info(message.message, model=self._ref)
                    case Step():
                        raise StartupError(f"The engine of {self._ref} spoke before it was ready; this is a bug")

    async def _read_loading(self, pipe: EnginePipe) -> list[FromEngine]:
        while True:
            try:
                messages = await pipe.read(_LOADING_NOTE_S)
            except TimeoutError:
                _log.info("still loading", model=self._ref)
                continue
            if not messages:
                status = await pipe.exit_status()
                ended = f"The engine process of {self._ref} ended while loading ({_explain(status)})"
                raise BackendDied(ended) if status < 0 else StartupError(ended)
            return messages

    async def _read(self, pipe: EnginePipe) -> list[FromEngine]:
        """Messages; raises BackendDied after the end of the process, or when it has shown no life for too long."""
        try:
            messages = await pipe.read(self._settings.engine_hang_s * 1.25)
        except TimeoutError:
            await pipe.kill()
            raise BackendDied(f"The engine of {self._ref} showed no sign of life and was killed") from None
        except ValueError as error:
            await pipe.kill()
            raise BackendDied(f"The engine of {self._ref} sent what is no frame: {error}") from error
        if not messages:
            raise BackendDied(f"The engine of {self._ref} ended ({_explain(await pipe.exit_status())})")
        return messages

    async def _send(self, pipe: EnginePipe, message: Submit | Cancel) -> None:
        """A process that is gone or stuck is left to `events`, which reports its death."""
        try:
            await pipe.send(message, _SEND_TIMEOUT_S)
        except TimeoutError:
            _log.error("engine takes no orders; killing it", model=self._ref)
            await pipe.kill()
        except OSError as error:
            _log.warning("engine is gone", model=self._ref, reason=str(error))

    def _take(self, message: FromEngine) -> list[BackendEvent]:
        if not isinstance(message, Step):
            return []
        self._account.update(message)
        return [event for event in message.events if self._is_wanted(event)]

    def _is_wanted(self, event: BackendEvent) -> bool:
        """Whether the event is of a held attempt; books what it frees."""
        held = self._held.get((event.job_id, event.attempt))
        if held is None:
            return False
        if isinstance(event, JobProgress):
            held.rows = max(1, held.rows - sum(choice.finish_reason is not None for choice in event.choices))
        else:
            del self._held[event.job_id, event.attempt]
        return True


def _explain(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
