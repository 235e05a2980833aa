"""The real API on a real port over a real Redis, with scripted workers: the stage of the API's tests.

It runs on an event loop in a thread of its own, so that tests may use blocking clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import redis
import uvloop

from api import server
from api.main import create_app
from api.services import Services
from scheduler.db.schema import migrate
from scheduler.queue.connection import connect
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.keys import Keys
from scheduler.settings import Settings
from tests.scripted_worker import ScriptedWorker
from tests.service import free_port

T = TypeVar("T")


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """A redis-server of the caller's own; its URL. At the end every key has a TTL or is a named singleton."""
    embedded = EmbeddedRedis(folder)
    embedded.start()
    try:
        yield embedded.url
        with redis.Redis.from_url(embedded.url) as client:
            stay = [key.decode() for key in client.scan_iter(count=1000) if client.pttl(key) == -1]
        leaked = [key for key in stay if not Keys(key.partition("{")[2].partition("}")[0]).is_singleton(key)]
        assert not leaked, f"keys without TTL that are no named singleton: {leaked}"
    finally:
        embedded.stop()


@contextmanager
def running_api_alone(folder: Path, *, workers: int = 1, **settings: Any) -> Iterator[Stage]:
    """A stage on a Redis of its own."""
    with (
        running_redis(folder / "redis") as url,
        running_api(url, folder / "home", workers=workers, **settings) as stage,
    ):
        yield stage


def wait_until(condition: Callable[[], object], within_s: float = 15.0) -> None:
    """Poll until the condition holds."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"not within {within_s} s: {condition}"
        time.sleep(0.01)


@dataclass(slots=True)
class Answer:
    """One HTTP answer, read to its end; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


@dataclass(slots=True)
class Stage:
    """A running API."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    services: Services
    stop_server: Callable[[], None]
    workers: list[ScriptedWorker] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def stop(self) -> None:
        """Begin to stop, as on SIGTERM."""
        self.stop_server()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the stage's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=20)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.settings.port), timeout=20)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One call; header names are written with underscores."""
        return self.request_within(20, method, path, body, **headers)

    def request_within(self, timeout_s: float, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One call by a client that waits this long for each piece of the answer."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.settings.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, data, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    def chat(self, script: dict[str, Any] | str, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
        """A chat body whose worker follows `script`."""
        text = script if isinstance(script, str) else json.dumps(script)
        return {"model": "demo", "messages": [{"role": "user", "content": text}], "stream": stream, **fields}

    def job(self, job_id: str) -> dict[str, Any]:
        return self.request("GET", f"/v1/jobs/{job_id}").json

    def live_jobs(self) -> list[str]:
        return [job.id for job in self.call(self.services.queue.list_jobs(1000))]

    def claimed(self, job_id: str) -> bool:
        return any(job_id in worker.requests for worker in self.workers)

    def cancelled(self, job_id: str) -> bool:
        return any(job_id in worker.cancelled for worker in self.workers)


@contextmanager
def running_api(redis_url: str, home: Path, *, workers: int = 1, **settings: Any) -> Iterator[Stage]:
    """A stage with its own home and its own shard of the Redis; it stops as a child of `spillway up` does."""
    reading, writing = os.pipe()
    shard = f"t{time.monotonic_ns() % 10**12}"
    given: dict[str, Any] = {"shard": shard, "drain_s": 0, "redis_wait_s": 0, "parent_pipe": reading, **settings}
    chosen = Settings(home=home, redis_url=redis_url, port=free_port(), **given)
    chosen.home.mkdir(parents=True, exist_ok=True)
    migrate(chosen)
    ready: list[Stage | BaseException] = []
    stop = _closer(writing)
    thread = threading.Thread(target=_run, args=(chosen, workers, stop, ready), name="api-stage", daemon=True)
    thread.start()
    try:
        wait_until(lambda: ready)
        stage = ready[0]
        if isinstance(stage, BaseException):
            raise stage
        yield stage
    finally:
        stop()
        thread.join(timeout=30)
        assert not thread.is_alive(), f"the API did not stop: {_what_runs(ready)}"


def _what_runs(ready: list[Stage | BaseException]) -> str:
    lines = io.StringIO()
    for task in asyncio.all_tasks(ready[0].loop) if ready and isinstance(ready[0], Stage) else ():
        task.print_stack(file=lines)
    return lines.getvalue()


def _closer(descriptor: int) -> Callable[[], None]:
    left = [descriptor]

    def close() -> None:
        while left:
            os.close(left.pop())

    return close


def _run(settings: Settings, workers: int, stop: Callable[[], None], ready: list[Stage | BaseException]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(settings, workers, stop, ready))
        except BaseException as error:
            ready.append(error)


async def _serve(
    settings: Settings, workers: int, stop: Callable[[], None], ready: list[Stage | BaseException]
) -> None:
    app = create_app(settings)
    serving = asyncio.create_task(server.run(app, settings))
    while not serving.done() and not _accepts(settings.port):  # noqa: ASYNC110 - a port gives no event
        await asyncio.sleep(0.01)
    if serving.done():
        serving.result()
    stage = Stage(settings, asyncio.get_running_loop(), app.state.services, stop)
    async with _workers(stage, workers):
        ready.append(stage)
        await serving


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def _workers(stage: Stage, count: int) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        redis = connect(stage.settings, "command")
        stack.push_async_callback(redis.aclose)
        fleet = Fleet(redis, stage.settings)
        for position in range(count):
            queue = JobQueue(redis, stage.settings)  # of its own: it remembers its worker's claim in progress
            stack.push_async_callback(queue.aclose)
            worker = ScriptedWorker(queue, fleet, stage.settings, f"scripted-{position}")
            stage.workers.append(worker)
            await worker.publish()
            await stack.enter_async_context(worker.running())
        yield
