"""A worker process from its start to its end: it serves, drains, hands back, and says why when it cannot run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest

from scheduler.job import JobState
from scheduler.lifecycle import Lifecycle
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Failed, Finished
from tests.conftest import SHARD, wait_until
from tests.tiny_model import write_tiny_model
from tests.worker_stage import Client, Workers

ENDLESS = {"max_tokens": 3900}


@pytest.fixture(scope="module")
def workers(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("workers")
    model_path = write_tiny_model(folder / "tiny", context_tokens=4096)
    settings = Settings(
        home=folder / "home", redis_url=redis_url, shard=SHARD, max_rows=8, compile=False, system_blas=False, drain_s=30
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


async def test_a_job_streams_to_its_end(workers: Workers, client: Client, fleet: Fleet, queue: JobQueue) -> None:
    (listed,) = await workers.ensure(1, fleet)
    seen = await client.answer("hello", n=2, temperature=0.8, seed=5)
    assert isinstance(seen.end, Finished)
    assert {index: len(ids) for index, ids in seen.tokens.items()} == {0: 64, 1: 64}
    assert seen.tokens[0] != seen.tokens[1] and all(seen.text.values())
    assert seen.reasons == {0: "length", 1: "length"} and seen.attempts == [listed.id]
    view = await queue.view(seen.job_id)
    assert view is not None and view.state is JobState.SUCCEEDED and view.first_token_ms is not None
    assert view.usage == seen.end.usage and seen.end.usage.completion_tokens == 128
    assert listed.engine_pid != listed.pid and listed.models == ("tiny",) and listed.max_rows == 8
    (card,) = await fleet.models()
    assert (card.id, card.context_tokens, card.max_rows) == ("tiny", 4096, 8)


async def test_what_the_worker_refuses_ends_the_job_at_once(workers: Workers, client: Client, fleet: Fleet) -> None:
    await workers.ensure(1, fleet)
    seen = await client.answer("1" * 5000)
    assert isinstance(seen.end, Failed) and seen.end.code == "context_length_exceeded"
    assert "4096 tokens" in seen.end.message and len(seen.attempts) == 1


async def test_more_jobs_than_rows_all_get_their_answer(workers: Workers, client: Client, fleet: Fleet) -> None:
    await workers.ensure(1, fleet)
    seen = await asyncio.gather(*(client.answer(f"job {index}", max_tokens=40) for index in range(24)))
    assert all(isinstance(one.end, Finished) and len(one.tokens[0]) == 40 for one in seen)


async def test_a_cancelled_job_stops_with_the_next_round_trip(
    workers: Workers, client: Client, fleet: Fleet, lifecycle: Lifecycle, queue: JobQueue
) -> None:
    await workers.ensure(1, fleet)
    async with client.stream("endless", **ENDLESS) as (stream, following):
        await wait_until(lambda: stream.token_count > 20)
        assert await lifecycle.cancel(stream.job_id) is JobState.RUNNING
        known = await queue.read_events(stream.job_id, None, 10_000)
        await following
    assert isinstance(stream.end, Failed) and stream.end.code == "cancelled"
    log = await queue.read_events(stream.job_id, None, 10_000)
    assert len(log) - len(known) <= 2, "at most one more delta, then the end"
    assert stream.token_count < 3900

    async def idle() -> bool:
        return all(view.busy_rows == 0 for view in await fleet.workers())

    await wait_until(idle)


async def test_sigterm_lets_running_jobs_finish(workers: Workers, client: Client, fleet: Fleet) -> None:
    (listed,) = await workers.ensure(1, fleet)
    worker = workers.of(listed)
    engine = psutil.Process(listed.engine_pid)
    async with client.stream("finish me", max_tokens=800) as (stream, following):
        await wait_until(lambda: stream.token_count > 0)
        worker.signal(signal.SIGTERM)
        await following
    assert isinstance(stream.end, Finished) and len(stream.tokens[0]) == 800 and len(stream.attempts) == 1
    assert await worker.exit_status() == 0
    assert not engine.is_running()
    assert await fleet.workers() == []
    assert list((workers.settings.home / "tmp").iterdir()) == []


async def test_a_second_signal_hands_jobs_back_and_another_worker_goes_on(
    workers: Workers, client: Client, fleet: Fleet
) -> None:
    (listed,) = await workers.ensure(1, fleet)
    assert listed.engine_pid is not None
    undisturbed = await client.answer("go on", max_tokens=600)
    async with client.stream("go on", max_tokens=600) as (stream, following):
        await wait_until(lambda: stream.token_count > 50)
        os.kill(listed.engine_pid, signal.SIGSTOP)  # so that it cannot be done before the signals arrive
        worker = workers.of(listed)
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGINT)
        assert await worker.exit_status() == 0
        assert stream.end is None
        await workers.ensure(1, fleet)
        await following
    assert len(stream.attempts) == 2
    assert (stream.tokens, stream.text) == (undisturbed.tokens, undisturbed.text)
    assert isinstance(stream.end, Finished) and stream.end.usage.completion_tokens == 600


async def test_the_death_of_the_parent_hands_jobs_back(workers: Workers, client: Client, fleet: Fleet) -> None:
    await workers.ensure(0, fleet)
    reading, writing = os.pipe()
    worker = workers.start(pass_fds=(reading,), parent_pipe=reading)
    os.close(reading)
    await workers.listed(fleet)
    async with client.stream("orphan", **ENDLESS) as (stream, _):
        await wait_until(lambda: stream.token_count > 20)
        os.close(writing)
        assert await worker.exit_status() == 0
        assert stream.end is None
        assert await client.lifecycle.cancel(stream.job_id) is JobState.CANCELLED, "it was queued again"


async def test_one_process_serves_several_models_in_their_order(workers: Workers, client: Client, fleet: Fleet) -> None:
    await workers.ensure(0, fleet)
    other = write_tiny_model(workers.model_path.parent / "other", context_tokens=256)
    worker = workers.start(str(other), str(workers.model_path))

    async def both() -> bool:
        return len(await fleet.workers()) == 2

    await wait_until(both, within_s=90)
    assert [(card.id, card.position) for card in await fleet.models()] == [("other", 0), ("tiny", 1)]
    assert len({view.engine_pid for view in await fleet.workers()}) == 2
    assert isinstance((await client.answer("to the second")).end, Finished)
    worker.kill()


async def test_a_model_that_fails_ends_the_process_but_first_the_other_hands_its_jobs_back(
    workers: Workers, fleet: Fleet
) -> None:
    await workers.ensure(0, fleet)
    worker = workers.start(str(workers.model_path), "/no/such/model")
    assert await worker.exit_status(within_s=90) == 2
    assert await fleet.workers() == []
    last = json.loads(worker.said().splitlines()[-1])
    assert last["level"] == "critical" and "'/no/such/model' is not a directory" in last["event"]
