"""redis-server is killed in mid-stream and comes back from its append-only file: worker and client go on exactly."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as sync_redis

from scheduler.lifecycle import Lifecycle
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.redis_binary import find_redis_binary
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import SHARD, wait_until
from tests.tiny_model import write_tiny_model
from tests.worker_stage import Client, Workers


class RedisServer:
    """A redis-server on a fixed socket that may be killed and started again over the same data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder), "--save", ""]
        command = [str(find_redis_binary().path), *options, "--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=30)

    def answers(self) -> bool:
        with sync_redis.Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except sync_redis.RedisError:
                return False


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


async def test_a_stream_goes_on_exactly_when_redis_is_killed_and_restarted(server: RedisServer, tmp_path: Path) -> None:
    await wait_until(server.answers)
    model_path = write_tiny_model(tmp_path / "tiny", context_tokens=2048)
    settings = Settings(home=tmp_path / "home", redis_url=server.url, shard=SHARD, compile=False, system_blas=False)
    workers = Workers(settings, model_path, tmp_path)
    redis, bus = connect(settings, "command"), TokenBus(settings)
    fleet = Fleet(redis, settings)
    client = Client(Lifecycle(JobQueue(redis, settings), fleet, settings), bus, settings)
    await bus.start()
    try:
        await workers.ensure(1, fleet)
        undisturbed = await client.answer("carry on", max_tokens=1500)
        async with client.stream("carry on", max_tokens=1500) as (stream, following):
            await wait_until(lambda: stream.token_count > 50)
            server.kill()
            server.start()
            await following
        assert isinstance(stream.end, Finished)
        assert (stream.tokens, stream.text) == (undisturbed.tokens, undisturbed.text)
    finally:
        workers.stop()
        await bus.close()
        await redis.aclose()
