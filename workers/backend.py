"""What the consumer asks of anything that can run jobs: a local engine process, a cloud adapter.

One backend serves one pool. The consumer owns the job in Redis, the backend owns its computation; they share only
job id and attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from scheduler.histogram import Histogram
from scheduler.job import ClaimedJob, Priority
from scheduler.model_card import ModelCard
from scheduler.request import Usage
from scheduler.tokens import ChoiceDelta

PRIORITY_RANKS = {priority: rank for rank, priority in enumerate(Priority)}  # 0 is the highest class


class ChoiceProgress(msgspec.Struct, frozen=True, array_like=True):
    """What earlier attempts already made visible of one choice; the backend continues after it."""

    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room for more work now."""

    rows: int
    kv_tokens: int


class JobProgress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """Tokens that a job gained in one step."""

    job_id: str
    attempt: int
    choices: tuple[ChoiceDelta, ...]


class JobDone(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The job's last choice finished; everything visible was reported before."""

    job_id: str
    attempt: int
    usage: Usage


class JobError(msgspec.Struct, frozen=True, array_like=True, tag="error"):
    """The job failed; `code` is of scheduler/errors.py."""

    job_id: str
    attempt: int
    code: str
    message: str
    param: str | None = None


BackendEvent = JobProgress | JobDone | JobError


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """For the fleet registry and the console."""

    pid: int
    engine_pid: int | None
    kind: str
    busy_rows: int
    stats: dict[str, float] = field(default_factory=dict[str, float])
    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])


class BackendDied(Exception):
    """The computation is gone with all its jobs; the consumer gives up their lease at once."""


class Backend(Protocol):
    """Lifetime: start → (submit | cancel | events)* → close → start again, if it died. All on the worker's loop."""

    async def start(self) -> ModelCard:
        """Load and warm up; raises StartupError with one line that says why not, BackendDied when killed meanwhile."""
        ...

    def capacity(self) -> Capacity: ...

    def status(self) -> BackendStatus: ...

    async def submit(self, job: ClaimedJob, progress: tuple[ChoiceProgress, ...]) -> None:
        """Begin or continue a job; its outcome comes out of `events`, errors in the request too."""
        ...

    async def cancel(self, job_id: str, attempt: int) -> None:
        """Stop computing and free what the job holds; no further event of that attempt follows."""
        ...

    async def events(self) -> list[BackendEvent]:
        """All events that are ready, at least one; raises BackendDied when no more can come."""
        ...

    async def close(self) -> None:
        """End the computation now; idempotent."""
        ...
