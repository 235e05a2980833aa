"""A receiver that is away while the scheduler is killed gets the very event, whichever scheduler sends it."""

from __future__ import annotations

import asyncio
import time

from sqlmodel import update

from scheduler.db.models import WebhookDelivery
from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhook_deliveries import DeliveryStore
from scheduler.db.webhook_endpoints import WebhookEndpoints
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.http_receiver import receiving
from tests.integration.test_scheduler_process import running_scheduler
from tests.service import free_port

EVENTS = 20


async def test_no_event_is_lost_when_the_receiver_is_down_and_the_scheduler_is_killed(settings: Settings) -> None:
    port = free_port()
    await asyncio.to_thread(migrate, settings)
    database = Database(settings)
    deliveries = DeliveryStore(database)
    endpoint, _ = await WebhookEndpoints(database, Vault(settings)).create("ann", f"http://127.0.0.1:{port}/", "", [])
    events = [WebhookEvent("job.succeeded", "ann", f"job-t-{number}", _now_ms()) for number in range(EVENTS)]
    origins = {"SPILLWAY_OUTBOUND_ORIGINS": f"http://127.0.0.1:{port}"}
    async with running_scheduler(settings, **origins) as (process, _):
        async with database.session() as session:
            await add_events(session, events)
            await session.commit()

        async def tried() -> bool:
            return any(view.last_error for view in await deliveries.list(endpoint.id, limit=EVENTS))

        await wait_until(tried, within_s=60)
        process.kill()
        await process.wait()
    async with database.session() as session:  # as if leases and back-off were over
        await session.exec(update(WebhookDelivery).values(next_ms=0))
        await session.commit()
    async with receiving(port=port) as receiver, running_scheduler(settings, **origins):

        async def all_delivered() -> bool:
            return len(await deliveries.list(endpoint.id, status="delivered", limit=EVENTS)) == EVENTS

        await wait_until(all_delivered, within_s=90)
        got = [request.headers["webhook-id"] for request in receiver.received]
    assert set(got) == {event.id for event in events}
    await database.close()


def _now_ms() -> int:
    return int(time.time() * 1000)
