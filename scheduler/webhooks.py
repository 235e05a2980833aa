"""Sends webhooks as the Standard Webhooks specification has it, at least once, with the same event id on each try.

The control plane calls `deliver` for a delivery that somebody kicked and `sweep` for those that nobody did. A receiver
that is slow gets one connection, any other a few, so that it holds up no other.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.metadata import version
from typing import Protocol

import httpx2
from sqlalchemy.exc import NoResultFound

from scheduler.db.webhook_deliveries import Attempt, DeliveryStore
from scheduler.db.webhook_endpoints import WebhookEndpoints
from scheduler.errors import VaultLocked
from scheduler.outbound import OutboundLimits, outbound_client
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

DELIVER = "deliver_webhook"  # the function that kicks name
LIMITS = OutboundLimits(connect_s=5.0, read_s=10.0, total_s=15.0, body_bytes=1 << 16)
BACKOFF_S = (5, 30, 120, 600, 1800, 7200, 18_000, 36_000)
MAX_RETRY_AFTER_S = 24 * 3600
AT_ONCE = 4  # connections of this process to one endpoint
AT_ONCE_ALL = 48  # below the control plane's 64 jobs: it has other work
SLOW_S = 3.0  # an endpoint whose last try took longer gets one connection
STINT_S = 30.0  # how long one job goes on with an endpoint's deliveries; below the control plane's time limit
SWEEP_ENDPOINTS = 200
SLOT_S = 10.0
BUSY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})

log = get_logger(__name__)


class Kick(Protocol):
    async def __call__(self, name: str, *args: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one try; `status` None: no answer, and `error` says why."""

    status: int | None
    error: str = ""
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class WebhookSender:
    """One per scheduler process; close it."""

    def __init__(
        self,
        deliveries: DeliveryStore,
        endpoints: WebhookEndpoints,
        kick: Kick,
        settings: Settings,
        backoff_s: Sequence[float] = BACKOFF_S,
    ) -> None:
        self._deliveries = deliveries
        self._endpoints = endpoints
        self._kick = kick
        self._backoff_s = backoff_s
        self._client = outbound_client(settings, LIMITS)
        self._rng = random.Random()
        self._busy: Counter[str] = Counter()
        self._slow: set[str] = set()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def deliver(self, delivery_id: str, _slot: str = "") -> None:
        """Try this delivery, then whatever else its endpoint waits for; nothing where the endpoint is busy enough."""
        endpoint_id = await self._deliveries.endpoint_of(delivery_id)
        if endpoint_id is None or not self._has_room(endpoint_id):
            return
        self._busy[endpoint_id] += 1
        try:
            await self._work_off(endpoint_id, delivery_id)
        finally:
            self._busy[endpoint_id] -= 1
            self._busy += Counter()  # drops endpoints at 0

    async def sweep(self) -> None:
        """Kick what is due: lost kicks, retries, what a process left that died.

        The slot makes it another job: one that died with its process keeps its name in arq for 70 s.
        """
        slot = str(int(time.time() / SLOT_S))
        for delivery_id in await self._deliveries.due(AT_ONCE, SWEEP_ENDPOINTS):
            await self._kick(DELIVER, delivery_id, slot)

    def _has_room(self, endpoint_id: str) -> bool:
        most = 1 if endpoint_id in self._slow else AT_ONCE
        return self._busy[endpoint_id] < most and self._busy.total() < AT_ONCE_ALL

    async def _work_off(self, endpoint_id: str, first_id: str) -> None:
        ends_s = time.monotonic() + STINT_S
        delivery_id: str | None = first_id
        while delivery_id is not None and time.monotonic() < ends_s:
            attempt = await self._deliveries.begin(delivery_id)
            if attempt is not None:
                await self._try(attempt)
            if endpoint_id in self._slow and self._busy[endpoint_id] > 1:
                return
            delivery_id = await self._deliveries.next_due(endpoint_id)

    async def _try(self, attempt: Attempt) -> None:
        started_s = time.monotonic()
        reply = await self._send(attempt)
        took_s = time.monotonic() - started_s
        (self._slow.add if took_s > SLOW_S else self._slow.discard)(attempt.endpoint_id)
        if reply.status is not None and reply.is_success:
            return await self._deliveries.delivered(attempt, reply.status)
        error = reply.error or f"the receiver answered {reply.status}"
        if reply.status == HTTPStatus.GONE:
            await self._endpoints.disable(attempt.endpoint_id, "the receiver answered 410 Gone")
            log.warning("a webhook endpoint is gone, and disabled", endpoint=attempt.endpoint_id)
            return await self._deliveries.give_up(attempt, reply.status, error)
        delay_s = delay_after(attempt.attempt, reply, self._backoff_s, self._rng)
        if delay_s is None:
            log.warning("a webhook was given up", delivery=attempt.delivery_id, tries=attempt.attempt, error=error)
            return await self._deliveries.give_up(attempt, reply.status, error)
        await self._deliveries.try_later(attempt, int(delay_s * 1000), reply.status, error)

    async def _send(self, attempt: Attempt) -> Reply:
        try:
            secrets = await self._endpoints.signing_secrets(attempt.endpoint_id)
            headers = signed_headers(attempt.event_id, int(time.time()), attempt.payload, secrets)
            async with self._client.stream("POST", attempt.url, content=attempt.payload, headers=headers) as answer:
                await _drain(answer)
                return Reply(answer.status_code, retry_after_s=_retry_after_s(answer))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return Reply(None, f"{type(error).__name__}: {error}")
        except VaultLocked as error:
            return Reply(None, error.message)
        except NoResultFound:
            return Reply(None, "the endpoint was deleted")


def signed_headers(event_id: str, timestamp_s: int, payload: bytes, secrets: Sequence[bytes]) -> dict[str, str]:
    """The headers that the Standard Webhooks specification asks for: one signature per secret."""
    signed = b".".join((event_id.encode(), str(timestamp_s).encode(), payload))
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return {
        "content-type": "application/json",
        "user-agent": f"Spillway/{version('spillway')}",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def delay_after(attempt: int, reply: Reply, backoff_s: Sequence[float], rng: random.Random) -> float | None:
    """How long until the next try; None: there is none. Jitter fills the whole step, so that retries spread.

    A receiver that says when (429, 503) is not asked sooner.
    """
    if attempt > len(backoff_s):
        return None
    lowest = 0.0 if attempt == 1 else backoff_s[attempt - 2]
    delay_s = rng.uniform(lowest, backoff_s[attempt - 1])
    if reply.status in BUSY and reply.retry_after_s is not None:
        return max(delay_s, min(reply.retry_after_s, MAX_RETRY_AFTER_S))
    return delay_s


async def _drain(answer: httpx2.Response) -> None:
    """Read a short body, so that the connection can be used again; the status has said it all."""
    try:
        async with asyncio.timeout(1.0):
            async for _ in answer.aiter_raw():
                pass
    except (httpx2.HTTPError, TimeoutError):
        return


def _retry_after_s(answer: httpx2.Response) -> float | None:
    """Retry-After as seconds or as a date (RFC 9110, section 10.2.3)."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
