"""Webhook endpoints and deliveries on both databases."""

from __future__ import annotations

import asyncio
import time

from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhook_deliveries import DeliveryStore
from scheduler.db.webhook_endpoints import EndpointView, WebhookEndpoints
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.settings import Settings


async def endpoint_of(database: Database, settings: Settings, *events: str) -> EndpointView:
    endpoints = WebhookEndpoints(database, Vault(settings))
    return (await endpoints.create("ann", "https://example.com/hook", "ci", events))[0]


async def add(database: Database, *subjects: str) -> list[str]:
    now_ms = int(time.time() * 1000)
    async with database.session() as session:
        added = await add_events(session, [WebhookEvent("job.failed", "ann", name, now_ms) for name in subjects])
        await session.commit()
    return added


async def test_an_event_is_stored_once_however_often_it_is_written(database: Database, migrated: Settings) -> None:
    endpoint = await endpoint_of(database, migrated)
    first, again = await asyncio.gather(add(database, "job-t-1", "job-t-2"), add(database, "job-t-1", "job-t-2"))
    assert first == again
    assert len(await DeliveryStore(database).list(endpoint.id)) == 2


async def test_an_event_that_was_rolled_back_is_no_event(database: Database, migrated: Settings) -> None:
    endpoint = await endpoint_of(database, migrated)
    async with database.session() as session:
        await add_events(session, [WebhookEvent("job.failed", "ann", "job-t-1", 1)])
    assert await DeliveryStore(database).list(endpoint.id) == []


async def test_of_many_senders_one_begins_a_try(database: Database, migrated: Settings) -> None:
    await endpoint_of(database, migrated)
    (delivery_id,) = await add(database, "job-t-1")
    store = DeliveryStore(database)
    begun = await asyncio.gather(*(store.begin(delivery_id) for _ in range(6)))
    assert len([attempt for attempt in begun if attempt is not None]) == 1
    assert await store.due(4, 10) == []


async def test_what_is_due_is_a_few_of_each_endpoint(database: Database, migrated: Settings) -> None:
    quiet = await endpoint_of(database, migrated, "job.failed")
    for _ in range(2):
        await add(database, *(f"job-t-{number}" for number in range(10)))
    loud = await endpoint_of(database, migrated)
    await add(database, *(f"job-t-{number}" for number in range(20)))
    store = DeliveryStore(database)
    due = [await store.endpoint_of(delivery_id) for delivery_id in await store.due(4, 10)]
    assert sorted(map(str, due)) == sorted([quiet.id] * 4 + [loud.id] * 4)
    assert await store.next_due(quiet.id) is not None


async def test_pages_of_deliveries_are_whole_and_in_order(database: Database, migrated: Settings) -> None:
    endpoint = await endpoint_of(database, migrated)
    await add(database, *(f"job-t-{number}" for number in range(25)))
    store, seen, after = DeliveryStore(database), [], None
    while page := await store.list(endpoint.id, after=after, limit=10):
        seen += [view.id for view in page]
        after = page[-1].id
    assert len(seen) == len(set(seen)) == 25


async def test_old_deliveries_are_pruned_and_deleting_an_endpoint_takes_its_deliveries(
    database: Database, migrated: Settings
) -> None:
    endpoint = await endpoint_of(database, migrated)
    await add(database, "job-t-1", "job-t-2")
    store = DeliveryStore(database)
    assert await store.prune(1) == 0
    assert await store.prune(int(time.time() * 1000) + 1000, limit=1) == 1
    assert await WebhookEndpoints(database, Vault(migrated)).delete(endpoint.id)
    assert await store.list(endpoint.id) == []
