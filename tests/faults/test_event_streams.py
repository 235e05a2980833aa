"""Clients that read slowly, not at all or in great numbers, an API that dies under them, and a Redis that forgets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api_stage import Stage, running_api, running_api_alone, running_redis, wait_until
from tests.integration.test_api_chat import chunks, forget_everything, text_of
from tests.integration.test_api_jobs import events
from tests.service import free_port

CHAT = "/v1/chat/completions"
WAITING_MODEL = "org/other-model"  # is listed, and nobody serves it


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("streams"), keepalive_s=0.2) as stage:
        yield stage


def _post(port: int, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return _send(port, head.encode() + data, receive_bytes)


def _send(port: int, request: bytes, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(30)
    client.connect(("127.0.0.1", port))
    client.sendall(request)
    return client


def _follow(port: int, job_id: str, after: str | None = None) -> socket.socket:
    cursor = "" if after is None else f"Last-Event-ID: {after}\r\n"
    head = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n{cursor}Connection: close\r\n\r\n"
    return _send(port, head.encode())


def _rest(client: socket.socket, seen: bytes = b"") -> bytes:
    """The body, its chunk sizes left out, read to the end of the connection; `seen` of it was read before."""
    raw = seen + b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return whole


def test_a_client_that_reads_nothing_for_a_while_gets_everything_and_holds_up_nobody(stage: Stage) -> None:
    large = [f"{number}-{'x' * 8000} " for number in range(600)]  # 4.8 MB: far more than all buffers on the way
    with _post(stage.settings.port, stage.chat({"say": large}, stream=True), receive_bytes=4096) as slow:
        wait_until(stage.live_jobs)
        (job_id,) = stage.live_jobs()
        wait_until(lambda: stage.job(job_id)["state"] == "succeeded")
        words = [f"w{number} " for number in range(50)]
        quick = stage.request("POST", CHAT, stage.chat({"say": words}, stream=True))
        assert text_of(chunks(quick.body)) == "".join(words)
        assert text_of(chunks(_rest(slow))) == "".join(large)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.soak)])
def test_idle_clients_cost_the_others_nothing_and_all_learn_of_the_end(stage: Stage, count: int) -> None:
    with ExitStack() as stack:
        asking = stack.enter_context(_post(stage.settings.port, stage.chat("x", stream=True, model=WAITING_MODEL)))
        wait_until(stage.live_jobs)
        (job_id,) = stage.live_jobs()
        idle = [stack.enter_context(_follow(stage.settings.port, job_id)) for _ in range(count)]
        for client in idle:
            assert client.recv(200, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        words = [f"w{number} " for number in range(50)]
        answer = stage.request("POST", CHAT, stage.chat({"say": words}, stream=True))
        assert text_of(chunks(answer.body)) == "".join(words)
        assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
        for client in idle:
            assert [event.name for event in events(_rest(client))] == ["failed"]
        assert b'"error"' in _rest(asking)


@contextmanager
def _api_process(stage: Stage, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Another replica over the same Redis and database, in a process that can be killed."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPILLWAY_")}
    chosen = stage.settings.model_copy(update={"port": port, "parent_pipe": None})
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "api"],
            env={**clean, **chosen.as_environment()},
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: _accepts(port), within_s=60)
        yield process, port
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_stream_goes_on_at_another_replica_when_the_api_is_killed(tmp_path: Path) -> None:
    words = [f"w{number} " for number in range(60)]
    with (
        running_redis(tmp_path / "redis") as url,
        running_api(url, tmp_path / "home") as stage,
        _api_process(stage, tmp_path / "api.log") as (process, port),
        _post(port, stage.chat({"say": words, "pause_s": 0.03}, stream=True)) as asking,
    ):
        wait_until(stage.live_jobs)
        (job_id,) = stage.live_jobs()
        with _follow(port, job_id) as following:
            seen = b""
            while b"w9 " not in seen:
                seen += following.recv(4096)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert b"w5 " in asking.recv(1 << 16)
        last = [line.removeprefix(b"id: ") for line in seen.splitlines() if line.startswith(b"id: ")][-1].decode()
        rest = events(stage.request("GET", f"/v1/jobs/{job_id}/events", Last_Event_ID=last).body)
        whole = events(stage.request("GET", f"/v1/jobs/{job_id}/events").body)
    assert rest == whole[[event.id for event in whole].index(last) + 1 :]
    said = [choice["text"] for event in whole if event.name == "delta" for choice in event.data["choices"]]
    assert "".join(said) == "".join(words) and whole[-1].name == "finished"


def test_flushall_in_mid_stream_ends_it_in_an_error_not_in_silence(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("flushed"), keepalive_s=0.2) as stage:
        body = stage.chat({"say": ["a "], "hold": True}, stream=True)
        with _post(stage.settings.port, body) as asking:
            seen = b""
            while b'"a "' not in seen:
                seen += asking.recv(4096)
            stage.call(forget_everything(stage))
            error = chunks(_rest(asking, seen))[-1]["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        wait_until(lambda: stage.request("POST", CHAT, stage.chat("again")).status == 200)  # and the service goes on
