"""Everything that a request handler needs, opened once per process and closed in reverse order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis

from api.auth import Authenticator
from api.dialect import HttpDialect
from api.drain import Drain
from api.metrics import ApiMetrics, Scrape
from scheduler.acceptance import Acceptance
from scheduler.db.batches import BatchStore
from scheduler.db.durable import DurableStore
from scheduler.db.files import FileStore
from scheduler.db.job_listing import JobListing
from scheduler.db.jobs import JobStore
from scheduler.db.keys import KeyStore
from scheduler.db.outbox_rows import OutboxRows
from scheduler.db.schedules import ScheduleStore
from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhook_deliveries import DeliveryStore
from scheduler.db.webhook_endpoints import WebhookEndpoints
from scheduler.lifecycle import Lifecycle
from scheduler.loops.control_plane import ControlKick
from scheduler.outbox import Outbox
from scheduler.queue.connection import check_server, connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.job_views import JobViews
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings

REDIS_PATIENCE_S = 3.0  # then a request is answered 503, and its client may try another replica


@dataclass(frozen=True, slots=True)
class Services:
    """The open connections and the objects that own them."""

    settings: Settings
    redis: Redis
    queue: JobQueue
    fleet: Fleet
    lifecycle: Lifecycle
    bus: TokenBus
    database: Database
    jobs: JobStore
    durable: DurableStore
    acceptance: Acceptance
    files: FileStore
    batches: BatchStore
    job_listing: JobListing
    job_views: JobViews
    dialect: HttpDialect
    schedules: ScheduleStore
    webhooks: WebhookEndpoints
    deliveries: DeliveryStore
    kick: ControlKick
    authenticator: Authenticator
    drain: Drain
    metrics: ApiMetrics
    scrape: Scrape


@asynccontextmanager
async def open_services(settings: Settings, metrics: ApiMetrics, drain: Drain) -> AsyncIterator[Services]:
    """Connect to Redis and SQL. Raises StartupError in one line where a part is missing or refuses."""
    async with AsyncExitStack() as stack:
        database = Database(settings)
        stack.push_async_callback(database.close)
        authenticator = Authenticator(settings, KeyStore(database))
        await authenticator.check_start()
        redis = connect(settings, "command", patience_s=REDIS_PATIENCE_S)
        stack.push_async_callback(redis.aclose)
        await check_server(redis, wait_s=settings.redis_wait_s)
        kick = ControlKick(settings)
        stack.push_async_callback(kick.aclose)
        bus = TokenBus(settings)
        await bus.start()
        stack.push_async_callback(bus.close)
        process = _Process(authenticator, drain, metrics)
        yield _services(settings, process, database, redis, bus, kick)


@dataclass(frozen=True, slots=True)
class _Process:
    """What a process has beside its stores."""

    authenticator: Authenticator
    drain: Drain
    metrics: ApiMetrics


def _services(
    settings: Settings, process: _Process, database: Database, redis: Redis, bus: TokenBus, kick: ControlKick
) -> Services:
    queue, fleet, durable = JobQueue(redis, settings), Fleet(redis, settings), DurableStore(database)
    lifecycle = Lifecycle(queue, fleet, settings)
    outbox = Outbox(OutboxRows(database, settings.shard), lifecycle)
    return Services(
        settings=settings,
        redis=redis,
        queue=queue,
        fleet=fleet,
        lifecycle=lifecycle,
        bus=bus,
        database=database,
        jobs=JobStore(database),
        durable=durable,
        acceptance=Acceptance(durable, outbox, fleet, settings),
        files=FileStore(database, settings),
        batches=BatchStore(database),
        job_listing=JobListing(database),
        job_views=JobViews(redis, settings),
        dialect=HttpDialect(),
        schedules=ScheduleStore(database),
        webhooks=WebhookEndpoints(database, Vault(settings)),
        deliveries=DeliveryStore(database),
        kick=kick,
        authenticator=process.authenticator,
        drain=process.drain,
        metrics=process.metrics,
        scrape=Scrape(process.metrics, queue, fleet),
    )
