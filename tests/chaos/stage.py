"""The whole product as separate processes behind a TCP proxy to Redis, with handles to hurt each of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from scheduler.db.schema import migrate
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.settings import Settings
from tests.chaos.http_client import Broken, Silent, call
from tests.chaos.processes import Hurt, Keeper, Managed
from tests.chaos.timeline import Timeline
from tests.redis_proxy import RedisProxy, redis_proxy
from tests.service import environment, free_port

SHARD = "chaos"
SCRIPTED_WORKERS = 3
APIS = 2
KEEPALIVE_S = 2
RETENTION_S = 24 * 3600  # events and records stay for the reckoning
_READY_S = 240.0
_MOST_STARTS = 3
_WORKERS = ("scripted", "local")


class RedisUnderFire:
    """An embedded redis-server (append-only file, fsync every second), and a client of the run's own past the proxy."""

    def __init__(self, home: Path, timeline: Timeline) -> None:
        self._server = EmbeddedRedis(home)
        self._timeline = timeline
        self._lock = asyncio.Lock()
        self.url = self._server.url
        self.own = Redis.from_url(self.url)

    async def start(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def stop(self) -> None:
        await self.own.aclose()
        await asyncio.to_thread(self._server.stop)

    async def kill(self, down_s: float) -> None:
        """kill -9, and back from the append-only file."""
        async with self._lock:
            self._send(signal.SIGKILL, f"kill -9 redis-server, down for {down_s:g} s")
            await asyncio.sleep(down_s)
            await asyncio.to_thread(self._server.stop)
            await asyncio.to_thread(self._server.start)
            self._timeline.note("start", f"redis-server pid {self._server.pid}")

    async def stop_for(self, seconds: float) -> None:
        async with self._lock:
            self._send(signal.SIGSTOP, f"stop redis-server for {seconds:g} s")
            await asyncio.sleep(seconds)
            self._send(signal.SIGCONT, "redis-server goes on")

    async def kill_pubsub(self) -> None:
        async with self._lock:
            killed = await self.own.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            self._timeline.note("fault", f"kill {killed} pub/sub connections")

    def _send(self, number: signal.Signals, text: str) -> None:
        assert self._server.pid is not None
        self._timeline.note("fault", text)
        os.kill(self._server.pid, number)


@dataclass(slots=True)
class Stage:
    """Everything that runs. Roles are the first word of a process's name: api, scheduler, scripted, local."""

    home: Path
    timeline: Timeline
    redis: RedisUnderFire
    proxy: RedisProxy
    keeper: Keeper
    ports: tuple[int, ...]
    stormy: bool = False  # faults have begun

    def pick(self, roles: str, share: float) -> Managed | None:
        """One of the roles' processes that is alive and not stopped."""
        wanted = roles.split()
        able = [
            process
            for process in self.keeper.processes
            if process.name.split("-")[0] in wanted and process.alive and not process.stopped
        ]
        return able[int(share * len(able))] if able else None

    def hurt(self, process: Managed | None, number: signal.Signals) -> None:
        if process is None:
            self.timeline.note("fault", f"{number.name}: nobody there")
            return
        self.timeline.note("fault", f"{number.name} {process.name} pid {process.pid}")
        if number is signal.SIGKILL:  # a drain costs no job an attempt
            now = int(time.time() * 1000)
            process.hurts.append(Hurt(process.pid, now, now))
        process.send(number)

    async def stop_for(self, process: Managed | None, seconds: float) -> None:
        if process is None:
            self.timeline.note("fault", "stop: nobody there")
            return
        pid, began = process.pid, int(time.time() * 1000)
        self.timeline.note("fault", f"stop {process.name} pid {pid} for {seconds:g} s")
        process.send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.hurts.append(Hurt(pid, began, int(time.time() * 1000)))
        if process.alive and process.pid == pid:
            process.send(signal.SIGCONT)
            self.timeline.note("fault", f"{process.name} goes on")

    def cut(self) -> None:
        self.timeline.note("fault", "cut all connections")
        self.proxy.cut()

    def lose_reply(self) -> None:
        self.timeline.note("fault", "lose the next reply")
        self.proxy.lose_next_reply()

    async def partition(self, seconds: float) -> None:
        self.timeline.note("fault", f"no byte passes to or from Redis for {seconds:g} s")
        self.proxy.partition()
        await asyncio.sleep(seconds)
        self.proxy.heal()
        self.timeline.note("fault", "bytes pass again")

    def kill_engine(self) -> None:
        process = self.pick("local", 0.0)
        engine = None if process is None else process.engine()
        if process is None or engine is None:
            self.timeline.note("fault", "kill the engine: nobody there")
            return
        self.timeline.note("fault", f"SIGKILL engine pid {engine} of {process.name}")
        now = int(time.time() * 1000)
        process.hurts.append(Hurt(process.pid, now, now))
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of the service's database."""
        with contextlib.closing(sqlite3.connect(self.home / "spillway.db", timeout=10)) as database:
            return list(database.execute(query, values))

    def _check_starts(self) -> None:
        for process in self.keeper.processes:
            if not self.stormy and process.starts > _MOST_STARTS:
                raise AssertionError(f"{process.name} does not start; see {process.log}")

    async def wait_until_ready(self) -> None:
        """Every API answers, and every worker process of now serves."""
        give_up = time.monotonic() + _READY_S
        while time.monotonic() < give_up:
            self._check_starts()
            workers = {process.pid for process in self.keeper.processes if process.name.split("-")[0] in _WORKERS}
            with contextlib.suppress(Broken, Silent):
                seen = [await call(port, "GET", "/admin/workers") for port in self.ports]
                if all(status == 200 and workers <= {one["pid"] for one in body["data"]} for status, body in seen):
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"the stage is not ready within {_READY_S:g} s; see {self.home}/*.out")


@asynccontextmanager
async def open_stage(home: Path, timeline: Timeline, *, engine: bool = True) -> AsyncIterator[Stage]:
    """A running stage, ended with all its processes; `engine`: with a worker that runs the demo model."""
    redis = RedisUnderFire(home, timeline)
    await redis.start()
    reading, writing = os.pipe()
    try:
        async with redis_proxy(redis.url) as proxy:
            await asyncio.to_thread(migrate, Settings(home=home))
            ports = tuple(free_port() for _ in range(APIS))
            keeper = Keeper(_processes(home, proxy.url, ports, reading, engine), timeline)
            for process in keeper.processes:
                process.start()
            keeping = asyncio.create_task(keeper.run())
            stage = Stage(home, timeline, redis, proxy, keeper, ports)
            try:
                await stage.wait_until_ready()
                yield stage
            finally:
                await keeper.end()
                await keeping
    finally:
        for end in (reading, writing):
            os.close(end)
        await redis.stop()


def _processes(home: Path, redis_url: str, ports: tuple[int, ...], pipe: int, engine: bool) -> list[Managed]:
    settings = environment(
        SPILLWAY_HOME=str(home),
        SPILLWAY_REDIS_URL=redis_url,
        SPILLWAY_SHARD=SHARD,
        SPILLWAY_KEEPALIVE_S=str(KEEPALIVE_S),
        SPILLWAY_JOB_RETENTION_S=str(RETENTION_S),
        SPILLWAY_MAX_ROWS="8",
        SPILLWAY_ENGINE_THREADS="1",
        SPILLWAY_LOG_FORMAT="json",
        PYTHONFAULTHANDLER="1",
    )

    def managed(name: str, *command: str, **more: str) -> Managed:
        return Managed(name, command, {**settings, **more}, home / f"{name}.out", pipe)

    return [
        *(managed(f"api-{n}", "api.cli", "api", SPILLWAY_PORT=str(port)) for n, port in enumerate(ports, 1)),
        *(managed(f"scripted-{n}", "tests.chaos.scripted_worker") for n in range(1, SCRIPTED_WORKERS + 1)),
        *([managed("local-1", "workers", "local", "--model", "demo")] if engine else []),
        managed("scheduler", "api.cli", "scheduler"),
    ]


def seeded(seed: int, *parts: object) -> random.Random:
    """A generator of its own for each part of a run, so that what one draws does not shift another."""
    return random.Random("/".join(map(str, (seed, *parts))))
