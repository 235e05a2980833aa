"""One job as its HTTP request sees it: submitted, followed event by event, cancelled when its client goes.

Subscribed before it is queued, so no first token is lost. The token path touches no SQL.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from api.services import Services
from scheduler.errors import InternalError, QueueUnavailable, SpillwayError, from_code
from scheduler.job import Priority, created_ms_of, new_job_id
from scheduler.lifecycle import Submitted
from scheduler.queue.token_bus import Subscription
from scheduler.request import InferenceRequest, Usage
from scheduler.telemetry import get_logger
from scheduler.tokens import Delta, EventId, Failed, Finished, Started, TokenEvent

# A waiting stream looks up this often, to see whether the server's drain time is over.
READ_SLICE_S = 1.0
MAX_FAILED_LOOKS = 4

VisibleEvent = Delta | Finished | Failed

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """A request as it goes to the queue; `deadline_ms` is Unix time."""

    request: InferenceRequest
    tenant: str
    priority: Priority
    deadline_ms: int | None = None
    idempotency_key: str | None = None
    body_digest: str = ""


class JobFeed:
    """The visible events of one job; `ended` after its Finished or Failed was read."""

    def __init__(self, services: Services, subscription: Subscription, submitted: Submitted) -> None:
        self.job_id = submitted.job_id
        self.model = submitted.pool
        self.created_s = created_ms_of(submitted.job_id) // 1000
        self.served_by: str | None = None
        self.ended = False
        self._services = services
        self._subscription = subscription
        self._opened = time.monotonic()
        self._first_token: float | None = None
        self._failed_looks = 0

    async def read(self, silence_s: float) -> list[VisibleEvent]:
        """Ready events in order, or [] after `silence_s` without one. Raises ShuttingDown, or where the job is lost."""
        left = silence_s
        while left > 0:
            self._services.drain.check()
            began = time.monotonic()
            visible = self._visible(await self._subscription.read(min(left, READ_SLICE_S)))
            if visible:
                return visible
            if self._subscription.ended:
                raise InternalError(f"The events of {self.job_id} ended without an outcome.")
            left -= time.monotonic() - began
        await self._look()
        return []

    def _visible(self, events: list[tuple[EventId, TokenEvent]]) -> list[VisibleEvent]:
        visible: list[VisibleEvent] = []
        for _, event in events:
            if isinstance(event, Started):
                self.served_by = event.worker or None
                continue
            if isinstance(event, Delta):
                if self._first_token is None:
                    self._note_first_token()
            else:
                self.ended = True
                if isinstance(event, Finished):
                    self._note_answer(event.usage)
            visible.append(event)
        return visible

    def _note_first_token(self) -> None:
        self._first_token = time.monotonic()
        self._services.metrics.first_token(self.model, self._first_token - self._opened)

    def _note_answer(self, usage: Usage) -> None:
        now = time.monotonic()
        decode_s = 0.0 if self._first_token is None else now - self._first_token
        self._services.metrics.answered(self.model, usage, decode_s)

    async def _look(self) -> None:
        """After a long silence: does the job still exist? A lost job must not leave its client waiting."""
        try:
            view = await self._services.queue.view(self.job_id)
        except QueueUnavailable:
            self._failed_looks += 1
            if self._failed_looks >= MAX_FAILED_LOOKS:
                raise
            return
        self._failed_looks = 0
        if view is None:
            raise InternalError(f"{self.job_id} is no longer in the queue; it was lost. Send the request again.")


@asynccontextmanager
async def open_feed(services: Services, order: Order) -> AsyncIterator[JobFeed]:
    """Queue the order and follow its job; leaving before the job ended cancels it.

    With an Idempotency-Key the job goes on without its client: the key is the promise that the client, or another
    that sends it, can come back for the answer.
    """
    wanted = new_job_id(services.settings.shard)
    with services.metrics.answering():
        async with _following(services, order, wanted) as feed:
            yield feed


@asynccontextmanager
async def _following(services: Services, order: Order, wanted: str) -> AsyncIterator[JobFeed]:
    async with services.bus.subscribe(wanted, is_new=True) as subscription:
        submitted = await _submit(services, order, wanted)
        if submitted.created:
            feed = JobFeed(services, subscription, submitted)
            try:
                yield feed
            finally:
                if not feed.ended and order.idempotency_key is None:
                    await _cancel(services, submitted.job_id)
            return
    async with services.bus.subscribe(submitted.job_id) as subscription:
        yield JobFeed(services, subscription, submitted)


def error_of(event: Failed) -> SpillwayError:
    """The error that ended a job."""
    return from_code(event.code, event.message, event.param)


async def _submit(services: Services, order: Order, job_id: str) -> Submitted:
    return await services.lifecycle.submit(
        order.request,
        job_id=job_id,
        tenant=order.tenant,
        priority=order.priority,
        deadline_ms=order.deadline_ms,
        idempotency_key=order.idempotency_key,
        body_digest=order.body_digest,
    )


async def _cancel(services: Services, job_id: str) -> None:
    try:
        state = await services.lifecycle.cancel(job_id)
    except QueueUnavailable as error:
        log.warning("could not cancel the job of a client that left", job=job_id, error=error.message)
    else:
        log.info("cancelled the job of a client that left", job=job_id, state=None if state is None else state.value)
