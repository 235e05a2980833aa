"""What the queue shows without changing anything: jobs, their events, queues, dead letters. JobQueue's reading half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis

from scheduler.job import JobState, JobView, Priority, created_ms_of
from scheduler.queue import scripts
from scheduler.queue.keys import Keys, quoted, unquoted
from scheduler.queue.pipelining import Pipelined
from scheduler.queue.records import DeadLetter, QueueView, dead_letter, job_view, queue_view
from scheduler.settings import Settings
from scheduler.tokens import EventId

_MOST_SCANS = 20  # of 1,000 live jobs (or dead letters) each, for one page
_CLASSES = list(Priority)


class QueueReader:
    """All calls raise QueueUnavailable when Redis cannot be reached."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._calls = Pipelined(redis)
        self.keys = Keys(settings.shard)
        self._prefix = self.keys.prefix

    async def view(self, job_id: str) -> JobView | None:
        fields = await self._command("HGETALL", self.keys.job(job_id))
        return job_view(job_id, fields) if fields else None

    async def known(self, job_ids: Sequence[str]) -> set[str]:
        """Which of these have a hash: waiting, running, or ended not long ago."""
        found = await self._each("EXISTS", [self.keys.job(job_id) for job_id in job_ids])
        return {job_id for job_id, exists in zip(job_ids, found, strict=True) if exists}

    async def read_events(self, job_id: str, after: EventId | None, limit: int = 1000) -> list[tuple[EventId, bytes]]:
        """The job's log after an id, oldest first; payloads as logged."""
        start = "-" if after is None else f"({after}"
        rows = await self._command("XRANGE", self.keys.log(job_id), start, "+", "COUNT", limit)
        return [(EventId.parse(at), fields[b"p"]) for at, fields in rows]

    async def list_jobs(
        self,
        limit: int,
        before: str | None = None,
        *,
        tenant: str | None = None,
        state: JobState | None = None,
        pool: str | None = None,
        priority: Priority | None = None,
        batch_id: str | None = None,
    ) -> list[JobView]:
        """Jobs that are not terminal, newest first, made before the job `before` (an id; it may be gone since).

        At most 20,000 jobs are looked at, so that a rare filter may give less than there is. Raises ValueError where
        `before` is no job id.
        """
        wanted = (
            "" if tenant is None else quoted(tenant),
            "" if state is None else state.value,
            "" if pool is None else quoted(pool),
            "" if priority is None else priority.value,
            "" if batch_id is None else batch_id,
        )
        ids: list[str] = []
        for _ in range(_MOST_SCANS):
            start = (0, "") if before is None else (created_ms_of(before), before)
            found, last = await self._run(scripts.LIST_JOBS, limit - len(ids), *start, *wanted)
            ids += [job_id.decode() for job_id in found]
            before = last.decode()
            if not before or len(ids) >= limit:
                break
        rows = cast(list[dict[bytes, bytes]], await self._each("HGETALL", [self.keys.job(job_id) for job_id in ids]))
        return [job_view(job_id, fields) for job_id, fields in zip(ids, rows, strict=True) if fields]

    async def depths(self) -> dict[tuple[str, Priority], int]:
        """Waiting jobs (queued and scheduled) per pool and class; what is not listed is 0."""
        found = await self._command("HGETALL", self.keys.of("depth"))
        depths: dict[tuple[str, Priority], int] = {}
        for field, count in found.items():
            pool, _, class_ = field.decode().rpartition("|")
            depths[unquoted(pool), Priority(class_)] = int(count)
        return depths

    async def counts(self) -> dict[str, int]:
        """`accepted`, and one per terminal state, since the shard began; a replay is accepted and ends once more."""
        found = await self._command("HGETALL", self.keys.of("count"))
        return {name.decode(): int(count) for name, count in found.items()}

    async def queues(self) -> list[QueueView]:
        """All classes of every pool that is offered, holds jobs or is held up; by pool, highest class first."""
        views = [queue_view(row) for row in await self._run(scripts.QUEUES)]
        return sorted(views, key=lambda view: (view.pool, _CLASSES.index(view.priority)))

    async def dead_letters(self, limit: int, before: str | None = None, pool: str | None = None) -> list[DeadLetter]:
        """Newest first, older than the entry `before`; the list keeps about 10,000, their jobs a day."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = []
        wanted = None if pool is None else quoted(pool).encode()
        for _ in range(_MOST_SCANS):
            end = "+" if before is None else f"({before}"
            page = await self._command("XREVRANGE", self.keys.of("dead"), end, "-", "COUNT", 1000 if pool else limit)
            entries += [entry for entry in page if wanted is None or entry[1][b"pool"] == wanted]
            if len(page) < 1000 or len(entries) >= limit:
                break
            before = page[-1][0].decode()
        entries = entries[:limit]
        bodies = await self._each("EXISTS", [self.keys.of("body", fields[b"id"].decode()) for _, fields in entries])
        return [dead_letter(at, fields, bool(kept)) for (at, fields), kept in zip(entries, bodies, strict=True)]

    async def _run(self, script: scripts.Script, *args: scripts.Argument) -> Any:
        return await self._calls.run(script, self._prefix, *args)

    async def _command(self, *args: str | int) -> Any:
        return await scripts.available(scripts.raw(self._redis)(*args), str(args[0]))

    async def _each(self, command: str, keys: Sequence[str]) -> list[Any]:
        """The same command for many keys in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.execute_command(command, key)  # pyright: ignore[reportUnknownMemberType]
            return cast(list[Any], await scripts.available(pipe.execute(), command))
