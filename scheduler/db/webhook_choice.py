"""Which webhook endpoint an order means: the one of its tenant with this id or URL. Called when a job is accepted."""

from __future__ import annotations

from dataclasses import dataclass

from sqlmodel import col, or_, select

from scheduler.db.models import WebhookEndpoint
from scheduler.db.session import Database


@dataclass(frozen=True, slots=True)
class WebhookChoice:
    endpoint_id: str
    disabled: bool


async def choose_endpoint(database: Database, tenant: str, id_or_url: str) -> WebhookChoice | None:
    """Among several with the URL, an enabled one, the oldest first; None: there is none."""
    matching = select(WebhookEndpoint).where(
        col(WebhookEndpoint.tenant) == tenant,
        or_(col(WebhookEndpoint.id) == id_or_url, col(WebhookEndpoint.url) == id_or_url),
    )
    async with database.session() as session:
        found = list(await session.exec(matching))
    if not found:
        return None
    best = min(found, key=lambda endpoint: (endpoint.disabled_ms is not None, endpoint.created_ms, endpoint.id))
    return WebhookChoice(best.id, disabled=best.disabled_ms is not None)
