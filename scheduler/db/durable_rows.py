"""What a durable job looks like outside SQL: to be accepted, accepted, read. The stores of durable jobs share it."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.orm import QueryableAttribute, defer
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from scheduler.db.models import DurableJob
from scheduler.job import JobState, Priority
from scheduler.request import Usage


class Stage(enum.StrEnum):
    """Where an accepted job is: only in SQL, in Redis as well, at its end."""

    HELD = "held"
    SENT = "sent"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDurable:
    """A job to accept; times are Unix ms. `request` is the encoded InferenceRequest, `details` JSON.

    Lines of a batch have `batch_id`, `line` and `custom_id`, and are brought to Redis by their batch's window.
    """

    id: str
    tenant: str
    endpoint: str
    model: str
    priority: Priority
    request: bytes
    created_ms: int
    details: str = "{}"
    not_before_ms: int | None = None
    deadline_ms: int | None = None
    idempotency_key: str | None = None
    body_digest: str = ""
    webhook_id: str | None = None
    schedule_id: str | None = None
    batch_id: str | None = None
    line: int | None = None
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """`created` False: an earlier job with the same Idempotency-Key and body answers, and `job_id` is its id."""

    job_id: str
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableView:
    """A durable job as SQL has it; of one that was sent, Redis knows more. `request` and `answer` where asked for."""

    id: str
    stage: Stage
    state: JobState
    tenant: str
    endpoint: str
    model: str
    priority: Priority
    details: str
    created_ms: int
    not_before_ms: int | None
    deadline_ms: int | None
    finished_ms: int | None
    webhook_id: str | None
    schedule_id: str | None
    batch_id: str | None
    line: int | None
    custom_id: str | None
    attempt: int
    error_code: str | None
    error_message: str | None
    error_param: str | None
    usage: Usage
    request: bytes | None = None
    answer: bytes | None = None


def rows_of(*, with_answer: bool = False, with_request: bool = False) -> SelectOfScalar[DurableJob]:
    """A select of durable jobs, without the large columns that were not asked for."""
    left_out = [col(DurableJob.request)] * (not with_request) + [col(DurableJob.answer)] * (not with_answer)
    return select(DurableJob).options(*(defer(cast(QueryableAttribute[Any], column)) for column in left_out))


def view_of(row: DurableJob, *, with_answer: bool = False, with_request: bool = False) -> DurableView:
    stage = Stage(row.stage)
    done = stage is Stage.DONE
    return DurableView(
        id=row.id,
        stage=stage,
        state=JobState(row.state),
        tenant=row.tenant,
        endpoint=row.endpoint,
        model=row.model,
        priority=Priority(row.priority),
        details=row.details,
        created_ms=row.created_ms,
        not_before_ms=row.not_before_ms if row.not_before_ms > row.created_ms else None,
        deadline_ms=row.deadline_ms,
        finished_ms=row.finished_ms if done else None,
        webhook_id=row.webhook_id,
        schedule_id=row.schedule_id,
        batch_id=row.batch_id,
        line=row.line,
        custom_id=row.custom_id,
        attempt=row.attempt,
        error_code=row.error_code,
        error_message=row.error_message,
        error_param=row.error_param,
        usage=Usage(
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.completion_tokens,
            cached_tokens=row.cached_tokens,
        ),
        request=row.request if with_request else None,
        answer=row.answer if with_answer else None,
    )


def new_view(new: NewDurable) -> DurableView:
    """A job just accepted, with its request."""
    return view_of(DurableJob(**values_of(new)), with_request=True)


def values_of(new: NewDurable) -> dict[str, Any]:
    """The columns of a job that is held from now on."""
    # What waits is brought in order of this time; lines of a batch in order of their line.
    order_ms = 0 if new.batch_id is not None else max(new.created_ms, new.not_before_ms or 0)
    is_later = new.not_before_ms is not None and new.not_before_ms > new.created_ms
    return {
        "id": new.id,
        "stage": Stage.HELD.value,
        "state": (JobState.SCHEDULED if is_later else JobState.QUEUED).value,
        "tenant": new.tenant,
        "endpoint": new.endpoint,
        "model": new.model,
        "priority": new.priority.value,
        "created_ms": new.created_ms,
        "not_before_ms": order_ms,
        "deadline_ms": new.deadline_ms,
        "idempotency": idempotency_of(new.tenant, new.idempotency_key),
        "body_digest": new.body_digest,
        "webhook_id": new.webhook_id,
        "schedule_id": new.schedule_id,
        "batch_id": new.batch_id,
        "line": new.line,
        "custom_id": new.custom_id,
        "attempt": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cached_tokens": 0,
        "details": new.details,
        "request": new.request,
    }


def idempotency_of(tenant: str, key: str | None) -> str | None:
    """One tenant's Idempotency-Key; hashed, so that its length and content are ours."""
    return None if key is None else hashlib.sha256(f"{len(tenant)}:{tenant}{key}".encode()).hexdigest()
