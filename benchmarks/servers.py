"""Starts the servers that a benchmark compares, on the same model and the same BLAS, and ends them again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stack_peers import vllm_mlx_python

_OURS = (
    "API, scheduler, worker, engine and redis-server each a process; every token is logged in Redis (AOF "
    "everysec) and published, jobs are leased, fenced and go on elsewhere, outcomes are written to SQL"
)
OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its label in the report, its port and the model name that it answers to; what it promises."""

    label: str
    port: int
    model: str
    promises: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def blas_environment() -> dict[str, str]:
    """The variables that give a peer the BLAS that Spillway gives its engine: Debian's OpenBLAS where there is one."""
    return {"LD_PRELOAD": str(OPENBLAS)} if OPENBLAS.exists() else {}


@contextlib.contextmanager
def spillway(model: str, *arguments: str, ready_within_s: float = 180.0) -> Iterator[Server]:
    """`spillway up` with an empty home of its own."""
    port, home = free_port(), tempfile.mkdtemp(prefix="spillway-bench-")
    command = [sys.executable, "-m", "api.cli", "up", "--port", str(port), "--home", home, "--model", model, *arguments]
    environment = {**os.environ, "SPILLWAY_LOG_LEVEL": "warning"}
    try:
        with _running(command, environment, f"http://127.0.0.1:{port}/readyz", ready_within_s):
            yield Server("spillway", port, "default", _OURS)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def mlx_lm_server(model_path: str, ready_within_s: float = 120.0) -> Iterator[Server]:
    """mlx-lm's own server with its default concurrency (32 rows of decode)."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", model_path, "--port", str(port)]
    environment = {**os.environ, **blas_environment(), "HF_HUB_OFFLINE": "1"}
    command += ["--log-level", "WARNING"]
    with _running(command, environment, f"http://127.0.0.1:{port}/v1/models", ready_within_s):
        yield Server("mlx_lm.server", port, model_path, "one process; an answer ends with its connection or process")


@contextlib.contextmanager
def vllm_mlx(model_path: str, ready_within_s: float = 120.0) -> Iterator[Server]:
    """vllm-mlx as it comes, with continuous batching; it saves its prefix cache at its end, in a home of its own."""
    port, home = free_port(), tempfile.mkdtemp(prefix="spillway-bench-")
    command = [str(Path(vllm_mlx_python()).parent / "vllm-mlx"), "serve", model_path]
    command += ["--continuous-batching", "--offline", "--port", str(port)]
    environment = {**os.environ, **blas_environment(), "HF_HUB_OFFLINE": "1", "HOME": home}
    try:
        with _running(command, environment, f"http://127.0.0.1:{port}/v1/models", ready_within_s):
            yield Server("vllm-mlx", port, model_path, "one process; an answer ends with its connection or process")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], url: str, within_s: float) -> Iterator[None]:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_answers(process, url, within_s)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_answers(process: subprocess.Popen[bytes], url: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"server ended with {process.returncode} before it answered {url}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer within {within_s} s")
