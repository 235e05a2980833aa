"""Runs the product as a user does, `spillway up` in a home of its own, for tests that need the whole of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, slots=True)
class Service:
    """A running `spillway up`."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def workers(self) -> list[dict[str, Any]]:
        return self.get("/admin/workers")["data"]

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def environment(**settings: str) -> dict[str, str]:
    """The environment of a service under test, on the wheel's BLAS: its products do not depend on the batch size."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPILLWAY_")}
    return {**clean, "SPILLWAY_SYSTEM_BLAS": "false", **settings}


def launch(home: Path, port: int, *arguments: str, **settings: str) -> Service:
    """Start `spillway up` and return at once; its output goes to a file beside the home."""
    output = home.parent / f"{home.name}-{port}.out"
    command = [sys.executable, "-m", "api.cli", "up", "--home", str(home), "--port", str(port), *arguments]
    with output.open("ab") as sink:
        process = subprocess.Popen(
            command, env=environment(**settings), stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
    return Service(process, port, home, output)


def wait_until_ready(service: Service, within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if service.process.poll() is not None:
            raise AssertionError(f"spillway up ended with {service.process.returncode}:\n{service.said()}")
        with contextlib.suppress(OSError), urllib.request.urlopen(service.url + "/readyz", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready within {within_s} s:\n{service.said()}")


def wait_until_workers(service: Service, count: int, within_s: float = 60.0) -> list[dict[str, Any]]:
    """All `count` workers have a live engine; one that was killed may stay listed until its entry expires."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = [worker for worker in service.workers() if alive(worker["pid"]) and alive(worker["engine_pid"])]
        if len(found) >= count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"fewer than {count} workers within {within_s} s:\n{service.said()}")


def alive(pid: int | None) -> bool:
    """Whether this process runs (a zombie counts as ended)."""
    return pid is not None and psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def stop(service: Service, within_s: float = 40.0) -> int:
    """SIGTERM and wait; the exit status."""
    if service.process.poll() is None:
        service.process.send_signal(signal.SIGTERM)
    try:
        return service.process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        service.process.kill()
        service.process.wait()
        raise AssertionError(f"did not stop within {within_s} s:\n{service.said()}") from None


@contextlib.contextmanager
def running(home: Path, *arguments: str, **settings: str) -> Iterator[Service]:
    """A ready service, stopped at the end."""
    service = launch(home, free_port(), *arguments, **settings)
    try:
        wait_until_ready(service)
        yield service
    finally:
        stop(service)
