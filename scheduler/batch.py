"""The batch: its states and allowed moves, and what a reader sees. Pure; the moves are made by scheduler/db/batches.py.

    validating ──► in_progress ──► finalizing ──► completed | expired
        │  └──────────► └──► cancelling ──► cancelled
        └──► failed

Statuses are those of OpenAI's Batch API.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
from dataclasses import dataclass, field

from scheduler.request import Usage

MAX_ERRORS = 100
EXPAND_BATCH = "expand_batch"  # what the API kicks for a batch that is new or is to be cancelled


class BatchStatus(enum.StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not MOVES[self]


MOVES: dict[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset({BatchStatus.FAILED, BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING}),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line (1-based; None: the file) cannot be run."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class LineCounts:
    """How the lines of a batch stand; `failed` counts the cancelled and expired ones as well."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def unfinished(self) -> int:
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a client asks for. Times are Unix ms."""

    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_ms: int
    output_expires_after_s: int | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    webhook_id: str | None = None
    idempotency_key: str | None = None
    body_digest: str = ""


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as a reader sees it; `counts` and `usage` of a terminal batch only are final. Times are Unix ms."""

    id: str
    tenant: str
    endpoint: str
    status: BatchStatus
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    completion_window: str
    output_expires_after_s: int | None
    model: str | None
    metadata: dict[str, str]
    errors: tuple[LineError, ...]
    webhook_id: str | None
    counts: LineCounts
    usage: Usage
    created_ms: int
    expires_ms: int
    in_progress_ms: int | None
    finalizing_ms: int | None
    completed_ms: int | None
    failed_ms: int | None
    expired_ms: int | None
    cancelling_ms: int | None
    cancelled_ms: int | None


def new_batch_id(now_ms: int) -> str:
    """`batch_<time><random>`: sorts by creation time, cannot be guessed (80 random bits)."""
    return f"batch_{now_ms:011x}{secrets.token_hex(10)}"


def line_job_id(shard: str, batch: BatchRecord, line: int) -> str:
    """The id of a line's job: the same whenever it is asked, so that an expansion may be repeated; sorts by line."""
    secret = hashlib.sha256(f"{batch.id}:{line}".encode()).hexdigest()
    return f"job-{shard}-{batch.created_ms:011x}{line:05x}{secret[:15]}"


def result_file_id(batch: BatchRecord, kind: str, made_ms: int) -> str:
    """The id of a batch's file of results: the same whenever it is asked, so that finalising may be repeated."""
    secret = hashlib.sha256(f"{batch.id}:{kind}".encode()).hexdigest()
    return f"file-{made_ms:011x}{secret[:20]}"
