"""Batches in SQL. Routes create, read and cancel them; scheduler/batches moves them on.

A move is one guarded UPDATE: of two that race exactly one wins, and none undoes a cancel. What a move entails (lines,
result files, events) is written in its transaction by the caller's `also`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import func, update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.batch import MOVES, BatchRecord, BatchStatus, LineCounts, LineError, NewBatch, new_batch_id
from scheduler.db.durable_rows import Stage, idempotency_of
from scheduler.db.jobs import insert_for
from scheduler.db.models import Batch, DurableJob
from scheduler.db.session import Database
from scheduler.errors import IdempotencyMismatch, TooManyBatches
from scheduler.request import Usage

OPEN = [status.value for status in BatchStatus if not status.is_terminal]
FREE_AGAIN_S = 300.0  # a guess at when a batch ends: longer than any client would sleep
WITHOUT_SUCCESS = [BatchStatus.FAILED.value, BatchStatus.EXPIRED.value, BatchStatus.CANCELLED.value]

Also = Callable[[AsyncSession], Awaitable[None]]


class BatchStore:
    """The batches of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, new: NewBatch, now_ms: int, most_open: int | None = None) -> BatchRecord:
        """Accept a batch, whose file is read later; or the earlier one that answers its Idempotency-Key.

        Raises IdempotencyMismatch where the key was used with another body, TooManyBatches where its tenant has
        `most_open` already that are not at their end.
        """
        row, found = _row(new, now_ms), None
        async with self._database.session() as session:
            await _in_turn(session, new.tenant)
            while found is None:  # once more where the batch with this key lets go of it in between
                found = await _insert(session, row)
            if most_open is not None and found is row:
                await _check_room(session, new.tenant, most_open)
            await session.commit()
        return _record(found)

    async def answering(self, tenant: str, key: str, body_digest: str) -> BatchRecord | None:
        """The batch that answers this Idempotency-Key already. Raises IdempotencyMismatch."""
        hashed = idempotency_of(tenant, key)
        assert hashed is not None
        async with self._database.session() as session:
            row = await _of_key(session, hashed, body_digest)
        return None if row is None or row.status in WITHOUT_SUCCESS else _record(row)

    async def get(self, batch_id: str) -> BatchRecord | None:
        async with self._database.session() as session:
            row = await session.get(Batch, batch_id)
        return None if row is None else _record(row)

    async def list(self, tenant: str | None, after: str | None, limit: int) -> list[BatchRecord]:
        """A page of one tenant's batches (None: of all), newest first; `after` is a batch's id."""
        page = select(Batch).order_by(col(Batch.id).desc()).limit(limit)
        if tenant is not None:
            page = page.where(Batch.tenant == tenant)
        if after is not None:
            page = page.where(col(Batch.id) < after)
        async with self._database.session() as session:
            return [_record(row) for row in await session.exec(page)]

    async def open_ids(self, limit: int) -> Sequence[str]:
        """Batches that are not at their end, oldest first."""
        oldest = select(Batch.id).where(col(Batch.status).in_(OPEN)).order_by(col(Batch.id)).limit(limit)
        async with self._database.session() as session:
            return (await session.exec(oldest)).all()

    async def has_unfinished(self, batch_id: str) -> bool:
        """Whether a line of it is not over."""
        unfinished = col(DurableJob.stage).in_([Stage.HELD.value, Stage.SENT.value])
        some = select(DurableJob.id).where(DurableJob.batch_id == batch_id, unfinished).limit(1)
        async with self._database.session() as session:
            return (await session.exec(some)).first() is not None

    async def move(
        self, batch: BatchRecord, to: BatchStatus, now_ms: int, also: Also | None = None, **values: Any
    ) -> bool:
        """From the state that `batch` shows; False: it is not in that state any more, and nothing was written."""
        if to not in MOVES[batch.status]:
            raise ValueError(f"a batch does not move from {batch.status} to {to}")
        return await self._write(batch, also, status=to.value, **{f"{to.value}_ms": now_ms}, **values)

    async def note(self, batch: BatchRecord, also: Also | None = None, **values: Any) -> bool:
        """Write `values` to a batch that stays in the state that `batch` shows; False: it is not in it any more."""
        return await self._write(batch, also, **values)

    async def _write(self, batch: BatchRecord, also: Also | None, **values: Any) -> bool:
        guarded = update(Batch).where(col(Batch.id) == batch.id, col(Batch.status) == batch.status.value)
        async with self._database.session() as session:
            result = await session.exec(guarded.values(**values))
            if result.rowcount != 1:
                return False
            if also is not None:
                await also(session)
            await session.commit()
        return True


def encode_errors(errors: Sequence[LineError]) -> str:
    """As the column `errors` keeps them."""
    return msgspec.json.encode(errors).decode()


def _row(new: NewBatch, now_ms: int) -> Batch:
    return Batch(
        id=new_batch_id(now_ms),
        tenant=new.tenant,
        endpoint=new.endpoint,
        status=BatchStatus.VALIDATING.value,
        input_file_id=new.input_file_id,
        completion_window=new.completion_window,
        output_expires_after_s=new.output_expires_after_s,
        details=msgspec.json.encode(new.metadata).decode(),
        webhook_id=new.webhook_id,
        idempotency=idempotency_of(new.tenant, new.idempotency_key),
        body_digest=new.body_digest,
        created_ms=now_ms,
        expires_ms=new.expires_ms,
    )


async def _in_turn(session: AsyncSession, tenant: str) -> None:
    """One new batch of a tenant after the other, so that their count is exact; SQLite has one writer anyway."""
    if session.get_bind().dialect.name == "postgresql":
        await session.exec(select(func.pg_advisory_xact_lock(func.hashtextextended(f"spillway batches {tenant}", 0))))


async def _check_room(session: AsyncSession, tenant: str, most_open: int) -> None:
    count = select(func.count()).where(col(Batch.tenant) == tenant, col(Batch.status).in_(OPEN))
    if (await session.exec(count)).one() > most_open:
        raise TooManyBatches(
            f"{most_open} batches of yours are open already (SPILLWAY_OPEN_BATCHES_CAP); wait for one to end, or "
            "cancel one",
            retry_after_s=FREE_AGAIN_S,
        )


async def _insert(session: AsyncSession, row: Batch) -> Batch | None:
    """The row, or the one that has its key."""
    if row.idempotency is not None:
        await _free_key(session, row.idempotency, row.body_digest)
    insert = insert_for(session)(Batch).on_conflict_do_nothing(index_elements=["idempotency"])
    if (await (await session.connection()).execute(insert, [row.model_dump()])).rowcount == 1:
        return row
    assert row.idempotency is not None, "an id is random, and nothing else is unique"
    return await _of_key(session, row.idempotency, row.body_digest)


async def _of_key(session: AsyncSession, key: str, body_digest: str) -> Batch | None:
    row = (await session.exec(select(Batch).where(Batch.idempotency == key))).first()
    if row is not None and row.body_digest != body_digest:
        raise IdempotencyMismatch(f"This Idempotency-Key was used with another body ({row.id}); use a new key")
    return row


async def _free_key(session: AsyncSession, key: str, body_digest: str) -> None:
    """The key of a batch that ended without success is free for the same body: it may be tried anew."""
    same = (col(Batch.idempotency) == key, col(Batch.body_digest) == body_digest)
    free = update(Batch).where(*same, col(Batch.status).in_(WITHOUT_SUCCESS)).values(idempotency=None)
    await session.exec(free.execution_options(synchronize_session=False))


def _record(row: Batch) -> BatchRecord:
    errors = () if row.errors is None else msgspec.json.decode(row.errors, type=tuple[LineError, ...])
    return BatchRecord(
        id=row.id,
        tenant=row.tenant,
        endpoint=row.endpoint,
        status=BatchStatus(row.status),
        input_file_id=row.input_file_id,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        completion_window=row.completion_window,
        output_expires_after_s=row.output_expires_after_s,
        model=row.model,
        metadata=msgspec.json.decode(row.details, type=dict[str, str]),
        errors=errors,
        webhook_id=row.webhook_id,
        counts=LineCounts(row.total, row.completed, row.failed),
        usage=Usage(
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.completion_tokens,
            cached_tokens=row.cached_tokens,
        ),
        created_ms=row.created_ms,
        expires_ms=row.expires_ms,
        in_progress_ms=row.in_progress_ms,
        finalizing_ms=row.finalizing_ms,
        completed_ms=row.completed_ms,
        failed_ms=row.failed_ms,
        expired_ms=row.expired_ms,
        cancelling_ms=row.cancelling_ms,
        cancelled_ms=row.cancelled_ms,
    )
