"""Webhook endpoints and events in SQL. Writers of an outcome call `add_events` in their own transaction.

An endpoint gets the events of its tenant whose type it lists (none listed: all). An event of a job or batch that names
an endpoint goes to that one alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.jobs import insert_for
from scheduler.db.models import WebhookDelivery, WebhookEndpoint

ROWS_PER_STATEMENT = 500


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """Something became true of `subject` (a job's or batch's id). `turn` tells two ends of one job apart: its attempt.

    `webhook_id`: the one endpoint it is for, None for all that want its type. `data`: what receivers get beside the id.
    """

    type: str
    tenant: str
    subject: str
    created_ms: int
    turn: int = 0
    webhook_id: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_test: bool = False  # sent on demand, whatever types the endpoint lists

    @property
    def id(self) -> str:
        """The same whenever the same event is written again: receivers tell doubles by it."""
        return f"evt_{_digest(self.type, self.subject, str(self.turn))}"

    def payload(self) -> bytes:
        """The body that receivers get."""
        data = {"id": self.subject, **self.data}
        body = {"id": self.id, "object": "event", "created_at": self.created_ms // 1000, "type": self.type}
        return msgspec.json.encode(body | {"data": data})


async def add_events(session: AsyncSession, events: Sequence[WebhookEvent]) -> list[str]:
    """Write the deliveries of these events, in the caller's transaction; their ids, for `deliver_webhook` kicks.

    Writing an event again adds nothing.
    """
    if not events:
        return []
    endpoints = await _enabled(session, {event.tenant for event in events})
    rows = [_delivery(event, endpoint) for event in events for endpoint in endpoints if _wants(endpoint, event)]
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        some = rows[start : start + ROWS_PER_STATEMENT]
        await session.exec(insert_for(session)(WebhookDelivery).values(some).on_conflict_do_nothing())
    return [row["id"] for row in rows]


async def _enabled(session: AsyncSession, tenants: set[str]) -> list[WebhookEndpoint]:
    wanted = select(WebhookEndpoint).where(
        col(WebhookEndpoint.tenant).in_(tenants), col(WebhookEndpoint.disabled_ms).is_(None)
    )
    return list(await session.exec(wanted))


def _wants(endpoint: WebhookEndpoint, event: WebhookEvent) -> bool:
    if endpoint.tenant != event.tenant or event.webhook_id not in (None, endpoint.id):
        return False
    types = json.loads(endpoint.events)
    return not types or event.type in types or event.is_test


def _delivery(event: WebhookEvent, endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": f"whd_{_digest(endpoint.id, event.id)}",
        "endpoint_id": endpoint.id,
        "tenant": event.tenant,
        "event_id": event.id,
        "type": event.type,
        "payload": event.payload(),
        "status": "pending",
        "attempts": 0,
        "created_ms": event.created_ms,
        "next_ms": event.created_ms,
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
