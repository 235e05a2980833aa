"""The fleet registry: which workers live and which models their pools serve. Workers write it, the API reads it.

An entry is a key with a TTL, refreshed about every second; the index is a set, pruned by every read.
"""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from scheduler.histogram import Histogram
from scheduler.model_card import ModelCard
from scheduler.queue.keys import Keys, quoted
from scheduler.queue.scripts import PUBLISH, READ_REGISTRY, available, raw
from scheduler.settings import Settings


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the console shows it; times are Unix ms of the worker's clock."""

    id: str
    pid: int
    engine_pid: int | None = None
    host: str = ""
    kind: str = "local"
    models: tuple[str, ...] = ()
    busy_rows: int = 0
    max_rows: int = 0
    started_ms: int = 0
    seen_ms: int = 0
    stats: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode_worker = msgspec.msgpack.Decoder(WorkerView).decode
_decode_card = msgspec.msgpack.Decoder(ModelCard).decode


class Fleet:
    """The registry of one shard. A pool is named by its card's id."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.shard)

    async def publish(self, worker: WorkerView, card: ModelCard) -> None:
        """Says that this worker lives (for 10 s) and what its pool serves (for 60 s)."""
        names = quoted(worker.id), quoted(card.id)
        await PUBLISH.run(self._redis, self._keys.prefix, names[0], _encode(worker), names[1], _encode(card))

    async def withdraw(self, worker_id: str) -> None:
        """The worker left; its pool stays offered until its card expires."""
        await available(raw(self._redis)("DEL", self._keys.of("worker", quoted(worker_id))), "withdraw")

    async def workers(self) -> list[WorkerView]:
        """Live workers, by start."""
        rows = await READ_REGISTRY.run(self._redis, self._keys.prefix, "workers")
        return sorted((_decode_worker(row) for row in rows), key=lambda worker: (worker.started_ms, worker.id))

    async def models(self) -> list[ModelCard]:
        """Cards of live or recently seen pools; the first one is `default`."""
        rows = await READ_REGISTRY.run(self._redis, self._keys.prefix, "cards")
        return sorted((_decode_card(row) for row in rows), key=lambda card: (card.position, card.created_s, card.id))
