"""A primary, its replica and a Sentinel that watches them, all real processes with a password, for failover tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from scheduler.queue.redis_binary import find_redis_binary
from tests.api_stage import wait_until
from tests.service import free_port

SERVICE = "main"
PASSWORD = "s:cret/1"
_URL_PASSWORD = "s%3Acret%2F1"
_LOCAL = "127.0.0.1"


class SentinelStage:
    """`url` names a Sentinel that is not there before the one that is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.primary_port, self.replica_port, self.sentinel_port = free_port(), free_port(), free_port()
        self.url = f"sentinel://:{_URL_PASSWORD}@{_LOCAL}:{free_port()},{_LOCAL}:{self.sentinel_port}/{SERVICE}/0"

    def start(self) -> None:
        """Returns once the replica is in step and the Sentinel knows of it."""
        self._start_server(self.primary_port)
        self._start_server(self.replica_port, "--replicaof", _LOCAL, str(self.primary_port))
        wait_until(lambda: self._info(self.replica_port).get("master_link_status") == "up")
        self._start_sentinel()
        wait_until(lambda: self._sentinel_sees("num-slaves") == 1)

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(timeout=30)

    def kill_primary(self) -> None:
        process = self._processes[self.primary_port]
        process.kill()
        process.wait(timeout=30)

    def fail_over(self) -> None:
        """As an operator does it: the primary becomes a replica, and nobody dies."""
        wait_until(self._takes_the_order)  # refused until the Sentinel has looked at the replica twice

    def _takes_the_order(self) -> bool:
        with redis.Redis(_LOCAL, self.sentinel_port) as sentinel:
            try:
                sentinel.execute_command("SENTINEL", "FAILOVER", SERVICE)  # pyright: ignore
            except redis.ResponseError:
                return False
            return True

    def replica_is_primary(self) -> bool:
        return self._info(self.replica_port).get("role") == "master"

    def old_primary_is_replica(self) -> bool:
        return self._info(self.primary_port).get("role") == "slave"

    def demote_old_primary(self) -> None:
        """At once, as Sentinel does some seconds after a failover."""
        with redis.Redis(_LOCAL, self.primary_port, password=PASSWORD) as client:
            client.replicaof(_LOCAL, self.replica_port)  # pyright: ignore
            client.client_kill_filter(_type="pubsub")  # pyright: ignore

    def replica_has(self, key: str) -> bool:
        with redis.Redis(_LOCAL, self.replica_port, password=PASSWORD) as client:
            return client.exists(key) == 1

    def _start_server(self, port: int, *arguments: str) -> None:
        self._run(
            port, "--dir", str(self._folder), "--save", "", "--requirepass", PASSWORD, "--masterauth", PASSWORD,
            "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0", *arguments,
        )  # fmt: skip
        wait_until(lambda: self._info(port))

    def _start_sentinel(self) -> None:
        lines = [
            f"sentinel monitor {SERVICE} {_LOCAL} {self.primary_port} 1",
            f"sentinel auth-pass {SERVICE} {PASSWORD}",
            f"sentinel down-after-milliseconds {SERVICE} 500",
            f"sentinel failover-timeout {SERVICE} 2000",
        ]
        configuration = self._folder / "sentinel.conf"
        configuration.write_text("\n".join([*lines, ""]))
        self._run(self.sentinel_port, "--sentinel", configuration=configuration)

    def _run(self, port: int, *arguments: str, configuration: Path | None = None) -> None:
        command = [str(find_redis_binary().path), *([] if configuration is None else [str(configuration)])]
        command += ["--port", str(port), "--bind", _LOCAL, *arguments]
        self._processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _info(self, port: int) -> dict[str, object]:
        with redis.Redis(_LOCAL, port, password=PASSWORD) as client:
            try:
                return dict(client.info("replication"))  # pyright: ignore
            except redis.RedisError:
                return {}

    def _sentinel_sees(self, name: str) -> object:
        with redis.Redis(_LOCAL, self.sentinel_port) as client:
            try:
                return client.sentinel_masters()[SERVICE][name]  # pyright: ignore
            except redis.RedisError:
                return None


@contextmanager
def sentinel_stage(folder: Path) -> Iterator[SentinelStage]:
    stage = SentinelStage(folder)
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()
