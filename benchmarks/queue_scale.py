"""Claims from a deep queue: does their time grow with the backlog, what does a waiting job weigh, are tenants equal?

    python -m benchmarks.queue_scale [--depths 1000,10000,100000] [--tenants 2000] [--claims 300]

One process, one redis-server (AOF everysec). At each depth: `--claims` single claims, timed in the client, round trip
included; a bare PING beside them tells what of it is the round trip. No peer has tenants, so the numbers stand alone.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

from redis.asyncio import Redis

from scheduler.job import ClaimedJob, NewJob, Priority, new_job_id
from scheduler.lifecycle import Lifecycle
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.records import Enqueued
from scheduler.queue.scripts import raw
from scheduler.request import Usage
from scheduler.settings import Settings

POOL, WORKER = "scale", "scale-worker"
_AT_ONCE = 500
_ROOM_TOKENS = 10**9


class Stage:
    """A queue that is filled step by step; tenants take turns."""

    def __init__(self, settings: Settings, redis: Redis, tenants: int) -> None:
        self.queue = JobQueue(redis, settings)
        self.lifecycle = Lifecycle(self.queue, Fleet(redis, settings), settings)
        self._redis = redis
        self._shard = settings.shard
        self._tenants = tenants
        self._made = 0

    async def fill(self, depth: int) -> None:
        waiting = sum((await self.queue.depths()).values())
        while waiting < depth:
            jobs = [self._new_job() for _ in range(min(_AT_ONCE, depth - waiting))]
            replies = await self.queue.enqueue_many(jobs)
            assert all(isinstance(reply, Enqueued) for reply in replies)
            waiting += len(jobs)

    async def memory_bytes(self) -> int:
        return int((await raw(self._redis)("INFO", "memory"))["used_memory"])

    async def ping_ms(self) -> float:
        began_s = time.perf_counter()
        await raw(self._redis)("PING")
        return 1000 * (time.perf_counter() - began_s)

    async def claim(self, rows: int) -> list[ClaimedJob]:
        return list((await self.lifecycle.claim(WORKER, POOL, rows, rows, _ROOM_TOKENS)).jobs)

    async def timed_claim_ms(self) -> float:
        began_s = time.perf_counter()
        jobs = await self.claim(1)
        took_ms = 1000 * (time.perf_counter() - began_s)
        await self.end(jobs)
        return took_ms

    async def end(self, jobs: list[ClaimedJob]) -> None:
        await self.lifecycle.end(
            WORKER, [(job, self.lifecycle.success(Usage(prompt_tokens=cost_tokens(job.tenant)))) for job in jobs]
        )

    def _new_job(self) -> NewJob:
        self._made += 1
        tenant = f"tenant-{self._made % self._tenants}"
        return NewJob(
            id=new_job_id(self._shard),
            pool=POOL,
            priority=Priority.NORMAL,
            tenant=tenant,
            cost_tokens=cost_tokens(tenant),
            body=b"x" * 200,
            model=POOL,
        )


def cost_tokens(tenant: str) -> int:
    """What each job of this tenant costs: 100 to 400."""
    return 100 * (1 + int(tenant.rpartition("-")[2]) % 4)


def _quantiles(times_ms: list[float]) -> str:
    ordered = sorted(times_ms)
    return f"{ordered[len(ordered) // 2]:.2f} | {ordered[int(0.99 * len(ordered))]:.2f}"


async def _measure(url: str, depths: list[int], tenants: int, claims: int) -> None:
    settings = Settings(home=Path(tempfile.gettempdir()), redis_url=url, queue_depth_cap=10**7)
    redis = connect(settings, "command")
    stage = Stage(settings, redis, tenants)
    empty_bytes = await stage.memory_bytes()
    header = ("queued", "claim p50 ms", "claim p99 ms", "PING p50 ms", "PING p99 ms", "bytes per waiting job")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for depth in depths:
        await stage.fill(depth)
        weight = (await stage.memory_bytes() - empty_bytes) / depth
        pings = [await stage.ping_ms() for _ in range(claims)]
        times = [await stage.timed_claim_ms() for _ in range(claims)]
        print(f"| {depth:,} | {_quantiles(times)} | {_quantiles(pings)} | {weight:,.0f} |", flush=True)
    await _print_shares(stage, tenants)
    await redis.aclose()


async def _print_shares(stage: Stage, tenants: int) -> None:
    """Tenants with jobs of 100 to 400 tokens each should get the same tokens, give or take one job of the largest."""
    served: Counter[str] = Counter()
    enough = 1200 * tenants
    while served.total() < enough:
        jobs = await stage.claim(32)
        for job in jobs:
            served[job.tenant] += cost_tokens(job.tenant)
        await stage.end(jobs)
    print(f"\n{tenants:,} tenants, jobs of 100 to 400 tokens, {served.total():,} tokens served:")
    for kind in range(4):
        got = [served[f"tenant-{number}"] for number in range(kind, tenants, 4)]
        mean = sum(got) / len(got)
        print(f"- jobs of {100 * (1 + kind)}: {min(got):,} to {max(got):,} tokens a tenant, mean {mean:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="1000,10000,100000")
    parser.add_argument("--tenants", type=int, default=2000)
    parser.add_argument("--claims", type=int, default=300)
    options = parser.parse_args()
    depths = [int(text) for text in options.depths.split(",")]
    with tempfile.TemporaryDirectory(prefix="spillway-bench-") as home:
        server = EmbeddedRedis(Path(home))
        server.start()
        try:
            asyncio.run(_measure(server.url, depths, options.tenants, options.claims))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
