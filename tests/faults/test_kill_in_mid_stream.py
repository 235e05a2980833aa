"""Workers and engines die with kill -9 while 32 clients stream: every stream ends as its undisturbed solo run did."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.service import Service, running, wait_until_workers

STREAMS, LINES = 32, 8  # each line is asked for by four clients at once, and heard alone once
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 7}


@dataclass
class Stream:
    """What one client saw."""

    job_id: str = ""
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("takeover") / "home", "--model", "demo", "--workers", "2") as service:
        wait_until_workers(service, 2)
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=service.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def _lines() -> list[str]:
    rng = random.Random(20)
    words = ["heron", "pebble", "lantern", "quartz", "willow", "copper", "ember", "fjord", "marble", "thistle"]
    return [" ".join(f"{rng.choice(words)} {rng.randrange(1000)}" for _ in range(10)) for _ in range(LINES)]


def _request(line: str, **sampling: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Repeat after me: {line}"}]
    # min_tokens keeps every stream long enough to be cut in its middle
    return {"model": "default", "messages": messages, "extra_body": {"min_tokens": 96}, "max_tokens": 160, **sampling}


async def _stream(client: AsyncOpenAI, request: dict[str, Any], seen: asyncio.Queue[Stream] | None = None) -> Stream:
    result = Stream()
    raw = await client.chat.completions.with_raw_response.create(**request, stream=True)
    result.job_id = raw.headers["spillway-job"]
    async for chunk in raw.parse():
        choice = chunk.choices[0]
        if choice.delta.content:
            result.pieces.append(choice.delta.content)
            if seen:
                seen.put_nowait(result)
        result.finish_reason = choice.finish_reason or result.finish_reason
    return result


async def _kill_when_all_run(service: Service, seen: asyncio.Queue[Stream], victim: str, pieces: int) -> None:
    """The worker of the stream that has said least: what workers tell of themselves may be a second old."""
    workers = {worker["id"]: worker for worker in await asyncio.to_thread(wait_until_workers, service, 2)}
    began = [await seen.get() for _ in range(pieces)]
    least = min(began, key=lambda stream: len(stream.pieces))
    job = await asyncio.to_thread(service.get, f"/v1/jobs/{least.job_id}")
    os.kill(workers[job["attempts"][-1]["worker"]][victim], signal.SIGKILL)


@pytest.mark.parametrize(
    ("victim", "sampling"),
    [
        pytest.param("engine_pid", SEEDED, id="engine-seeded"),
        pytest.param("pid", GREEDY, id="worker-greedy"),
        pytest.param("engine_pid", GREEDY, id="engine-greedy", marks=pytest.mark.soak),
        pytest.param("pid", SEEDED, id="worker-seeded", marks=pytest.mark.soak),
    ],
)
@pytest.mark.timeout(240)
async def test_streams_go_on_token_exact_when_a_process_is_killed(
    service: Service, client: AsyncOpenAI, victim: str, sampling: dict[str, Any]
) -> None:
    await asyncio.to_thread(wait_until_workers, service, 2)
    lines = [_request(line, **sampling) for line in _lines()]
    requests = lines * (STREAMS // LINES)
    alone = [await _stream(client, request) for request in lines] * (STREAMS // LINES)
    seen: asyncio.Queue[Stream] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_stream(client, request, seen)) for request in requests]
        group.create_task(_kill_when_all_run(service, seen, victim, pieces=STREAMS * 4))
    disturbed = [task.result() for task in tasks]
    assert [stream.text for stream in disturbed] == [stream.text for stream in alone]
    assert [stream.finish_reason for stream in disturbed] == [stream.finish_reason for stream in alone]
    attempts = [service.get(f"/v1/jobs/{stream.job_id}")["attempt"] for stream in disturbed]
    assert max(attempts) >= 2, "no stream was in flight on the killed process: the test proved nothing"


def test_no_log_line_holds_a_traceback_of_ours(service: Service) -> None:
    logs = Path(service.home / "logs")
    text = "".join(path.read_text(errors="replace") for path in logs.glob("*.log*"))
    assert "Traceback" not in text
