"""Webhooks from event to receiver: signed, at least once, in their time, and no receiver holds up another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import openai
import pytest
from standardwebhooks import Webhook

from scheduler import webhooks
from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.db.vault import KEY_FILE, Vault
from scheduler.db.webhook_deliveries import DeliveryStore, DeliveryView
from scheduler.db.webhook_endpoints import EndpointView, WebhookEndpoints
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.loops.control_plane import ControlKick, ControlPlane
from scheduler.loops.webhook_jobs import webhook_jobs
from scheduler.settings import Settings
from scheduler.webhooks import Reply, WebhookSender, delay_after
from tests.conftest import wait_until
from tests.http_receiver import Behaviour, Received, Receiver, cut, hang, raw, receiving, status

QUICK_S = (0.01, 0.02, 0.03)


class Stage:
    """A sender on a real database; kicks are remembered, not followed."""

    def __init__(self, settings: Settings, database: Database, backoff_s: tuple[float, ...] = QUICK_S) -> None:
        self.database = database
        self.settings = settings
        self.endpoints = WebhookEndpoints(database, Vault(settings))
        self.deliveries = DeliveryStore(database)
        self.kicked: list[str] = []
        self.sender = WebhookSender(self.deliveries, self.endpoints, self._kick, settings, backoff_s)

    async def _kick(self, name: str, *args: str) -> None:
        self.kicked += args[:1]

    async def endpoint(self, receiver: Receiver, *events: str) -> tuple[EndpointView, str]:
        return await self.endpoints.create("ann", receiver.url, "", events)

    async def event(self, subject: str, **fields: Any) -> list[str]:
        event = replace(WebhookEvent("job.succeeded", "ann", subject, int(time.time() * 1000)), **fields)
        async with self.database.session() as session:
            added = await add_events(session, [event])
            await session.commit()
        return added

    async def delivery(self, delivery_id: str) -> DeliveryView:
        found = await self.deliveries.get(delivery_id)
        assert found is not None
        return found

    async def until(self, delivery_id: str, state: str) -> DeliveryView:
        """Sweep and deliver, as the control plane does, until the delivery is in this state."""

        async def look() -> DeliveryView | None:
            for due in await self.deliveries.due(4, 100):
                await self.sender.deliver(due)
            found = await self.delivery(delivery_id)
            return found if found.status == state else None

        found = await wait_until(look)
        assert found is not None
        return found


@asynccontextmanager
async def staged(settings: Settings, *receivers: Receiver, **options: Any) -> AsyncIterator[Stage]:
    chosen = settings.model_copy(update={"outbound_origins": ",".join(receiver.origin for receiver in receivers)})
    await asyncio.to_thread(migrate, chosen)
    database = Database(chosen)
    stage = Stage(chosen, database, **options)
    try:
        yield stage
    finally:
        await stage.sender.aclose()
        await database.close()


def verify(request: Received, secret: str) -> Any:
    return Webhook(secret).verify(request.body, request.headers)


async def test_an_event_arrives_signed_as_the_specification_and_openai_have_it(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage:
        _, secret = await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1", data={"object": "job"})
        await stage.sender.deliver(delivery_id)
        view = await stage.delivery(delivery_id)
    (request,) = receiver.received
    assert verify(request, secret)["data"] == {"id": "job-t-1", "object": "job"}
    assert request.headers["webhook-id"] == json.loads(request.body)["id"] == view.event_id
    assert (view.status, view.attempts, view.last_status, view.last_error) == ("delivered", 1, 200, None)
    seen = openai.OpenAI(api_key="none").webhooks.unwrap(request.body, request.headers, secret=secret)
    assert (seen.type, seen.object) == ("job.succeeded", "event")


async def test_a_failing_receiver_gets_the_same_event_again(settings: Settings) -> None:
    async with receiving(status(500), cut(), status(404), status(200)) as receiver, staged(settings, receiver) as stage:
        _, secret = await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        done = await stage.until(delivery_id, "delivered")
    assert done.attempts == 4
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
    assert len({request.body for request in receiver.received}) == 1
    assert all(verify(request, secret) for request in receiver.received)


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (status(500), "answered 500"),
        (status(302, location="http://127.0.0.1:1/"), "redirect"),
        (cut(), "Error"),
        (raw(b"no http\r\n\r\n"), "Error"),
    ],
)
async def test_out_of_tries_a_delivery_is_dead_and_can_be_tried_again(
    settings: Settings, behaviour: Behaviour, error: str
) -> None:
    async with receiving(behaviour) as receiver, staged(settings, receiver) as stage:
        await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        dead = await stage.until(delivery_id, "dead")
        assert (dead.attempts, dead.next_ms) == (len(QUICK_S) + 1, None)
        assert error in (dead.last_error or "")
        receiver.script[:] = [status(204)]
        assert await stage.deliveries.revive(delivery_id)
        assert not await stage.deliveries.revive(delivery_id)
        assert (await stage.until(delivery_id, "delivered")).attempts == 1


async def test_gone_disables_the_endpoint_and_what_waits_goes_out_when_it_is_enabled(settings: Settings) -> None:
    async with receiving(status(410), status(200)) as receiver, staged(settings, receiver) as stage:
        endpoint, _ = await stage.endpoint(receiver)
        first = (await stage.event("job-t-1"))[0]
        second = (await stage.event("job-t-2"))[0]
        await stage.sender.deliver(first)
        assert (await stage.delivery(first)).status == "dead"
        disabled = await stage.endpoints.get(endpoint.id)
        assert disabled is not None and "410" in (disabled.disabled_reason or "")
        assert await stage.event("job-t-3") == []
        assert await stage.deliveries.due(4, 10) == []
        await stage.sender.deliver(second)
        assert len(receiver.received) == 1
        await stage.endpoints.update(endpoint.id, enabled=True)
        await stage.until(second, "delivered")


async def test_a_delivery_in_other_hands_is_not_sent_twice(settings: Settings) -> None:
    go_on = asyncio.Event()
    async with receiving(hang(go_on, status(200))) as receiver, staged(settings, receiver) as stage:
        await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        async with asyncio.TaskGroup() as group:
            group.create_task(stage.sender.deliver(delivery_id))
            await wait_until(lambda: receiver.received)
            await Stage(stage.settings, stage.database).sender.deliver(delivery_id)
            await stage.sender.sweep()
            assert stage.kicked == []
            go_on.set()
    assert len(receiver.received) == 1


async def test_a_try_that_its_process_did_not_end_is_made_again_when_its_lease_is_over(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.db.webhook_deliveries.LEASE_MS", 100)
    async with receiving() as receiver, staged(settings, receiver) as stage:
        await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        lost = await stage.deliveries.begin(delivery_id)
        assert lost is not None
        assert (await stage.until(delivery_id, "delivered")).attempts == 2
        await stage.deliveries.give_up(lost, 500, "the slow process wakes up")
        assert (await stage.delivery(delivery_id)).status == "delivered"
        assert [request.headers["webhook-id"] for request in receiver.received] == [lost.event_id]


async def test_a_slow_receiver_holds_up_no_other(settings: Settings) -> None:
    go_on = asyncio.Event()
    async with (
        receiving(hang(go_on, status(200))) as slow,
        receiving() as fast,
        staged(settings, slow, fast) as stage,
    ):
        slow_endpoint, _ = await stage.endpoint(slow)
        fast_endpoint, _ = await stage.endpoint(fast)
        for number in range(30):
            await stage.event(f"job-t-{number}")
        async with asyncio.TaskGroup() as group:
            for delivery in await stage.deliveries.list(slow_endpoint.id, limit=30):
                group.create_task(stage.sender.deliver(delivery.id))
            await wait_until(lambda: slow.connections == webhooks.AT_ONCE)
            (first, *_) = await stage.deliveries.list(fast_endpoint.id, limit=1)
            await stage.sender.deliver(first.id)
            assert len(fast.received) == 30
            assert slow.connections == webhooks.AT_ONCE
            go_on.set()
        assert len(slow.received) == 30
        assert len({request.headers["webhook-id"] for request in slow.received}) == 30


async def test_an_endpoint_gets_the_types_that_it_lists_and_named_events_go_to_one(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage:
        everything, _ = await stage.endpoint(receiver)
        failures, _ = await stage.endpoint(receiver, "job.failed", "batch.failed")
        assert len(await stage.event("job-t-1")) == 1
        assert len(await stage.event("job-t-1", type="job.failed")) == 2
        assert len(await stage.event("job-t-2", type="job.failed", webhook_id=failures.id)) == 1
        assert await stage.event("job-t-3", webhook_id=failures.id) == []
        assert await stage.event("job-t-4", tenant="bob") == []
        types = {view.type for view in await stage.deliveries.list(everything.id)}
        assert types == {"job.succeeded", "job.failed"}


async def test_an_event_that_is_written_again_is_the_same_event(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage:
        endpoint, _ = await stage.endpoint(receiver)
        assert await stage.event("job-t-1", turn=1) == await stage.event("job-t-1", turn=1)
        assert await stage.event("job-t-1", turn=2) != await stage.event("job-t-1", turn=1)
        assert len(await stage.deliveries.list(endpoint.id)) == 2


async def test_after_a_rotation_both_secrets_verify_for_a_day(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage:
        endpoint, old = await stage.endpoint(receiver)
        rotated = await stage.endpoints.rotate(endpoint.id)
        assert rotated is not None
        await stage.sender.deliver((await stage.event("job-t-1"))[0])
        for secret in (old, rotated[1]):
            assert verify(receiver.received[0], secret)
        monkeypatch.setattr("scheduler.db.webhook_endpoints.OLD_SECRET_MS", -1)
        await stage.endpoints.rotate(endpoint.id)
        await stage.sender.deliver((await stage.event("job-t-2"))[0])
        assert receiver.received[1].headers["webhook-signature"].count("v1,") == 1


async def test_secrets_lie_sealed_and_a_lost_key_is_told(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage:
        _, secret = await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        everything = b"".join(path.read_bytes() for path in settings.home.rglob("*") if path.is_file())
        assert secret.encode() not in everything
        (settings.home / KEY_FILE).unlink()
        await Stage(stage.settings, stage.database).sender.deliver(delivery_id)
        assert "another key" in ((await stage.delivery(delivery_id)).last_error or "")
        assert receiver.received == []


async def test_an_origin_that_is_not_listed_is_never_called(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings) as stage:
        await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        await stage.sender.deliver(delivery_id)
        assert "not called" in ((await stage.delivery(delivery_id)).last_error or "")
        assert receiver.connections == 0


@asynccontextmanager
async def control_plane(stage: Stage) -> AsyncIterator[None]:
    control = ControlPlane(stage.settings)
    async with webhook_jobs(control, stage.settings, stage.database):
        task = asyncio.create_task(control.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_the_control_plane_delivers_what_is_kicked_and_what_is_not(settings: Settings) -> None:
    async with receiving() as receiver, staged(settings, receiver) as stage, control_plane(stage):
        endpoint, _ = await stage.endpoint(receiver)
        await stage.event("job-t-unkicked")
        await wait_until(lambda: len(receiver.received) == 1)
        kick = ControlKick(settings)
        await kick(webhooks.DELIVER, (await stage.event("job-t-kicked"))[0])
        await kick.aclose()
        await wait_until(lambda: len(receiver.received) == 2)
        done = await stage.deliveries.list(endpoint.id, status="delivered")
        assert [view.attempts for view in done] == [1] * len(done)


@pytest.mark.parametrize(("attempt", "lowest", "highest"), [(1, 0, 5), (2, 5, 30), (3, 30, 120), (8, 18_000, 36_000)])
def test_retries_come_later_and_later_each_anywhere_in_its_step(attempt: int, lowest: float, highest: float) -> None:
    rng = random.Random(1)
    delays = [delay_after(attempt, Reply(500), webhooks.BACKOFF_S, rng) for _ in range(200)]
    assert all(delay is not None and lowest <= delay <= highest for delay in delays)
    spread = max(filter(None, delays)) - min(filter(None, delays))
    assert spread > 0.8 * (highest - lowest)


def test_after_the_last_step_there_is_no_retry_and_retry_after_is_heeded() -> None:
    rng = random.Random(1)
    assert delay_after(9, Reply(500), webhooks.BACKOFF_S, rng) is None
    for code in (429, 503):
        delay_s = delay_after(1, Reply(code, retry_after_s=90), webhooks.BACKOFF_S, rng)
        assert delay_s == 90
    assert (delay_after(1, Reply(500, retry_after_s=90), webhooks.BACKOFF_S, rng) or 0) <= 5
    assert delay_after(1, Reply(503, retry_after_s=10**9), webhooks.BACKOFF_S, rng) == webhooks.MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("retry_after", "at_least_ms"),
    [
        (lambda: "40", 40_000),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True), 300_000),
    ],
    ids=["seconds", "date"],
)
async def test_a_busy_receiver_says_when(settings: Settings, retry_after: Callable[[], str], at_least_ms: int) -> None:
    async with receiving(status(503, retry_after=retry_after())) as receiver, staged(settings, receiver) as stage:
        await stage.endpoint(receiver)
        (delivery_id,) = await stage.event("job-t-1")
        before_ms = int(datetime.now(UTC).timestamp() * 1000)
        await stage.sender.deliver(delivery_id)
        next_ms = (await stage.delivery(delivery_id)).next_ms
        assert next_ms is not None and next_ms - before_ms >= at_least_ms
