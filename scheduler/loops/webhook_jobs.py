"""Puts webhooks on the control plane: the function that kicks name, the sweep behind it, retention."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhook_deliveries import DeliveryStore
from scheduler.db.webhook_endpoints import WebhookEndpoints
from scheduler.loops.control_plane import HOUR_S, ControlKick, ControlPlane
from scheduler.settings import Settings
from scheduler.webhooks import DELIVER, WebhookSender

SWEEP_S = 1  # an event whose writer kicked nobody waits that long
PRUNE_AT_S = 23 * 60  # of every hour
DAY_MS = 24 * 3600 * 1000
STEP_ROWS = 1000


@asynccontextmanager
async def webhook_jobs(control: ControlPlane, settings: Settings, database: Database) -> AsyncGenerator[WebhookSender]:
    """Register before the control plane runs; leaving the block closes connections. Raises StartupError (key file)."""
    deliveries = DeliveryStore(database)
    kick = ControlKick(settings)
    sender = WebhookSender(deliveries, WebhookEndpoints(database, Vault(settings)), kick, settings)
    control.function(DELIVER, sender.deliver)
    control.every(SWEEP_S, "sweep_webhooks", sender.sweep)
    control.every(HOUR_S, "prune_webhooks", lambda: prune_deliveries(deliveries, settings), offset_s=PRUNE_AT_S)
    try:
        yield sender
    finally:
        await sender.aclose()
        await kick.aclose()


async def prune_deliveries(deliveries: DeliveryStore, settings: Settings) -> None:
    """Deliveries are kept as long as finished jobs are."""
    before_ms = int(time.time() * 1000) - settings.finished_job_retention_days * DAY_MS
    while await deliveries.prune(before_ms, STEP_ROWS):
        pass
