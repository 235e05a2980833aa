"""The SQL tables. Migrations follow these classes; `python -m migrations check` shows where they do not.

Finished jobs are content-free: no prompt, no answer, no token. Durable jobs (async jobs, lines of batches) keep their
request and their answer until retention removes them. Times are Unix milliseconds. Strings carry a length because
PostgreSQL and a reader of the console both want a bound; writers cut to it.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, LargeBinary, MetaData, Text
from sqlmodel import Field, SQLModel

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(SQLModel):
    """Root of the tables; constraints are named, so that a later migration can alter them on any database."""

    metadata = MetaData(naming_convention=NAMING)


class FinishedJob(Table, table=True):
    """One job in a terminal state. `attempt` is the one that ended it and fences late writers."""

    __tablename__ = "finished_jobs"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (Index("ix_finished_jobs_tenant_id", "tenant", "id"),)

    id: str = Field(primary_key=True, max_length=96)
    state: str = Field(max_length=16)
    pool: str = Field(max_length=255)
    model: str = Field(max_length=255)
    priority: str = Field(max_length=16)
    tenant: str = Field(max_length=128)
    attempt: int
    created_ms: int = Field(sa_type=BigInteger)
    started_ms: int | None = Field(default=None, sa_type=BigInteger)
    first_token_ms: int | None = Field(default=None, sa_type=BigInteger)
    finished_ms: int = Field(sa_type=BigInteger, index=True)
    deadline_ms: int | None = Field(default=None, sa_type=BigInteger)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error_code: str | None = Field(default=None, max_length=64)
    error_message: str | None = Field(default=None, max_length=500)


class ApiKey(Table, table=True):
    """One API key; of the secret only its SHA-256 (it has 256 random bits) and its first characters are kept."""

    __tablename__ = "api_keys"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=32)
    name: str = Field(max_length=128)
    tenant: str = Field(max_length=128)
    secret_hash: str = Field(max_length=64, unique=True)
    prefix: str = Field(max_length=24, index=True)
    created_ms: int = Field(sa_type=BigInteger)
    last_used_ms: int | None = Field(default=None, sa_type=BigInteger)
    revoked_ms: int | None = Field(default=None, sa_type=BigInteger)


class DurableJob(Table, table=True):
    """The outbox: one job that was accepted by committing this row.

    `stage` held: not in Redis yet (its time has not come, or Redis was away); sent: Redis has it, or had it before a
    loss; done: `state` is terminal. `attempt` is the one that ended it and fences late writers. `request` is the
    encoded InferenceRequest, `answer` the response body as its endpoint would have sent it. `finished_ms` of a job that
    was opened again stays: an outcome with that very time is the old one.
    """

    __tablename__ = "durable_jobs"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (
        Index("ix_durable_jobs_stage_batch_id_not_before_ms", "stage", "batch_id", "not_before_ms"),
        Index("ix_durable_jobs_batch_id_stage_line_state", "batch_id", "stage", "line", "state"),  # covers the counts
        Index("ix_durable_jobs_tenant_id", "tenant", "id"),
    )

    id: str = Field(primary_key=True, max_length=96)
    stage: str = Field(max_length=8)
    state: str = Field(max_length=16)
    tenant: str = Field(max_length=128)
    endpoint: str = Field(max_length=64)
    model: str = Field(max_length=255)
    priority: str = Field(max_length=16)
    created_ms: int = Field(sa_type=BigInteger)
    not_before_ms: int = Field(default=0, sa_type=BigInteger)  # orders what waits: 0 for the lines of a batch
    deadline_ms: int | None = Field(default=None, sa_type=BigInteger)
    finished_ms: int | None = Field(default=None, sa_type=BigInteger, index=True)
    idempotency: str | None = Field(default=None, max_length=64, unique=True)  # hash of tenant and key
    body_digest: str = Field(default="", max_length=64)
    webhook_id: str | None = Field(default=None, max_length=40)
    schedule_id: str | None = Field(default=None, max_length=40, index=True)
    batch_id: str | None = Field(default=None, max_length=40)
    line: int | None = None  # 1-based line of the batch's input file
    custom_id: str | None = Field(default=None, max_length=512)
    attempt: int = 0
    error_code: str | None = Field(default=None, max_length=64)
    error_message: str | None = Field(default=None, max_length=500)
    error_param: str | None = Field(default=None, max_length=255)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    # Large columns last: SQLite reads what stands before them without walking their overflow pages.
    details: str = Field(default="{}", sa_type=Text)  # the client's metadata, JSON
    request: bytes = Field(sa_type=LargeBinary)
    answer: bytes | None = Field(default=None, sa_type=LargeBinary)


class StoredFile(Table, table=True):
    """One uploaded or produced file; its bytes lie in SPILLWAY_HOME/files under its id."""

    __tablename__ = "files"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=40)
    tenant: str = Field(max_length=128, index=True)
    filename: str = Field(max_length=255)
    purpose: str = Field(max_length=32)
    bytes: int = Field(sa_type=BigInteger)
    created_ms: int = Field(sa_type=BigInteger)
    expires_ms: int | None = Field(default=None, sa_type=BigInteger, index=True)


class Batch(Table, table=True):
    """One batch. `status` is OpenAI's; the moves are guarded updates, so that a late writer cannot undo a cancel."""

    __tablename__ = "batches"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=40)
    tenant: str = Field(max_length=128, index=True)
    endpoint: str = Field(max_length=64)
    status: str = Field(max_length=16, index=True)
    input_file_id: str = Field(max_length=40)
    output_file_id: str | None = Field(default=None, max_length=40)
    error_file_id: str | None = Field(default=None, max_length=40)
    completion_window: str = Field(max_length=16)
    output_expires_after_s: int | None = None
    model: str | None = Field(default=None, max_length=255)
    details: str = Field(default="{}", sa_type=Text)  # the client's metadata, JSON
    errors: str | None = Field(default=None, sa_type=Text)  # of the validation, JSON list
    webhook_id: str | None = Field(default=None, max_length=40)
    idempotency: str | None = Field(default=None, max_length=64, unique=True)  # hash of tenant and key
    body_digest: str = Field(default="", max_length=64)
    total: int = 0  # lines, once all of them are known to be good
    completed: int = 0  # this and the tokens: from the end on, as the lines are removed earlier than the batch
    failed: int = 0
    prompt_tokens: int = Field(default=0, sa_type=BigInteger)
    completion_tokens: int = Field(default=0, sa_type=BigInteger)
    cached_tokens: int = Field(default=0, sa_type=BigInteger)
    created_ms: int = Field(sa_type=BigInteger)
    in_progress_ms: int | None = Field(default=None, sa_type=BigInteger)
    expires_ms: int = Field(sa_type=BigInteger)
    finalizing_ms: int | None = Field(default=None, sa_type=BigInteger)
    completed_ms: int | None = Field(default=None, sa_type=BigInteger)
    failed_ms: int | None = Field(default=None, sa_type=BigInteger)
    expired_ms: int | None = Field(default=None, sa_type=BigInteger)
    cancelling_ms: int | None = Field(default=None, sa_type=BigInteger)
    cancelled_ms: int | None = Field(default=None, sa_type=BigInteger)


class Schedule(Table, table=True):
    """A recurring job. `body` is the request as the client wrote it, parsed anew at each turn."""

    __tablename__ = "schedules"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=40)
    tenant: str = Field(max_length=128, index=True)
    name: str = Field(max_length=128)
    cron: str = Field(max_length=128)
    timezone: str = Field(max_length=64)
    endpoint: str = Field(max_length=64)
    body: bytes = Field(sa_type=LargeBinary)
    priority: str = Field(max_length=16)
    deadline_after_ms: int | None = Field(default=None, sa_type=BigInteger)
    details: str = Field(default="{}", sa_type=Text)
    webhook_id: str | None = Field(default=None, max_length=40)
    paused: bool = False
    created_ms: int = Field(sa_type=BigInteger)
    next_ms: int | None = Field(default=None, sa_type=BigInteger, index=True)
    last_ms: int | None = Field(default=None, sa_type=BigInteger)
    last_job_id: str | None = Field(default=None, max_length=96)
    last_error: str | None = Field(default=None, max_length=500)


class WebhookEndpoint(Table, table=True):
    """Where a tenant wants to be told. Secrets are sealed with the home's key (vault.py); `old_secret` still signs
    for a day after a rotation."""

    __tablename__ = "webhook_endpoints"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=40)
    tenant: str = Field(max_length=128, index=True)
    name: str = Field(default="", max_length=128)
    url: str = Field(max_length=2048)
    events: str = Field(default="[]", sa_type=Text)  # JSON list of event types; empty: all
    secret: bytes = Field(sa_type=LargeBinary)
    old_secret: bytes | None = Field(default=None, sa_type=LargeBinary)
    old_secret_until_ms: int | None = Field(default=None, sa_type=BigInteger)
    created_ms: int = Field(sa_type=BigInteger)
    disabled_ms: int | None = Field(default=None, sa_type=BigInteger)
    disabled_reason: str | None = Field(default=None, max_length=255)


class WebhookDelivery(Table, table=True):
    """One event on its way to one endpoint, written in the transaction that made the event true.

    `event_id` is the same for every try and every endpoint: the receiver's key against doubles.
    """

    __tablename__ = "webhook_deliveries"  # pyright: ignore[reportAssignmentType]
    __table_args__ = (
        Index("ix_webhook_deliveries_status_next_ms", "status", "next_ms"),
        Index("uq_webhook_deliveries_endpoint_id_event_id", "endpoint_id", "event_id", unique=True),
    )

    id: str = Field(primary_key=True, max_length=40)
    endpoint_id: str = Field(max_length=40)
    tenant: str = Field(max_length=128, index=True)
    event_id: str = Field(max_length=160)
    type: str = Field(max_length=64)
    payload: bytes = Field(sa_type=LargeBinary)
    status: str = Field(max_length=16)  # pending | delivered | dead
    attempts: int = 0
    created_ms: int = Field(sa_type=BigInteger)
    next_ms: int = Field(sa_type=BigInteger)
    finished_ms: int | None = Field(default=None, sa_type=BigInteger)
    last_status: int | None = None  # what the receiver answered last; None: nothing
    last_error: str | None = Field(default=None, max_length=500)
