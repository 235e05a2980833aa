"""What is left when everything has settled: Redis and SQL as the checks read them, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from scheduler.queue.keys import Keys
from scheduler.tokens import decode_event
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.stage import SHARD, Stage

TERMINAL = ("succeeded", "failed", "cancelled", "expired")
_BATCH_ENDS = "('completed', 'failed', 'expired', 'cancelled')"


@dataclass(frozen=True, slots=True)
class Record:
    """A finished job as SQL has it."""

    state: str
    attempt: int
    error_code: str | None


@dataclass(frozen=True, slots=True)
class DurableRecord:
    """A row of the outbox."""

    stage: str
    state: str
    attempt: int
    batch_id: str | None
    custom_id: str | None
    answer: bytes | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """`hashes`: all jobs that were ever in Redis, none being past retention; `dead`: ids of dead letters."""

    records: dict[str, Record]
    durable: dict[str, DurableRecord]
    counts: Counter[str]
    hashes: dict[str, dict[str, str]]
    dead: list[str]


class Archive:
    """Reads the evidence of a stage; redis-py's own types know no asyncio."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.keys = Keys(SHARD)
        self.redis: Any = stage.redis.own

    async def under_way(self) -> str:
        """What has not ended yet; empty when everything has."""
        live = await self.redis.zcard(self.keys.of("live"))
        done = await self.redis.xlen(self.keys.of("done"))
        rows = self.stage.sql("select count(*) from durable_jobs where stage != 'done'")[0][0]
        batches = self.stage.sql(f"select count(*) from batches where status not in {_BATCH_ENDS}")[0][0]
        if live or done or rows or batches:
            return f"{live} jobs live in Redis, {done} not recorded, {rows} durable rows and {batches} batches open"
        return ""

    async def read(self) -> Evidence:
        finished = self.stage.sql("select id, state, attempt, error_code from finished_jobs")
        durable = self.stage.sql("select id, stage, state, attempt, batch_id, custom_id, answer from durable_jobs")
        counts = _text(await self.redis.hgetall(self.keys.of("count")))
        return Evidence(
            records={row[0]: Record(*row[1:]) for row in finished},
            durable={row[0]: DurableRecord(*row[1:]) for row in durable},
            counts=Counter({name: int(value) for name, value in counts.items()}),
            hashes=await self._hashes(),
            dead=[fields[b"id"].decode() for _, fields in await self.redis.xrange(self.keys.of("dead"))],
        )

    async def log(self, job_id: str) -> list[tuple[str, bytes]]:
        """A job's events: id and payload."""
        return [(at.decode(), fields[b"p"]) for at, fields in await self.redis.xrange(self.keys.log(job_id))]

    async def describe(self, key: bytes) -> str:
        """What a key holds, shortened."""
        match (await self.redis.type(key)).decode():
            case "stream":
                found = await self.redis.xrange(key, count=5)
            case "zset":
                found = await self.redis.zrange(key, 0, 4, withscores=True)
            case "hash":
                found = await self.redis.hgetall(key)
            case "set":
                found = await self.redis.smembers(key)
            case _:
                found = await self.redis.get(key)
        return str(found)[:500]

    async def history(self, job_id: str) -> list[str]:
        """All that is known of a job, for the report."""
        fields = _text(await self.redis.hgetall(self.keys.job(job_id)))
        rows = self.stage.sql("select * from finished_jobs where id = ?", job_id)
        lines = [f"  hash: {fields}", f"  finished_jobs: {rows}"]
        events = await self.log(job_id)
        shown = events if len(events) <= 40 else [*events[:5], *events[-35:]]
        return lines + [f"  {at} {decode_event(payload)}" for at, payload in shown]

    async def _hashes(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        prefix = self.keys.job("")
        async for key in self.redis.scan_iter(match=prefix.replace("{", "[{]").replace("}", "[}]") + "*", count=1000):
            found[key.decode().removeprefix(prefix)] = _text(await self.redis.hgetall(key))
        return found


def give_lines_their_jobs(ledger: Ledger, evidence: Evidence) -> None:
    """The lines of a batch learn their jobs' ids from SQL, by custom_id."""
    lines: dict[str, Entry] = {entry.order.name: entry for entry in ledger.entries if entry.order.line}
    for job_id, row in evidence.durable.items():
        if row.custom_id is not None and row.custom_id in lines:
            lines[row.custom_id].job_ids.append(job_id)


def _text(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sorted(fields.items())}
