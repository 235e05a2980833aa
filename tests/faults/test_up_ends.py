"""How `spillway up` ends: stopped, killed, or unable to start, it leaves nothing; and the next start finds its way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from tests.service import Service, alive, environment, free_port, launch, stop, wait_until_ready
from tests.tiny_model import write_tiny_model

QUIET = {"SPILLWAY_COMPILE": "false"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", context_tokens=4096))


def until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def family(service: Service) -> dict[int, str]:
    """Every process below this `up`: api, scheduler, worker, engine, redis and its guard."""
    found: dict[int, str] = {}
    for child in psutil.Process(service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = " ".join(child.cmdline())
    return found


def pid_of(service: Service, name: str) -> int:
    processes = json.loads((service.home / "run.json").read_text())["processes"]
    return next(process["pid"] for process in processes if process["name"] == name)


def assert_nothing_left(home: Path, pids: dict[int, str]) -> None:
    assert {pid: what for pid, what in pids.items() if alive(pid)} == {}
    left = [path for path in home.rglob("*") if path.is_socket() or path.is_fifo()]
    assert left == []
    assert not (home / "run.json").exists()
    assert list(home.glob("tmp/*")) == []


def test_killed_then_started_again_then_stopped(tmp_path: Path, model: str) -> None:
    """One home through kill -9 of `up`, crashes of single parts, and a clean stop."""
    home, port = tmp_path / "home", free_port()
    first = launch(home, port, "--model", model, **QUIET)
    wait_until_ready(first)
    orphans = family(first)
    assert any("redis-server" in what for what in orphans.values())
    assert any("workers.engine" in what for what in orphans.values())
    first.process.kill()
    first.process.wait()
    until(lambda: not any(alive(pid) for pid in orphans))

    second = launch(home, port, "--model", model, **QUIET, SPILLWAY_DRAIN_S="60")
    try:
        wait_until_ready(second)
        assert list(home.rglob("*.sock")) != []
        _survives_the_death_of_parts(second)
        members = family(second)
        _ends_the_running_answer(second)
    finally:
        assert stop(second) == 0
    assert_nothing_left(home, members)


def _survives_the_death_of_parts(service: Service) -> None:
    scheduler = pid_of(service, "scheduler")
    redis = next(
        pid for pid, what in family(service).items() if what.endswith("redis-server") or "redis-server unix" in what
    )
    psutil.Process(scheduler).kill()
    psutil.Process(redis).kill()
    until(lambda: pid_of(service, "scheduler") != scheduler)
    until(lambda: any("redis-server" in what for pid, what in family(service).items() if pid != redis))
    wait_until_ready(service)
    note = json.loads((service.home / "run.json").read_text())
    assert {process["name"]: process["restarts"] for process in note["processes"]}["scheduler"] >= 1


def _ends_the_running_answer(service: Service) -> None:
    tokens = 1500
    with OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Go on"}],
            max_completion_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        first = next(iter(stream))
        service.process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens


def test_an_api_open_to_others_needs_a_key_first(tmp_path: Path, model: str) -> None:
    service = launch(tmp_path / "home", free_port(), "--model", model, "--host", "0.0.0.0", **QUIET)
    assert service.process.wait(timeout=60) == 1
    plain = [line for line in service.said().splitlines() if not line.startswith("{")]
    assert len(plain) == 1
    assert "spillway keys create" in plain[0]


def test_a_model_that_is_not_there_ends_the_start_with_one_line(tmp_path: Path) -> None:
    service = launch(tmp_path / "home", free_port(), "--model", "/no/such/model", **QUIET)
    assert service.process.wait(timeout=60) == 1
    plain = [line for line in service.said().splitlines() if not line.startswith("{")]
    assert len(plain) == 1
    assert "/no/such/model" in plain[0]
    assert_nothing_left(tmp_path / "home", {})


def test_ctrl_c_during_the_start_leaves_nothing(tmp_path: Path, model: str) -> None:
    service = launch(tmp_path / "home", free_port(), "--model", model, **QUIET)
    until(lambda: "worker" in service.said() or service.process.poll() is not None)
    members = family(service)
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(timeout=60) == 0
    assert_nothing_left(tmp_path / "home", members)


def test_a_closed_terminal_ends_it_cleanly(tmp_path: Path, model: str) -> None:
    """On a terminal the start is shown part by part; closing the window is a stop like any other."""
    home, port = tmp_path / "home", free_port()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "api.cli", "up", "--home", str(home), "--port", str(port), "--model", model]
    process = subprocess.Popen(
        command,
        env=environment(**QUIET, TERM="xterm", COLUMNS="100", LINES="30"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that the closed window becomes a SIGHUP
    )
    os.close(theirs)
    shown = ""
    while not ("redis" in shown and "worker-1" in shown):
        assert select.select([ours], [], [], 30.0)[0], shown
        shown += os.read(ours, 65536).decode("utf-8", "replace")
    members = family(Service(process, port, home, tmp_path))
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert_nothing_left(home, members)
    assert "error" not in {json.loads(line)["level"] for line in (home / "logs" / "up.log").read_text().splitlines()}


def test_a_start_right_after_a_kill_recovers_and_spillway_stop_waits_for_the_end(tmp_path: Path, model: str) -> None:
    home, port = tmp_path / "home", free_port()
    killed = launch(home, port, "--model", model, **QUIET)
    until(lambda: (home / "run.json").exists() or killed.process.poll() is not None)
    orphans = family(killed)
    killed.process.kill()
    killed.process.wait()
    service = launch(home, port, "--model", model, **QUIET)
    wait_until_ready(service)
    assert {pid: what for pid, what in orphans.items() if alive(pid)} == {}
    members = family(service) | {service.process.pid: "up"}
    command = [sys.executable, "-m", "api.cli", "stop", "--home", str(home)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    service.process.wait(timeout=5)
    assert (done.returncode, done.stdout) == (0, f"Stopped (pid {service.process.pid}).\n"), done.stderr
    assert {pid: what for pid, what in members.items() if alive(pid)} == {}
