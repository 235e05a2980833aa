"""The job: its states and allowed transitions, what is queued, what a worker claims, what a reader sees.

    scheduled ──due──► queued ──claim──► running ──finish──► succeeded | failed
                          ▲                 │
                          └── lost / retry / hand back
    any state but a terminal one ──► cancelled (by the client) | expired (deadline, queue TTL)
    failed, cancelled, expired ──replay──► queued: accepted once more under the same id, with the next attempt

Only scheduler/lifecycle.py moves a job; the moves themselves are the Lua scripts of scheduler/queue.
"""

from __future__ import annotations

import enum
import secrets
import time
from dataclasses import dataclass, field

from scheduler.request import Usage


class JobState(enum.StrEnum):
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.QUEUED, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SCHEDULED, *TERMINAL}),
    **{state: frozenset() for state in TERMINAL},
}


class Priority(enum.StrEnum):
    """Classes of work, highest first; shares of the machine go 16 : 4 : 1, and batch below them."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
    BATCH = "batch"


def new_job_id(shard: str) -> str:
    """`job-<shard>-<time><random>`: names its shard, sorts by creation time, cannot be guessed (80 random bits)."""
    return f"job-{shard}-{int(time.time() * 1000):011x}{secrets.token_hex(10)}"


def shard_of(job_id: str) -> str:
    """The shard that a job id names; raises ValueError where the text is no job id."""
    parts = job_id.split("-")
    if len(parts) != 3 or parts[0] != "job" or not parts[1].isalnum() or not parts[2].isalnum():
        raise ValueError(f"not a job id: {job_id[:80]!r}")
    return parts[1]


def created_ms_of(job_id: str) -> int:
    """When a job's id was made (Unix ms); raises ValueError where the text is no job id."""
    shard_of(job_id)
    return int(job_id.rpartition("-")[2][:11], 16)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What `enqueue` needs. `cost_tokens` is an estimate, settled at claim and finish; times are our Unix ms."""

    id: str
    pool: str
    priority: Priority
    tenant: str
    cost_tokens: int
    body: bytes
    rows: int = 1
    deadline_ms: int | None = None
    not_before_ms: int | None = None
    idempotency_key: str | None = None
    body_digest: str = ""
    model: str = ""
    kv_tokens: int = 0  # expected KV footprint; 0: `cost_tokens` stands for it
    durable: bool = False  # it has a SQL row: hash and log stay until the recorder has its outcome
    batch_id: str = ""


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker owns for this attempt. `lost` counts the attempts that ended in a crash, `failures`
    those that ended in a retried error; handing back counts in neither.
    """

    id: str
    attempt: int
    body: bytes
    priority: Priority
    tenant: str
    rows: int = 1
    lost: int = 0
    deadline_ms: int | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim gave; `preempt` names batch jobs of this worker that stand in the way of higher work that waits.

    Hand those back as preempted, then claim again. `is_more_left`: work may wait that had no room here; where none
    does, the bell will tell of new work.
    """

    jobs: tuple[ClaimedJob, ...] = ()
    preempt: tuple[str, ...] = ()
    is_more_left: bool = False


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One attempt as a reader sees it."""

    attempt: int
    worker: str
    started_ms: int


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as a reader sees it, live from Redis or finished from SQL; times are Unix ms."""

    id: str
    state: JobState
    pool: str
    model: str
    priority: Priority
    tenant: str
    attempt: int
    created_ms: int
    started_ms: int | None = None
    first_token_ms: int | None = None
    finished_ms: int | None = None
    deadline_ms: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    usage: Usage | None = None
    attempts: tuple[AttemptView, ...] = field(default=())
    durable: bool = False
    batch_id: str | None = None
