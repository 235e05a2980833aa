"""Brings committed durable jobs to Redis: at once when they are accepted (acceptance.py), else later (loops/stager.py).

Redis first, then the row: a crash between the two only means that the job is sent again under its id, which changes
nothing. What became of a row meanwhile (its client cancelled it, or gave it another class) is done in Redis as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from scheduler.db.durable_ends import End
from scheduler.db.durable_rows import DurableView, Stage
from scheduler.db.outbox_rows import OutboxRows, Route
from scheduler.errors import CapacityError, InternalError, QueueUnavailable, SpillwayError, UnknownModel
from scheduler.job import JobState, Priority
from scheduler.lifecycle import Lifecycle
from scheduler.request import InferenceRequest, decode_request
from scheduler.telemetry import get_logger

AT_ONCE = 32  # calls in flight
UNREADABLE = End(JobState.FAILED, InternalError.code, "The stored request cannot be read; send it again.")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """`sent` jobs are in Redis; those of the `refused` routes stay held. `away`: Redis cannot be reached."""

    sent: frozenset[str]
    refused: dict[Route, SpillwayError]
    away: QueueUnavailable | None = None


class Outbox:
    """One per process."""

    def __init__(self, rows: OutboxRows, lifecycle: Lifecycle) -> None:
        self._rows = rows
        self._lifecycle = lifecycle

    async def send(self, jobs: Sequence[DurableView]) -> Sent:
        """Send held jobs (with their requests) and mark them, in their order as far as one call allows."""
        found = {job.id: _read(job) for job in jobs}
        await self._bury([job_id for job_id, request in found.items() if request is None])
        readable = [(job, request) for job in jobs if (request := found[job.id]) is not None]
        sending = _Sending(self._lifecycle)
        for start in range(0, len(readable), AT_ONCE):
            await asyncio.gather(*(sending.send(job, request) for job, request in readable[start : start + AT_ONCE]))
        await self._mark(sending.sent)
        return Sent(frozenset(sending.sent), sending.refused, sending.away)

    async def _mark(self, sent: Mapping[str, Priority]) -> None:
        """`sent`: the class in which each job went to Redis."""
        if not sent:
            return
        classes = await self._rows.mark_sent(list(sent))
        unmarked = sent.keys() - classes.keys()
        if unmarked:  # another process marked them, or they are over
            standing = await self._rows.standing(unmarked)
            for job_id in [name for name, (stage, _) in standing.items() if stage is Stage.DONE]:
                await self._lifecycle.cancel(job_id)
            classes |= {name: class_ for name, (stage, class_) in standing.items() if stage is not Stage.DONE}
        for job_id in [name for name, class_ in classes.items() if sent[name] is not class_]:
            await self._lifecycle.reprioritise(job_id, classes[job_id])

    async def _bury(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            log.error("stored requests cannot be read; their jobs fail", count=len(job_ids), job=job_ids[0])
            await self._rows.end_held(job_ids, UNREADABLE, _now_ms())


class _Sending:
    """One round: what came through, and which routes do not take more."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.sent: dict[str, Priority] = {}
        self.refused: dict[Route, SpillwayError] = {}
        self.away: QueueUnavailable | None = None
        self._lifecycle = lifecycle

    async def send(self, job: DurableView, request: InferenceRequest) -> None:
        route = (job.model, job.priority)
        if self.away is not None or route in self.refused:
            return
        later = job.not_before_ms is not None and job.not_before_ms > _now_ms()
        try:
            await self._lifecycle.submit(
                request,
                job_id=job.id,
                tenant=job.tenant,
                priority=job.priority,
                deadline_ms=job.deadline_ms,
                not_before_ms=job.not_before_ms if later else None,
                durable=True,
                batch_id="" if job.batch_id is None else job.batch_id,
            )
        except QueueUnavailable as error:
            self.away = error
        except (CapacityError, UnknownModel) as error:
            self.refused[route] = error
        else:
            self.sent[job.id] = job.priority


def _read(job: DurableView) -> InferenceRequest | None:
    if job.request is None:
        return None
    try:
        return decode_request(job.request)
    except msgspec.MsgspecError:
        return None


def _now_ms() -> int:
    return int(time.time() * 1000)
