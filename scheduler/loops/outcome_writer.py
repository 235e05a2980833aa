"""Ends of durable jobs, from Redis to SQL: log → answer's body → row. Called by the recorder and the reconciler.

Nothing is taken from Redis here, so it may be repeated at any point: the row decides whether an end is news.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduler.db.durable_outcomes import Asked, DurableEnd, DurableOutcomes, is_news
from scheduler.dialect import Answer, Dialect
from scheduler.errors import InternalError
from scheduler.job import JobState, JobView
from scheduler.queue.outcome_reader import JobLog, OutcomeReader, Standing
from scheduler.request import Usage, decode_request
from scheduler.telemetry import get_logger
from scheduler.webhooks import DELIVER, Kick

log = get_logger(__name__)

JOBS_AT_ONCE = 64  # their logs and answers are in memory together
KICKS = 4  # per commit: whoever delivers one goes on with what its endpoint waits for


class OutcomeWriter:
    """One per scheduler process."""

    def __init__(
        self, reader: OutcomeReader, outcomes: DurableOutcomes, dialect: Dialect, kick: Kick | None = None
    ) -> None:
        """`kick`: has webhooks delivered at once; without it the control plane's sweep finds them."""
        self._reader = reader
        self._outcomes = outcomes
        self._dialect = dialect
        self._kick = kick

    async def write(self, jobs: Sequence[JobView]) -> None:
        """Commit these ends. Raises QueueUnavailable and SQL's errors; what was written by then stays written."""
        newest = list({job.id: job for job in sorted(jobs, key=lambda job: job.attempt)}.values())
        for start in range(0, len(newest), JOBS_AT_ONCE):
            await self._write(newest[start : start + JOBS_AT_ONCE])

    async def give_up(self, job: JobView) -> None:
        """SQL refuses this job's answer: what it was is lost, that it ended is not."""
        await self._commit([_failed(job, "The answer could not be stored; send the request again.")])

    async def _write(self, jobs: Sequence[JobView]) -> None:
        rows = await self._outcomes.asked([job.id for job in jobs])
        unknown = [job for job in jobs if job.id not in rows]
        if unknown:
            log.warning("durable jobs ended that SQL does not know", count=len(unknown), job=unknown[0].id)
            await self._outcomes.write_without_rows(unknown)
        news = [job for job in jobs if job.id in rows and is_news(rows[job.id].standing, job)]
        if not news:
            return
        ids = [job.id for job in news]
        logs = await self._reader.logs(ids)
        standing = await self._reader.standing(ids)  # after the logs: where both are gone, Redis lost them
        ends = await asyncio.to_thread(self._ends, news, rows, logs, standing)
        await self._commit(ends)

    async def _commit(self, ends: Sequence[DurableEnd]) -> None:
        written = await self._outcomes.write(ends)
        if self._kick is not None and written.deliveries:
            kicked = written.deliveries[:KICKS]
            await asyncio.gather(*(self._kick(DELIVER, delivery_id) for delivery_id in kicked))

    def _ends(
        self,
        jobs: Sequence[JobView],
        rows: Mapping[str, Asked],
        logs: Mapping[str, JobLog],
        standing: Mapping[str, Standing],
    ) -> list[DurableEnd]:
        ends = (self._end(job, rows[job.id], logs[job.id], standing.get(job.id)) for job in jobs)
        return [end for end in ends if end is not None]

    def _end(self, job: JobView, row: Asked, said: JobLog, now: Standing | None) -> DurableEnd | None:
        """None: this end does not count any more, or nobody knows what it was; the reconciler sees to that."""
        if now is not None and now.finished_ms != job.finished_ms:
            return None  # it was replayed since
        job = replace(job, created_ms=row.created_ms)
        if job.state is not JobState.SUCCEEDED:
            return DurableEnd(job, error_param=None if said.failed is None else said.failed.param)
        if said.whole:
            return self._answered(job, row, said)
        if now is None:
            log.warning("Redis lost a job before it was recorded; it will run again", job=job.id)
            return None
        log.error("the log of a finished job is gone; its answer is lost", job=job.id)
        return _failed(job, "The answer was lost before it could be stored; send the request again.")

    def _answered(self, job: JobView, row: Asked, said: JobLog) -> DurableEnd:
        try:
            return DurableEnd(job, answer=self._render(job, row, said))
        except Exception:  # whatever it is, this job must not hold up the others, nor be lost
            log.exception("an answer cannot be rendered; its job is recorded as failed", job=job.id)
            return _failed(job, "The answer could not be rendered; send the request again.")

    def _render(self, job: JobView, row: Asked, said: JobLog) -> bytes:
        usage = Usage() if job.usage is None else job.usage
        answer = Answer(job.id, job.pool, job.priority, said.choices(), usage)
        return self._dialect.render(row.endpoint, decode_request(row.request), answer)


def _failed(job: JobView, message: str) -> DurableEnd:
    failed = replace(job, state=JobState.FAILED, error_code=InternalError.code, error_message=message)
    return DurableEnd(failed)
