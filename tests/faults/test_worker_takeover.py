"""Two workers; one of them or its engine dies, hangs or loses its lease in mid-stream: every stream goes on exactly.

All on the wheel's own BLAS, whose products do not depend on how many rows there are.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from scheduler.lifecycle import Lifecycle
from scheduler.queue.fleet import Fleet, WorkerView
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Finished
from tests.conftest import SHARD, wait_until
from tests.tiny_model import write_tiny_model
from tests.worker_stage import Client, Stream, Workers

TOKENS = 1000
HANG_S = 3.0


@pytest.fixture(scope="module")
def workers(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("workers")
    model_path = write_tiny_model(folder / "tiny", context_tokens=2048)
    settings = Settings(
        home=folder / "home",
        redis_url=redis_url,
        shard=SHARD,
        max_rows=16,
        compile=False,
        system_blas=False,
        engine_hang_s=HANG_S,
    )
    workers = Workers(settings, model_path, folder)
    yield workers
    workers.stop()


@pytest.fixture
async def client(lifecycle: Lifecycle, settings: Settings) -> AsyncIterator[Client]:
    bus = TokenBus(settings)
    await bus.start()
    yield Client(lifecycle, bus, settings)
    await bus.close()


@dataclass(frozen=True)
class Ask:
    """A request whose answer is the same however often it is asked."""

    text: str
    n: int
    sampling: dict[str, Any]


ASKS = [
    Ask("one", 1, {}),
    Ask("two", 2, {"temperature": 0.9, "seed": 3}),
    Ask("three", 1, {"temperature": 1.2, "seed": 4, "top_p": 0.8}),
    Ask("four 水 🌊", 1, {"temperature": 0.7, "seed": 5, "top_k": 20, "repetition_penalty": 1.3}),
    Ask("five", 1, {"stop": ("\x01never\x02",), "presence_penalty": 0.5}),
    Ask("six", 1, {"temperature": 0.9, "seed": 6}),
]


@pytest.fixture(scope="module")
def remembered() -> list[Stream]:
    return []


@pytest.fixture
async def expected(workers: Workers, client: Client, fleet: Fleet, remembered: list[Stream]) -> list[Stream]:
    """Two workers run, and this is what they answer when nothing disturbs them, asked once for all tests."""
    await workers.ensure(2, fleet)
    if not remembered:
        answers = (client.answer(ask.text, n=ask.n, max_tokens=TOKENS, **ask.sampling) for ask in ASKS)
        remembered += await asyncio.gather(*answers)
    return remembered


async def _with_a_disturbance(client: Client, disturb: Any, *, after_tokens: int = 20) -> list[Stream]:
    """All requests at once; when each has said something, `disturb` happens; then all run to their end."""
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(client.stream(ask.text, n=ask.n, max_tokens=TOKENS, **ask.sampling))
            for ask in ASKS
        ]
        streams = [stream for stream, _ in running]
        await wait_until(lambda: all(stream.token_count >= after_tokens for stream in streams), within_s=60)
        await disturb(streams)
        await asyncio.gather(*(following for _, following in running))
    return streams


def _assert_same(disturbed: list[Stream], undisturbed: list[Stream]) -> None:
    for seen, expected in zip(disturbed, undisturbed, strict=True):
        assert isinstance(seen.end, Finished), seen.end
        assert seen.tokens == expected.tokens
        assert seen.text == expected.text
        assert seen.reasons == expected.reasons
        assert isinstance(expected.end, Finished)
        assert seen.end.usage.completion_tokens == expected.end.usage.completion_tokens


def _goes_on_without(worker: WorkerView, stream: Stream) -> bool:
    return stream.attempts[-1] != worker.id


async def _busiest(fleet: Fleet, streams: list[Stream]) -> WorkerView:
    """The listed worker that runs most of the streams."""
    views = await fleet.workers()
    return max(views, key=lambda view: sum(stream.attempts[-1] == view.id for stream in streams))


async def test_every_stream_goes_on_exactly_when_an_engine_is_killed(
    client: Client, fleet: Fleet, expected: list[Stream]
) -> None:
    async def kill_engine(streams: list[Stream]) -> None:
        victim = await _busiest(fleet, streams)
        assert victim.engine_pid is not None
        os.kill(victim.engine_pid, signal.SIGKILL)

    disturbed = await _with_a_disturbance(client, kill_engine)
    _assert_same(disturbed, expected)
    assert any(len(stream.attempts) > 1 for stream in disturbed)


async def test_every_stream_goes_on_exactly_when_a_worker_is_killed(
    workers: Workers, client: Client, fleet: Fleet, expected: list[Stream]
) -> None:
    engines: list[psutil.Process] = []

    async def kill_worker(streams: list[Stream]) -> None:
        victim = await _busiest(fleet, streams)
        engines.append(psutil.Process(victim.engine_pid))
        workers.of(victim).kill()

    disturbed = await _with_a_disturbance(client, kill_worker)
    _assert_same(disturbed, expected)
    assert any(len(stream.attempts) > 1 for stream in disturbed)
    await wait_until(lambda: not engines[0].is_running())


async def test_a_hung_engine_is_killed_and_its_jobs_move_on(
    client: Client, fleet: Fleet, expected: list[Stream]
) -> None:
    async def stop_engine(streams: list[Stream]) -> None:
        victim = await _busiest(fleet, streams)
        assert victim.engine_pid is not None
        os.kill(victim.engine_pid, signal.SIGSTOP)

    disturbed = await _with_a_disturbance(client, stop_engine)
    _assert_same(disturbed, expected)
    assert any(len(stream.attempts) > 1 for stream in disturbed)


async def test_a_worker_that_slept_past_its_lease_writes_nothing_more(
    client: Client, fleet: Fleet, expected: list[Stream]
) -> None:
    """It wakes up as a zombie with tokens in hand: they are fenced, and it works again."""
    slept: list[int] = []

    async def sleep_past_lease(streams: list[Stream]) -> None:
        victim = await _busiest(fleet, streams)
        slept.append(victim.pid)
        os.kill(victim.pid, signal.SIGSTOP)
        # What it had already sent may still end a stream; every other one moves on to the worker that is awake.
        try:
            await wait_until(lambda: all(stream.end or _goes_on_without(victim, stream) for stream in streams), 60)
        finally:
            os.kill(victim.pid, signal.SIGCONT)

    disturbed = await _with_a_disturbance(client, sleep_past_lease)
    _assert_same(disturbed, expected)
    assert any(len(stream.attempts) > 1 for stream in disturbed)

    async def works_again() -> bool:
        """Under a new id, or its old one where it claimed before its heartbeat told it that its lease was lost."""
        return f"-{slept[0]}-" in (await client.answer("again", max_tokens=4)).attempts[-1]

    await wait_until(works_again, within_s=60)
