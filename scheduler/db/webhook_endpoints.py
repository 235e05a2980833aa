"""Webhook endpoints in SQL: where a tenant wants to be told. The API makes and changes them; secrets lie sealed.

enabled ──410 Gone, or its owner──► disabled (gets no new events, its pending ones wait) ──owner──► enabled
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import col, delete, func, select, update

from scheduler.db.models import WebhookDelivery, WebhookEndpoint
from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.errors import WebhookConflict

SECRET_PREFIX = "whsec_"  # noqa: S105 - how every secret begins, not one
SECRET_BYTES = 32
OLD_SECRET_MS = 24 * 3600 * 1000  # so long the secret before a rotation signs along
MAX_ENDPOINTS = 16  # of one tenant: an event is stored and sent once for each


@dataclass(frozen=True, slots=True)
class EndpointView:
    """An endpoint as anybody may see it; times are Unix ms. `events` empty: all types."""

    id: str
    tenant: str
    name: str
    url: str
    events: tuple[str, ...]
    created_ms: int
    disabled_ms: int | None = None
    disabled_reason: str | None = None
    old_secret_until_ms: int | None = None


class WebhookEndpoints:
    """The endpoints of one database."""

    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault

    async def create(self, tenant: str, url: str, name: str, events: Sequence[str]) -> tuple[EndpointView, str]:
        """A new endpoint and its secret, which is not shown again. Raises WebhookConflict beyond MAX_ENDPOINTS."""
        secret = _new_secret()
        row = WebhookEndpoint(
            id=f"whe_{secrets.token_hex(12)}",
            tenant=tenant,
            name=name,
            url=url,
            events=json.dumps(sorted(set(events))),
            secret=self._vault.seal(secret.encode()),
            created_ms=_now_ms(),
        )
        async with self._database.session() as session:
            counted = select(func.count()).where(col(WebhookEndpoint.tenant) == tenant)
            if (await session.exec(counted)).one() >= MAX_ENDPOINTS:
                raise WebhookConflict(f"There are {MAX_ENDPOINTS} webhook endpoints already; delete one first.")
            session.add(row)
            await session.commit()
        return _view(row), secret

    async def get(self, endpoint_id: str) -> EndpointView | None:
        async with self._database.session() as session:
            row = await session.get(WebhookEndpoint, endpoint_id)
        return None if row is None else _view(row)

    async def list(self, tenant: str | None) -> list[EndpointView]:
        """Of one tenant, or all; the newest first."""
        newest = select(WebhookEndpoint).order_by(col(WebhookEndpoint.created_ms).desc(), col(WebhookEndpoint.id))
        if tenant is not None:
            newest = newest.where(col(WebhookEndpoint.tenant) == tenant)
        async with self._database.session() as session:
            return [_view(row) for row in await session.exec(newest)]

    async def update(
        self,
        endpoint_id: str,
        *,
        url: str | None = None,
        name: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> EndpointView | None:
        """Change what is given; None: there is no such endpoint."""
        values: dict[str, Any] = {"url": url, "name": name}
        values["events"] = None if events is None else json.dumps(sorted(set(events)))
        changes = {field: value for field, value in values.items() if value is not None}
        if enabled is not None:
            changes |= {"disabled_ms": None, "disabled_reason": None} if enabled else _disabled("by its owner")
        async with self._database.session() as session:
            if changes:
                await session.exec(
                    update(WebhookEndpoint).where(col(WebhookEndpoint.id) == endpoint_id).values(changes)
                )
                await session.commit()
        return await self.get(endpoint_id)

    async def disable(self, endpoint_id: str, reason: str) -> None:
        """No more events for it, until its owner enables it. A first reason stays."""
        enabled = (col(WebhookEndpoint.id) == endpoint_id, col(WebhookEndpoint.disabled_ms).is_(None))
        async with self._database.session() as session:
            await session.exec(update(WebhookEndpoint).where(*enabled).values(_disabled(reason)))
            await session.commit()

    async def delete(self, endpoint_id: str) -> bool:
        """Remove an endpoint with its deliveries; False: there is none."""
        async with self._database.session() as session:
            await session.exec(delete(WebhookDelivery).where(col(WebhookDelivery.endpoint_id) == endpoint_id))
            removed = await session.exec(delete(WebhookEndpoint).where(col(WebhookEndpoint.id) == endpoint_id))
            await session.commit()
        return removed.rowcount == 1

    async def rotate(self, endpoint_id: str, *, keep_old: bool = True) -> tuple[EndpointView, str] | None:
        """A new secret; the one before signs along for a day where it is kept, so that receivers can change over."""
        secret = _new_secret()
        async with self._database.session() as session:
            row = await session.get(WebhookEndpoint, endpoint_id)
            if row is None:
                return None
            row.old_secret = row.secret if keep_old else None
            row.old_secret_until_ms = _now_ms() + OLD_SECRET_MS if keep_old else None
            row.secret = self._vault.seal(secret.encode())
            session.add(row)
            await session.commit()
        return _view(row), secret

    async def add_test(self, endpoint: EndpointView, event_type: str) -> str:
        """Write a sample event for an enabled endpoint; the delivery's id. Raises WebhookConflict."""
        now_ms = _now_ms()
        event = WebhookEvent(
            type=event_type,
            tenant=endpoint.tenant,
            subject=endpoint.id,
            created_ms=now_ms,
            turn=now_ms,
            webhook_id=endpoint.id,
            data={"test": True},
            is_test=True,
        )
        async with self._database.session() as session:
            added = await add_events(session, [event])
            await session.commit()
        if not added:
            raise WebhookConflict(f"The webhook endpoint {endpoint.id} is disabled; enable it first.")
        return added[0]

    async def signing_secrets(self, endpoint_id: str) -> list[bytes]:
        """The secrets that sign now, the newest first. Raises VaultLocked."""
        async with self._database.session() as session:
            row = await session.get_one(WebhookEndpoint, endpoint_id)
        sealed = [row.secret]
        until_ms = row.old_secret_until_ms
        if row.old_secret is not None and until_ms is not None and _now_ms() < until_ms:
            sealed.append(row.old_secret)
        return [_secret_bytes(self._vault.open(secret).decode()) for secret in sealed]


def _new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def _secret_bytes(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX))


def _disabled(reason: str) -> dict[str, Any]:
    return {"disabled_ms": _now_ms(), "disabled_reason": reason}


def _now_ms() -> int:
    return int(time.time() * 1000)


def _view(row: WebhookEndpoint) -> EndpointView:
    return EndpointView(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        url=row.url,
        events=tuple(json.loads(row.events)),
        created_ms=row.created_ms,
        disabled_ms=row.disabled_ms,
        disabled_reason=row.disabled_reason,
        old_secret_until_ms=row.old_secret_until_ms,
    )
