"""The `done` stream: outcomes of jobs on their way to SQL. Written by the sealing scripts, read by the recorder.

At least once: an outcome that was read but not acknowledged comes again, to any recorder, after 30 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from scheduler.job import JobView
from scheduler.queue.keys import RECORDER_GROUP, Keys
from scheduler.queue.records import ended_job
from scheduler.queue.scripts import available, raw
from scheduler.settings import Settings

_RECLAIM_AFTER_MS = 30_000
_GATHER_S = 0.02  # so that the outcomes of a moment share a commit


@dataclass(frozen=True, slots=True)
class DoneRecord:
    """One outcome; `entry_id` acknowledges it."""

    entry_id: str
    job: JobView


class DoneLog:
    """Give it a connection of role "blocking": `read_done` waits inside Redis."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._key = Keys(settings.shard).of("done")
        self._reclaimed_at = float("-inf")
        self._read_at = float("-inf")

    async def read_done(self, consumer: str, count: int, block_ms: int) -> list[DoneRecord]:
        """Up to `count` outcomes; waits up to `block_ms` (≤ 9,000) for the first. Left-over ones of others come too.

        Where the last read was not full, this one begins 20 ms after it at the earliest.
        """
        await asyncio.sleep(self._read_at + _GATHER_S - time.monotonic())
        records = await self._read(consumer, count, block_ms)
        self._read_at = float("-inf") if len(records) >= count else time.monotonic()
        return records

    async def _read(self, consumer: str, count: int, block_ms: int) -> list[DoneRecord]:
        if time.monotonic() - self._reclaimed_at > _RECLAIM_AFTER_MS / 1000:
            left_over = await self._reclaim(consumer, count)
            if left_over:
                return left_over
            self._reclaimed_at = time.monotonic()
        block = max(1, min(block_ms, 9000))
        read = ("XREADGROUP", "GROUP", RECORDER_GROUP, consumer, "COUNT", count, "BLOCK", block, "STREAMS", self._key)
        reply = await self._in_group(*read, ">")
        return [] if not reply else _records(reply[0][1])

    async def ack_done(self, entry_ids: Sequence[str]) -> None:
        """These outcomes are in SQL: forget them."""
        if not entry_ids:
            return
        async with self._redis.pipeline(transaction=True) as both:  # an entry that is acknowledged alone would stay
            for command in (("XACK", self._key, RECORDER_GROUP), ("XDEL", self._key)):
                both.execute_command(*command, *entry_ids)  # pyright: ignore[reportUnknownMemberType]
            await available(both.execute(), "ack_done")

    async def _reclaim(self, consumer: str, count: int) -> list[DoneRecord]:
        claim = ("XAUTOCLAIM", self._key, RECORDER_GROUP, consumer, _RECLAIM_AFTER_MS, "0-0", "COUNT", count)
        reply = await self._in_group(*claim)
        return _records(reply[1])

    async def _in_group(self, *command: str | int) -> Any:
        execute = raw(self._redis)
        try:
            return await available(execute(*command), str(command[0]))
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
        with contextlib.suppress(ResponseError):  # BUSYGROUP: another recorder was faster
            create = execute("XGROUP", "CREATE", self._key, RECORDER_GROUP, "0", "MKSTREAM")
            await available(create, "XGROUP CREATE")
        return await available(execute(*command), str(command[0]))


def _records(entries: Any) -> list[DoneRecord]:
    found: list[DoneRecord] = []
    for entry_id, fields in entries:
        if fields:  # trimmed by MAXLEN while it was pending: nothing is left to record
            found.append(DoneRecord(entry_id.decode(), ended_job(fields)))
    return found
