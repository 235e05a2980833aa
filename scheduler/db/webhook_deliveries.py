"""Webhook deliveries in SQL: what is due, who tries it, what came of it. The row is the truth, whoever is told to look.

    pending ──begin (attempt+1, leased)──► 2xx: delivered | pending, due later | dead ──retry──► pending

A process that dies in mid-try leaves its lease: the delivery is due again when that is over, under the same event id.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from sqlmodel import and_, col, delete, func, or_, select, update

from scheduler.db.models import WebhookDelivery, WebhookEndpoint
from scheduler.db.session import Database

LEASE_MS = 20_000  # longer than one request may take
MAX_ERROR_CHARS = 500

Status = Literal["pending", "delivered", "dead"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try that this process owns."""

    delivery_id: str
    attempt: int
    event_id: str
    payload: bytes
    endpoint_id: str
    url: str


@dataclass(frozen=True, slots=True)
class DeliveryView:
    """A delivery as its tenant may see it; times are Unix ms. `next_ms`: of its next try, where it is pending."""

    id: str
    endpoint_id: str
    tenant: str
    event_id: str
    type: str
    status: str
    attempts: int
    created_ms: int
    next_ms: int | None
    finished_ms: int | None
    last_status: int | None
    last_error: str | None
    payload: bytes


class DeliveryStore:
    """The deliveries of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def endpoint_of(self, delivery_id: str) -> str | None:
        """The endpoint that a delivery is for; None: the delivery is gone."""
        async with self._database.session() as session:
            found = select(WebhookDelivery.endpoint_id).where(col(WebhookDelivery.id) == delivery_id)
            return (await session.exec(found)).one_or_none()

    async def begin(self, delivery_id: str) -> Attempt | None:
        """Take a due delivery for one try; None: it is not due, in other hands, over, or its endpoint is disabled."""
        now_ms = _now_ms()
        due = (col(WebhookDelivery.id) == delivery_id, *_due(now_ms))
        leased = {"attempts": col(WebhookDelivery.attempts) + 1, "next_ms": now_ms + LEASE_MS}
        async with self._database.session() as session:
            if (await session.exec(update(WebhookDelivery).where(*due, _enabled()).values(leased))).rowcount == 0:
                return None
            row = await session.get_one(WebhookDelivery, delivery_id)
            endpoint = await session.get_one(WebhookEndpoint, row.endpoint_id)
            await session.commit()
        return Attempt(row.id, row.attempts, row.event_id, row.payload, endpoint.id, endpoint.url)

    async def delivered(self, attempt: Attempt, answered: int) -> None:
        await self._settle(attempt, answered, None, status="delivered", finished_ms=_now_ms())

    async def try_later(self, attempt: Attempt, delay_ms: int, answered: int | None, error: str) -> None:
        await self._settle(attempt, answered, error, next_ms=_now_ms() + delay_ms)

    async def give_up(self, attempt: Attempt, answered: int | None, error: str) -> None:
        await self._settle(attempt, answered, error, status="dead", finished_ms=_now_ms())

    async def _settle(self, attempt: Attempt, answered: int | None, error: str | None, **values: Any) -> None:
        """Fenced by the attempt: a process that was too slow changes nothing."""
        values["last_status"] = answered
        values["last_error"] = None if error is None else error.replace("\0", "\ufffd")[:MAX_ERROR_CHARS]
        ours = (
            col(WebhookDelivery.id) == attempt.delivery_id,
            col(WebhookDelivery.attempts) == attempt.attempt,
            col(WebhookDelivery.status) == "pending",
        )
        async with self._database.session() as session:
            await session.exec(update(WebhookDelivery).where(*ours).values(values))
            await session.commit()

    async def due(self, per_endpoint: int, endpoints: int) -> list[str]:
        """Deliveries whose time has come, a few of each endpoint, those that wait longest first."""
        due = _due(_now_ms())
        oldest = func.min(col(WebhookDelivery.next_ms))
        waiting = select(WebhookDelivery.endpoint_id).where(*due, _enabled()).group_by(col(WebhookDelivery.endpoint_id))
        async with self._database.session() as session:
            found: list[str] = []
            for endpoint_id in (await session.exec(waiting.order_by(oldest).limit(endpoints))).all():
                some = select(WebhookDelivery.id).where(col(WebhookDelivery.endpoint_id) == endpoint_id, *due)
                found += await session.exec(some.order_by(col(WebhookDelivery.next_ms)).limit(per_endpoint))
        return found

    async def next_due(self, endpoint_id: str) -> str | None:
        """The delivery of this endpoint that waits longest."""
        due = (col(WebhookDelivery.endpoint_id) == endpoint_id, *_due(_now_ms()), _enabled())
        oldest = select(WebhookDelivery.id).where(*due).order_by(col(WebhookDelivery.next_ms)).limit(1)
        async with self._database.session() as session:
            return (await session.exec(oldest)).first()

    async def get(self, delivery_id: str) -> DeliveryView | None:
        async with self._database.session() as session:
            row = await session.get(WebhookDelivery, delivery_id)
        return None if row is None else _view(row)

    async def list(
        self, endpoint_id: str, *, status: Status | None = None, after: str | None = None, limit: int = 20
    ) -> list[DeliveryView]:
        """The newest first, behind the delivery `after`."""
        made, key = col(WebhookDelivery.created_ms), col(WebhookDelivery.id)
        newest = select(WebhookDelivery).where(col(WebhookDelivery.endpoint_id) == endpoint_id)
        if status is not None:
            newest = newest.where(col(WebhookDelivery.status) == status)
        async with self._database.session() as session:
            last = None if after is None else await session.get(WebhookDelivery, after)
            if last is not None:
                newest = newest.where(or_(made < last.created_ms, and_(made == last.created_ms, key > last.id)))
            rows = await session.exec(newest.order_by(made.desc(), key).limit(limit))
            return [_view(row) for row in rows]

    async def revive(self, delivery_id: str) -> bool:
        """Try a dead delivery anew, with all its tries; False: it is not dead."""
        dead = (col(WebhookDelivery.id) == delivery_id, col(WebhookDelivery.status) == "dead")
        anew = {"status": "pending", "attempts": 0, "next_ms": _now_ms(), "finished_ms": None}
        async with self._database.session() as session:
            revived = await session.exec(update(WebhookDelivery).where(*dead).values(anew))
            await session.commit()
        return revived.rowcount == 1

    async def prune(self, before_ms: int, limit: int = 1000) -> int:
        """Delete up to `limit` deliveries older than that, pending ones of disabled endpoints too; how many."""
        old = select(WebhookDelivery.id).where(col(WebhookDelivery.created_ms) < before_ms).limit(limit)
        async with self._database.session() as session:
            removed = await session.exec(delete(WebhookDelivery).where(col(WebhookDelivery.id).in_(old)))
            await session.commit()
        return removed.rowcount


def _due(now_ms: int) -> tuple[Any, Any]:
    return col(WebhookDelivery.status) == "pending", col(WebhookDelivery.next_ms) <= now_ms


def _enabled() -> Any:
    enabled = select(WebhookEndpoint.id).where(col(WebhookEndpoint.disabled_ms).is_(None))
    return col(WebhookDelivery.endpoint_id).in_(enabled)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _view(row: WebhookDelivery) -> DeliveryView:
    pending = row.status == "pending"
    return DeliveryView(
        id=row.id,
        endpoint_id=row.endpoint_id,
        tenant=row.tenant,
        event_id=row.event_id,
        type=row.type,
        status=row.status,
        attempts=row.attempts,
        created_ms=row.created_ms,
        next_ms=row.next_ms if pending else None,
        finished_ms=row.finished_ms,
        last_status=row.last_status,
        last_error=row.last_error,
        payload=row.payload,
    )
