"""The embedded server: starts anywhere, keeps its data, and leaves nothing behind however its owner ends."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest
import redis as sync_redis

from scheduler.errors import StartupError
from scheduler.queue import redis_binary
from scheduler.queue.connection import redis_url
from scheduler.queue.embedded import EmbeddedRedis
from scheduler.settings import Settings

OWNER = """
import sys, time
from pathlib import Path
from scheduler.queue.embedded import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1]))
server.start()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sw-"))
    yield folder
    shutil.rmtree(folder)


def eventually(look: Callable[[], bool], within_s: float = 20.0) -> None:
    give_up = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.02)


def call(url: str, *words: str) -> object:
    with sync_redis.Redis.from_url(url) as client:
        return client.execute_command(*words)


def start_owner(home: Path) -> tuple[subprocess.Popen[str], int, str]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, url = owner.stdout.readline().split()
    return owner, int(pid), url


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_it_starts_private_and_durable_and_stops_without_a_trace(home: Path) -> None:
    server = EmbeddedRedis(home)
    server.start()
    assert server.alive and server.pid is not None and psutil.pid_exists(server.pid)
    with sync_redis.Redis.from_url(server.url) as client:
        config = cast("dict[str, str]", client.config_get("*"))
    assert (config["port"], config["appendonly"], config["appendfsync"]) == ("0", "yes", "everysec")
    assert (config["save"], config["maxmemory-policy"]) == ("", "noeviction")
    assert int(config["maxmemory"]) > 0
    assert stat.S_IMODE((home / "redis").stat().st_mode) == 0o700
    assert (home / "logs" / "redis.log").is_file()

    pid = server.pid
    server.stop()
    assert not psutil.pid_exists(pid)
    assert not server.alive
    assert not (home / "redis" / "redis.sock").exists() and not (home / "redis" / "embedded.json").exists()
    server.stop()


def test_what_was_written_is_there_after_a_restart(home: Path) -> None:
    server = EmbeddedRedis(home)
    server.start()
    call(server.url, "SET", "kept", "yes")
    server.stop()
    server.start()
    assert call(server.url, "GET", "kept") == b"yes"
    server.stop()


def test_other_processes_of_the_home_find_it(home: Path) -> None:
    server = EmbeddedRedis(home)
    server.start()
    assert redis_url(Settings(home=home, redis_url=None)) == server.url
    server.stop()


def test_a_long_home_gets_a_short_socket_that_is_removed(home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    server = EmbeddedRedis(deep)
    server.start()
    folder = Path(server.url.removeprefix("unix://")).parent
    assert folder != deep / "redis" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert call(server.url, "PING") in (True, b"PONG")
    server.stop()
    assert not folder.exists()


def test_a_home_with_blanks_and_unicode_works(home: Path) -> None:
    server = EmbeddedRedis(home / "my büro %41 files")
    server.start()
    assert call(server.url, "PING") in (True, b"PONG")
    server.stop()


def test_kill_9_of_the_owner_ends_the_server_and_the_next_start_has_the_data(home: Path) -> None:
    owner, pid, url = start_owner(home)
    call(url, "SET", "kept", "yes")
    kill(owner)
    eventually(lambda: not psutil.pid_exists(pid))
    eventually(lambda: not (home / "redis" / "embedded.json").exists())
    assert not (home / "redis" / "redis.sock").exists()

    server = EmbeddedRedis(home)
    server.start()
    assert call(server.url, "GET", "kept") == b"yes"
    server.stop()


def test_an_immediate_restart_waits_for_the_predecessor(home: Path) -> None:
    owner, pid, _ = start_owner(home)
    kill(owner)
    server = EmbeddedRedis(home)
    server.start()
    assert server.pid != pid and not psutil.pid_exists(pid)
    server.stop()


def test_an_orphan_whose_guard_was_killed_too_is_ended_by_the_next_start(home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    owner, pid, url = start_owner(deep)
    folder = Path(url.removeprefix("unix://")).parent
    call(url, "SET", "kept", "yes")
    guard = psutil.Process(pid).ppid()
    os.kill(guard, signal.SIGKILL)
    kill(owner)
    assert psutil.pid_exists(pid)

    server = EmbeddedRedis(deep)
    server.start()
    assert call(server.url, "GET", "kept") == b"yes"
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert not folder.exists()
    server.stop()


def test_a_ctrl_c_in_the_terminal_does_not_reach_the_server(home: Path) -> None:
    server = EmbeddedRedis(home)
    server.start()
    assert server.pid is not None
    assert os.getsid(server.pid) != os.getsid(0)
    server.stop()


def test_broken_data_is_one_clear_line(home: Path) -> None:
    (home / "redis").mkdir()
    (home / "redis" / "appendonly.aof").write_bytes(b"this is no append-only file\n" * 50)
    binary = redis_binary.find_redis_binary()
    if binary.version >= (7,):
        pytest.skip("Redis 7 keeps its append-only files elsewhere")
    server = EmbeddedRedis(home)
    with pytest.raises(StartupError) as refused:
        server.start()
    assert "redis.log" in refused.value.message and "\n" not in refused.value.message
    assert not server.alive and not (home / "redis" / "redis.sock").exists()


def test_data_of_a_newer_server_is_not_silently_left_out(home: Path) -> None:
    if redis_binary.find_redis_binary().version >= (7,):
        pytest.skip("needs a server below 7")
    (home / "redis" / "appendonlydir").mkdir(parents=True)
    with pytest.raises(StartupError, match="newer"):
        EmbeddedRedis(home).start()


def test_without_any_server_the_line_says_what_to_install() -> None:
    with pytest.raises(StartupError, match=r"Install one .*SPILLWAY_REDIS_URL") as refused:
        redis_binary.find_redis_binary([])
    assert "\n" not in refused.value.message


def test_a_server_that_is_too_old_or_does_not_run_is_passed_over(tmp_path: Path) -> None:
    old, broken = tmp_path / "old-server", tmp_path / "broken-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=0 malloc=libc bits=64'\n")
    broken.write_text("no program")
    for path in (old, broken):
        path.chmod(0o755)
    unfit = [(broken, "PATH"), (old, "PATH"), (tmp_path / "missing", "wheel")]
    with pytest.raises(StartupError, match=r"5\.0\.7, too old"):
        redis_binary.find_redis_binary(unfit)
    found = redis_binary.find_redis_binary([*unfit, *redis_binary.usual_places()])
    assert found.version >= (6, 2)


@pytest.mark.parametrize("depth", [0, 60])
def test_after_a_crash_of_the_server_a_start_brings_it_back_at_the_same_url(home: Path, depth: int) -> None:
    server = EmbeddedRedis(home / ("d" * depth) / ("e" * depth))
    server.start()
    url = server.url
    call(url, "SET", "kept", "yes")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not server.alive)
    server.start()
    assert server.url == url and call(url, "GET", "kept") == b"yes"
    server.stop()


def test_a_server_whose_guard_was_killed_is_ended_before_another_takes_its_data(home: Path) -> None:
    """As `up` does when it sees the guard dead: two servers on one append-only file would ruin it."""
    server = EmbeddedRedis(home)
    server.start()
    old = psutil.Process(server.pid)
    try:
        call(server.url, "SET", "k", "kept")
        guard = old.parent()
        assert guard is not None
        guard.kill()
        eventually(lambda: not server.alive)
        server.stop()
        eventually(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, within_s=1)
        server.start()
        assert call(server.url, "GET", "k") == b"kept"
    finally:
        server.stop()
