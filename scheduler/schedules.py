"""Makes jobs of schedules: one per turn, the recurrence loop's, and one out of turn, when its owner says so.

Turns that were missed while no scheduler ran are made up for by one job, not by many. Turns do not wait for the job of
the turn before. The id of a turn's job follows from schedule and turn: two schedulers make one job.
"""

from __future__ import annotations

import hashlib
import secrets

from scheduler import routing
from scheduler.db.durable import NewDurable
from scheduler.db.schedules import ScheduleStore, ScheduleView
from scheduler.dialect import Dialect
from scheduler.errors import ClientError, NoModelYet, QueueUnavailable
from scheduler.job import shard_of
from scheduler.queue.fleet import Fleet
from scheduler.request import encode_request
from scheduler.telemetry import get_logger
from scheduler.timetable import BadTimetable, next_turn_ms

log = get_logger(__name__)


def job_of(schedule: ScheduleView, dialect: Dialect, job_id: str, now_ms: int) -> NewDurable:
    """The schedule's body as a job, with a seed of its own. Raises ClientError where the body is bad by now."""
    spec = schedule.spec
    request = dialect.parse(spec.endpoint, spec.body, secrets.randbits(63)).request
    after_ms = spec.deadline_after_ms
    return NewDurable(
        id=job_id,
        tenant=schedule.tenant,
        endpoint=spec.endpoint,
        model=request.model,
        priority=spec.priority,
        request=encode_request(request),
        created_ms=now_ms,
        details=spec.details,
        deadline_ms=None if after_ms is None else now_ms + after_ms,
        webhook_id=spec.webhook_id,
        schedule_id=schedule.id,
    )


def turn_job_id(shard: str, schedule_id: str, turn_ms: int) -> str:
    """A job id that only this turn has."""
    digest = hashlib.sha256(f"{schedule_id}\0{turn_ms}".encode()).hexdigest()[:20]
    job_id = f"job-{shard}-{turn_ms:011x}{digest}"
    assert shard_of(job_id) == shard
    return job_id


class Turns:
    """Takes due turns. One per scheduler process."""

    def __init__(self, store: ScheduleStore, fleet: Fleet, dialect: Dialect, shard: str) -> None:
        self._store = store
        self._fleet = fleet
        self._dialect = dialect
        self._shard = shard

    async def take(self, schedule: ScheduleView, now_ms: int) -> bool:
        """Take one due turn; False: another scheduler was first. A turn that fails is told, and the next one comes."""
        assert schedule.next_ms is not None
        job: NewDurable | None = None
        error, next_ms = "", None
        try:
            next_ms = next_turn_ms(schedule.spec.cron, schedule.spec.timezone, now_ms)
            job_id = turn_job_id(self._shard, schedule.id, schedule.next_ms)
            job = job_of(schedule, self._dialect, job_id, now_ms)
            await self._check_model(job.model)
        except (ClientError, BadTimetable) as failure:
            job, error = None, str(failure)
            log.warning("a turn of a schedule failed", schedule=schedule.id, error=error)
        except Exception as failure:  # whatever it is, this schedule must not hold up the others
            job, error = None, f"The server failed on it ({type(failure).__name__}); its log says more."
            log.exception("a turn of a schedule failed", schedule=schedule.id)
        return await self._store.take_turn(schedule, next_ms, job, error)

    async def fail(self, schedule: ScheduleView, now_ms: int, error: str) -> bool:
        """Leave out one due turn whose job cannot be stored, and say why; False: another scheduler was first."""
        next_ms = next_turn_ms(schedule.spec.cron, schedule.spec.timezone, now_ms)
        return await self._store.take_turn(schedule, next_ms, None, error)

    async def _check_model(self, model: str) -> None:
        try:
            routing.plan(model, await self._fleet.models())
        except (NoModelYet, QueueUnavailable):
            return  # the job waits until somebody serves it
