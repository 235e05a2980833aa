"""The end of a batch: its last state, the rows of its result files and its events in one transaction, then kicks.

Called by expansion.py for batches that fail, by keeper.py for all others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.batch import BatchRecord, BatchStatus
from scheduler.db.batches import BatchStore
from scheduler.db.files import FileRecord, add_file_row
from scheduler.db.webhooks import WebhookEvent, add_events
from scheduler.webhooks import DELIVER, Kick


class BatchEnds:
    """One per scheduler process."""

    def __init__(self, batches: BatchStore, kick: Kick) -> None:
        self._batches = batches
        self._kick = kick

    async def end(self, batch: BatchRecord, to: BatchStatus, files: Sequence[FileRecord] = (), **values: Any) -> bool:
        """Move a batch to this last state; False: it is not any more in the state that `batch` shows."""
        now_ms = int(time.time() * 1000)
        event = WebhookEvent(f"batch.{to.value}", batch.tenant, batch.id, now_ms, webhook_id=batch.webhook_id)
        deliveries: list[str] = []

        async def tell(session: AsyncSession) -> None:
            for record in files:
                await add_file_row(session, record)
            deliveries.extend(await add_events(session, [event]))

        moved = await self._batches.move(batch, to, now_ms, tell, **values)
        if moved:
            await asyncio.gather(*(self._kick(DELIVER, delivery_id) for delivery_id in deliveries))
        return moved
