"""What a reader of a job's events may still expect: asked when a stream opens and when it is silent.

A job that ended while Redis did not have it has no log; its end is told from SQL, so that no stream just stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from api.errors import EventsExpired
from api.job_lookup import KnownJob, look_up
from api.services import Services
from scheduler.errors import InternalError, QueueUnavailable
from scheduler.job import JobState
from scheduler.tokens import SEQ_TERMINAL, EventId, Failed


@dataclass(frozen=True, slots=True)
class Ending:
    """A terminal event that is in no log."""

    at: EventId
    event: Failed


@dataclass(frozen=True, slots=True)
class Outlook:
    """`in_redis`: what follows is heard at once. `over`: nothing follows but `ending`, where it can be told."""

    in_redis: bool = True
    over: bool = False
    ending: Ending | None = None


def opening(job: KnownJob, after: EventId | None) -> Ending | None:
    """The end of a job that has no log, having never run. Raises EventsExpired where events are missing, and
    QueueUnavailable where Redis, which keeps them, is away.
    """
    if after is not None and _is_anew(job, after):
        raise EventsExpired(f"The event {after} of {job.id} is no longer kept, the job ran anew; read from the start.")
    if job.in_redis or not job.state.is_terminal:
        return None
    if job.view.attempt > 0 or job.state is JobState.SUCCEEDED:
        if job.is_redis_away:
            raise QueueUnavailable(f"Redis does not answer, which keeps the events of {job.id}; try again.")
        raise EventsExpired(f"The events of {job.id} are no longer kept; its record is at /v1/jobs/{job.id}.")
    return _ending(job)


def restart_after(job: KnownJob, end: EventId) -> EventId | None:
    """Where the events of a job begin that was tried again since this end of it."""
    if not job.in_redis or job.view.attempt < end.attempt:
        return None  # Redis does not know of that end: attempts count from the first again
    return EventId(end.attempt, SEQ_TERMINAL + 1)


async def outlook(services: Services, job_id: str, last: EventId | None) -> Outlook:
    """What may come behind the event `last`. Over without an ending: a reader that comes back is told 410."""
    try:
        job = await look_up(services, job_id)
        if job is None:
            return Outlook(over=True, ending=_lost(job_id, last))
        if job.is_redis_away and job.view.attempt > 0:
            return Outlook()
        if last is not None and not job.state.is_terminal:
            return Outlook(job.in_redis, over=_is_anew(job, last))
        if not job.state.is_terminal or (job.in_redis and await services.queue.read_events(job_id, last, 1)):
            return Outlook(job.in_redis)
    except QueueUnavailable:
        return Outlook()
    return Outlook(over=True, ending=None if job.state is JobState.SUCCEEDED else _ending(job))


def _is_anew(job: KnownJob, seen: EventId) -> bool:
    """Whether the attempt of an event that was seen is unknown: Redis lost it, and the job began again."""
    return job.in_redis and not seen.is_terminal and 0 < job.view.attempt < seen.attempt


def _ending(job: KnownJob) -> Ending:
    view = job.view
    code = InternalError.code if view.error_code is None else view.error_code
    message = "The job failed." if view.error_message is None else view.error_message
    param = None if job.durable is None else job.durable.error_param
    return Ending(EventId(view.attempt, SEQ_TERMINAL), Failed(code=code, message=message, param=param))


def _lost(job_id: str, last: EventId | None) -> Ending:
    attempt = 0 if last is None else last.attempt
    message = f"{job_id} is no longer in the queue; it was lost. Send the request again."
    return Ending(EventId(attempt, SEQ_TERMINAL), Failed(code=InternalError.code, message=message))
