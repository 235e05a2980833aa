"""The reckoning, after everything settled: Redis, SQL and the producers' ledger tell the same story (I1–I5, I9)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from scheduler.queue.keys import Keys
from scheduler.tokens import Delta, EventId, Failed, Finished, decode_event
from tests.chaos.clients import ENDS
from tests.chaos.event_check import EventCheck
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.processes import Managed
from tests.chaos.stage import SHARD, Stage

MAX_LOST, MAX_BURNT = 3, 5  # the defaults of max_lost and max_attempts
_TERMINAL = ("succeeded", "failed", "cancelled", "expired")
# What may be left without a live job: registries and clocks, and what has a TTL by design.
_MAY_REMAIN = ("j:", "ev:", "idem:", "vt:", "pass:", "rate:", "w:", "card:", "bell:", "cl:", "cons:", "b:")


@dataclass(frozen=True, slots=True)
class Row:
    """A finished job as SQL has it."""

    state: str
    attempt: int
    error_code: str | None


class Reckoning:
    """Reads everything once and blames what does not fit."""

    def __init__(self, stage: Stage, ledger: Ledger) -> None:
        self._stage = stage
        self._ledger = ledger
        self._keys = Keys(SHARD)
        self._redis: Any = stage.redis.own  # redis-py's own types know no asyncio
        self._unlucky: set[str] = set()

    async def settled(self) -> str:
        """What is still under way; empty when nothing is."""
        live = await self._redis.zcard(self._keys.of("live"))
        counts = await self._counts()
        recorded = int(str(self._stage.sql("select count(*) from finished_jobs")[0][0]))
        ended = sum(counts[state] for state in _TERMINAL)
        if live or counts["accepted"] != ended or recorded != ended:
            return f"{live} live, {counts['accepted']} accepted, {ended} ended, {recorded} recorded"
        return ""

    async def run(self) -> None:
        rows = self._rows()
        await self._check_counts(rows)
        self._check_entries(rows)
        await self._check_dead(rows)
        await self._check_logs(rows)
        await self._check_keys(rows)

    async def _counts(self) -> Counter[str]:
        fields = await self._redis.hgetall(self._keys.of("count"))
        return Counter({name.decode(): int(value) for name, value in fields.items()})

    def _rows(self) -> dict[str, Row]:
        found = self._stage.sql("select id, state, attempt, error_code from finished_jobs")
        return {
            str(row[0]): Row(str(row[1]), int(str(row[2])), None if row[3] is None else str(row[3])) for row in found
        }

    async def _check_counts(self, rows: dict[str, Row]) -> None:
        """I4, and Redis and SQL agree state by state."""
        counts = await self._counts()
        recorded = Counter(row.state for row in rows.values())
        for state in _TERMINAL:
            if counts[state] != recorded[state]:
                self._ledger.blame(f"Redis counts {counts[state]} {state} jobs, SQL has {recorded[state]}")
        if counts["accepted"] != len(rows):
            self._ledger.blame(f"{counts['accepted']} jobs were accepted, {len(rows)} ended")

    def _check_entries(self, rows: dict[str, Row]) -> None:
        """I1: every order ended once, as it may; jobs that no client knows are those of unkeyed clients cut early."""
        for entry in self._ledger.entries:
            self._check_entry(entry, rows)
        strangers = rows.keys() - self._ledger.by_job().keys()
        nameless = sum(1 for entry in self._ledger.entries if entry.job_id is None)
        if len(strangers) > nameless:
            self._ledger.blame(f"{len(strangers)} jobs that nobody ordered, {nameless} orders without a job id")

    def _check_entry(self, entry: Entry, rows: dict[str, Row]) -> None:
        if entry.keyed and not entry.answered:
            self._ledger.blame("its client never got an end", entry)
        for job_id in entry.job_ids:
            row = rows.get(job_id)
            if row is None:
                self._ledger.blame(f"{job_id} has no terminal record", entry)
            elif row.state not in entry.order.may_end and not self._was_unlucky(job_id, row):
                self._ledger.blame(f"{job_id} ended {row.state} ({row.error_code})", entry)
        repeatable = {"failed", "cancelled", "expired"}
        for job_id in entry.job_ids[:-1]:
            if job_id in rows and rows[job_id].state not in repeatable:
                self._ledger.blame(f"one key, several jobs: {entry.job_ids}", entry)
        last = rows.get(entry.job_ids[-1]) if entry.job_ids else None
        if last and entry.text is not None and last.state != "succeeded":
            self._ledger.blame(f"its client has the whole answer, the record says {last.state}", entry)
        if last and entry.error_code in ENDS and last.state != ENDS[entry.error_code]:
            self._ledger.blame(f"its client was told {entry.error_code}, the record says {last.state}", entry)

    def _was_unlucky(self, job_id: str, row: Row) -> bool:
        return row.error_code == "worker_lost" and job_id in self._unlucky

    async def find_unlucky(self) -> None:
        """Jobs that ran alone when a fault of ours, not a neighbour's poison, killed their last worker."""
        poison = {job_id for entry in self._ledger.entries if entry.order.poison for job_id in entry.job_ids}
        for job_id in await self._dead_ids():
            if job_id not in poison and await self._last_worker_was_hurt(job_id):
                self._unlucky.add(job_id)
                self._ledger.count("jobs that met three faults")

    async def _dead_ids(self) -> list[str]:
        return [fields[b"id"].decode() for _, fields in await self._redis.xrange(self._keys.of("dead"))]

    async def _last_worker_was_hurt(self, job_id: str) -> bool:
        job = {
            key.decode(): value.decode() for key, value in (await self._redis.hgetall(self._keys.job(job_id))).items()
        }
        started_ms, _, worker = job[f"a:{job['attempt']}"].partition(" ")
        pid = int(worker.split("-")[-2])
        hurts = [hurt for process in self._stage.keeper.processes for hurt in process.hurts if hurt.pid == pid]
        return any(hurt.until_ms >= int(started_ms) - 10 and hurt.from_ms <= int(job["finished"]) for hurt in hurts)

    async def _check_dead(self, rows: dict[str, Row]) -> None:
        """I9: poison jobs are dead letters, alone; nobody was tried more often than allowed."""
        dead = Counter(await self._dead_ids())
        by_job = self._ledger.by_job()
        for job_id, times in dead.items():
            entry = by_job.get(job_id)
            if times > 1:
                self._ledger.blame(f"{job_id} is {times} times a dead letter", entry)
            if not (entry and entry.order.poison) and job_id not in self._unlucky:
                self._ledger.blame(f"{job_id} died with a poison job, or of nothing", entry)
        for job_id in rows:
            lost, fails = await self._redis.hmget(self._keys.job(job_id), "lost", "fails")
            if int(lost or 0) > MAX_LOST or int(lost or 0) + int(fails or 0) > MAX_BURNT:
                self._ledger.blame(f"{job_id}: lost {lost}, failed {fails} times", by_job.get(job_id))

    async def _check_logs(self, rows: dict[str, Row]) -> None:
        """I2, I3 on every job's log, also of those that no client watched."""
        by_job = self._ledger.by_job()
        for job_id, row in rows.items():
            entry = by_job.get(job_id)
            check = EventCheck(None if entry is None else entry.order.expected)
            for at, fields in await self._redis.xrange(self._keys.log(job_id)):
                _feed(check, EventId.parse(at), fields[b"p"])
            if check.end is None or (check.end == "finished") != (row.state == "succeeded"):
                check.wrong.append(f"the log ends with {check.end}, the record says {row.state}")
            scripted = entry is None and check.token_ids[:1] == [0]
            if scripted and check.token_ids != list(range(len(check.token_ids))):
                check.wrong.append("scripted token ids with a gap or a repeat")
            for text in check.wrong:
                self._ledger.blame(f"log of {job_id}: {text}", entry)

    async def _check_keys(self, rows: dict[str, Row]) -> None:
        """I5: no key without TTL but the singletons, none without owner, no depth, no due, no lease of the dead."""
        dead = set(await self._dead_ids())
        async for raw in self._redis.scan_iter(count=1000):
            key = raw.decode()
            part = key.removeprefix(self._keys.prefix)
            if await self._redis.pttl(raw) == -1 and not self._keys.is_singleton(key) and not _is_arq(key):
                self._ledger.blame(f"key {key} has no TTL")
            if part.startswith("b:") and part[2:] not in dead and part[2:] in rows:
                self._ledger.blame(f"key {key}: the body of a job that is over", self._ledger.by_job().get(part[2:]))
            if part.startswith(("q:", "act:", "cx:", "hold:")) or await self._owns_jobs(part, raw):
                self._ledger.blame(f"key {key} is left behind: {await self._describe(raw)}")
        for name in ("due", "deadlines", "depth", "live"):
            if await self._redis.exists(self._keys.of(name)):
                self._ledger.blame(f"{name} is not empty: {await self._describe(self._keys.of(name).encode())}")
        await self._check_leases()

    async def _owns_jobs(self, part: str, key: bytes) -> bool:
        return part.startswith("own:") and await self._redis.hlen(key) > 0

    async def _check_leases(self) -> None:
        alive = {process.pid for process in self._stage.keeper.processes if process.alive}
        for worker in await self._redis.zrange(self._keys.of("lease"), 0, -1):
            if int(worker.decode().split("-")[-2]) not in alive:
                self._ledger.blame(f"a dead worker has a lease: {worker.decode()}")

    async def _describe(self, key: bytes) -> str:
        match (await self._redis.type(key)).decode():
            case "stream":
                return str(await self._redis.xinfo_stream(key))
            case "zset":
                return str(await self._redis.zrange(key, 0, 9, withscores=True))
            case "hash":
                return str(await self._redis.hgetall(key))
            case "set":
                return str(await self._redis.smembers(key))
            case _:
                return str(await self._redis.get(key))

    async def history(self, job_id: str) -> list[str]:
        """All that Redis knows of a job, for the report."""
        fields = await self._redis.hgetall(self._keys.job(job_id))
        lines = ["  hash: " + ", ".join(f"{key.decode()}={value.decode()}" for key, value in sorted(fields.items()))]
        entries = await self._redis.xrange(self._keys.log(job_id))
        shown = entries if len(entries) <= 40 else [*entries[:5], *entries[-35:]]
        return lines + [f"  {at.decode()} {decode_event(fields[b'p'])}" for at, fields in shown]


def _is_arq(key: str) -> bool:
    return key.startswith("arq:")


def _feed(check: EventCheck, at: EventId, payload: bytes) -> None:
    event = decode_event(payload)
    match event:
        case Delta():
            for choice in event.choices:
                check.delta(at, list(choice.token_ids), choice.text, choice.finish_reason)
        case Finished():
            check.ended(at, "finished")
        case Failed():
            check.ended(at, event.code)
        case _:
            check.started(at)


def tracebacks(processes: list[Managed]) -> list[str]:
    """The processes that logged an exception nobody had foreseen."""
    return [
        f"{process.name}: {line[:2000]}"
        for process in processes
        for line in process.log.read_text(errors="replace").splitlines()
        if "Traceback" in line
    ][:5]
