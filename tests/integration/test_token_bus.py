"""The relay: whoever joins whenever, through broken connections and full buffers, sees every event exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from scheduler.errors import QueueUnavailable
from scheduler.job import ClaimedJob
from scheduler.queue.job_queue import JobQueue
from scheduler.queue.subscription import BUFFER_EVENTS, Subscription
from scheduler.queue.token_bus import TokenBus
from scheduler.settings import Settings
from scheduler.tokens import Delta, EventId, Failed, Finished, Started, TokenEvent
from tests.conftest import wait_until
from tests.queue_cases import WORKER, ask, claim, claim_one, delta, emit, enqueue, new_job, succeed

Event = tuple[EventId, TokenEvent]


@pytest.fixture
async def bus(settings: Settings) -> AsyncIterator[TokenBus]:
    bus = TokenBus(settings)
    await bus.start()
    yield bus
    await bus.close()


async def read_to_end(subscription: Subscription) -> list[Event]:
    events: list[Event] = []
    while not subscription.ended:
        async with asyncio.timeout(30):
            events += await subscription.read(5)
    return events


async def read_some(subscription: Subscription, count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        async with asyncio.timeout(30):
            events += await subscription.read(5)
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.choices[0].text for _, event in events if isinstance(event, Delta))


async def kill_pubsub(redis: Redis) -> int:
    return await ask(redis, "CLIENT", "KILL", "TYPE", "pubsub")


async def test_a_listener_before_the_job_sees_it_from_start_to_end(bus: TokenBus, queue: JobQueue) -> None:
    job_spec = new_job()
    async with bus.subscribe(job_spec.id) as subscription:
        assert await subscription.read(0.01) == []
        await queue.enqueue(job_spec)
        job = await claim_one(queue)
        for seq in range(1, 6):
            await emit(queue, job, seq, str(seq))
        await succeed(queue, job)
        events = await read_to_end(subscription)
    assert isinstance(events[0][1], Started) and isinstance(events[-1][1], Finished)
    assert text_of(events) == "12345"
    assert subscription.last_id is not None and subscription.last_id.is_terminal
    assert await subscription.read(1) == []


async def test_a_new_jobs_listener_does_not_wait_for_redis_to_confirm(
    bus: TokenBus, queue: JobQueue, redis: Redis
) -> None:
    await wait_until(lambda: bus.connects == 1)
    job_spec = new_job()
    await ask(redis, "CLIENT", "PAUSE", 1000)  # Redis answers nobody meanwhile
    confirmed = asyncio.create_task(_enter_and_leave(bus, new_job().id))
    await asyncio.sleep(0)  # it asks first
    async with bus.subscribe(job_spec.id, is_new=True) as subscription:
        assert not confirmed.done()
        await queue.enqueue(job_spec)
        await succeed(queue, await claim_one(queue))
        assert isinstance((await read_to_end(subscription))[-1][1], Finished)
    await confirmed


async def _enter_and_leave(bus: TokenBus, job_id: str) -> None:
    async with bus.subscribe(job_id):
        pass


@pytest.mark.parametrize("published", ["its begin", "all of it"])
async def test_what_was_published_before_redis_read_the_subscription_is_not_lost(
    bus: TokenBus, queue: JobQueue, published: str
) -> None:
    await wait_until(lambda: bus.connects == 1)
    job_id = await enqueue(queue)
    job = await claim_one(queue)
    if published == "all of it":
        await emit(queue, job, 1, "a")
        await succeed(queue, job)
    async with bus.subscribe(job_id, is_new=True) as subscription:
        if published == "its begin":
            assert await subscription.read(0.01) == []
            await emit(queue, job, 1, "a")
            await succeed(queue, job)
        events = await read_to_end(subscription)
    assert [at for at, _ in events][:2] == [EventId(1, 0), EventId(1, 1)] and isinstance(events[-1][1], Finished)


async def test_a_connection_that_breaks_before_it_confirms_loses_nothing(
    bus: TokenBus, queue: JobQueue, settings: Settings
) -> None:
    job_spec = new_job()
    async with bus.subscribe(new_job().id):
        with sync_redis.Redis.from_url(str(settings.redis_url)) as other:  # pyright: ignore[reportUnknownMemberType]
            assert other.client_kill_filter(_type="pubsub") == 1  # pyright: ignore[reportUnknownMemberType]
        async with bus.subscribe(job_spec.id, is_new=True) as subscription:  # the bus has had no turn to notice
            assert bus.connects == 1
            await queue.enqueue(job_spec)
            job = await claim_one(queue)
            await wait_until(lambda: bus.connects == 2)
            await emit(queue, job, 1, "a")
            await succeed(queue, job)
            events = await read_to_end(subscription)
    assert [type(event) for _, event in events] == [Started, Delta, Finished]


async def test_without_a_connection_a_new_jobs_listener_is_refused_too(settings: Settings) -> None:
    bus = TokenBus(settings)  # never started
    with pytest.raises(QueueUnavailable):
        await asyncio.wait_for(_enter_new(bus, new_job().id), 30)
    await bus.close()


async def _enter_new(bus: TokenBus, job_id: str) -> None:
    async with bus.subscribe(job_id, is_new=True):
        pass


async def test_ready_events_come_in_one_read(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with bus.subscribe(job.id) as subscription:
        await read_some(subscription, 1)
        for seq in range(1, 21):
            await emit(queue, job, seq, "x")
        await emit(queue, await one_more(queue), 1, "barrier")
        assert len(await read_some(subscription, 20)) == 20


async def one_more(queue: JobQueue) -> ClaimedJob:
    await enqueue(queue)
    return await claim_one(queue)


async def test_a_late_joiner_gets_what_it_missed_and_then_what_comes(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    for seq in range(1, 4):
        await emit(queue, job, seq, str(seq))
    async with bus.subscribe(job.id) as subscription:
        seen = await read_some(subscription, 4)
        await emit(queue, job, 4, "4")
        await succeed(queue, job)
        seen += await read_to_end(subscription)
    assert text_of(seen) == "1234"


async def test_a_listener_resumes_after_the_event_it_names(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    for seq in range(1, 6):
        await emit(queue, job, seq, str(seq))
    await succeed(queue, job)
    async with bus.subscribe(job.id, EventId(1, 3)) as subscription:
        events = await read_to_end(subscription)
    assert text_of(events) == "45"
    assert [at.seq for at, _ in events][:2] == [4, 5]


async def test_a_listener_after_the_end_reads_the_whole_log(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    for seq in range(1, 2500):
        await emit(queue, job, seq, "x")
    await succeed(queue, job)
    async with bus.subscribe(job.id) as subscription:
        assert len(text_of(await read_to_end(subscription))) == 2499


async def test_two_listeners_of_one_job_see_the_same(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with bus.subscribe(job.id) as one, bus.subscribe(job.id) as two:
        await emit(queue, job, 1, "a")
        await succeed(queue, job)
        assert await read_to_end(one) == await read_to_end(two)


async def test_a_takeover_shows_nothing_old_after_the_new_attempt(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    first = await claim_one(queue)
    async with bus.subscribe(first.id) as subscription:
        await emit(queue, first, 1, "a")
        events = await read_some(subscription, 2)
        await queue.expire_worker(WORKER)
        second = await claim_one(queue, "w:2")
        await emit(queue, first, 2, "zombie")
        await emit(queue, second, 1, "b", "w:2")
        await succeed(queue, second, "w:2")
        events += await read_to_end(subscription)
    ids = [at for at, _ in events]
    assert ids == sorted(set(ids)) and text_of(events) == "ab"


async def test_killed_pubsub_connections_leave_no_gap_and_no_repeat(
    bus: TokenBus, queue: JobQueue, redis: Redis
) -> None:
    for _ in range(20):
        await enqueue(queue)
    jobs = await claim(queue)
    steps = 60

    async def follow(job: ClaimedJob) -> str:
        async with bus.subscribe(job.id) as subscription:
            return text_of(await read_to_end(subscription))

    followers = [asyncio.create_task(follow(job)) for job in jobs]
    for seq in range(1, steps + 1):
        await queue.emit(WORKER, [(job.id, EventId(1, seq), payload_of(seq)) for job in jobs])
        if seq % 15 == 0:
            before = bus.connects

            async def killed() -> bool:
                return await kill_pubsub(redis) > 0

            await wait_until(killed)
            await wait_until(lambda before=before: bus.connects > before)
    for job in jobs:
        await succeed(queue, job)
    expected = "".join(f"[{seq}]" for seq in range(1, steps + 1))
    assert await asyncio.gather(*followers) == [expected] * len(jobs)


def payload_of(seq: int) -> bytes:
    return delta(f"[{seq}]")


async def test_events_published_while_the_connection_was_down_are_read_from_the_log(
    bus: TokenBus, queue: JobQueue, redis: Redis
) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with bus.subscribe(job.id) as subscription:
        seen = await read_some(subscription, 1)
        assert await kill_pubsub(redis) >= 1
        for seq in range(1, 4):  # the bus has had no turn to notice
            await emit(queue, job, seq, str(seq))
        seen += await read_some(subscription, 3)
        assert text_of(seen) == "123"
        await wait_until(lambda: bus.connects == 2)
        await emit(queue, job, 4, "4")
        assert text_of(await read_some(subscription, 1)) == "4"


async def test_an_event_whose_message_got_lost_is_found_by_silence(
    bus: TokenBus, queue: JobQueue, redis: Redis
) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with bus.subscribe(job.id) as subscription:
        await read_some(subscription, 1)
        await ask(redis, "XADD", queue.keys.log(job.id), "1-1", "p", payload_of(1))
        assert [str(at) for at, _ in await read_some(subscription, 1)] == ["1-1"]


async def test_a_slow_listener_overflows_alone_and_still_gets_everything(bus: TokenBus, queue: JobQueue) -> None:
    for _ in range(2):
        await enqueue(queue)
    slow_job, quick_job = await claim(queue)
    async with bus.subscribe(slow_job.id) as slow, bus.subscribe(quick_job.id) as quick:
        await read_some(slow, 1)
        await read_some(quick, 1)
        count = BUFFER_EVENTS + 50
        for seq in range(1, count + 1):
            await emit(queue, slow_job, seq, "s")
        await emit(queue, quick_job, 1, "q")
        assert text_of(await read_some(quick, 1)) == "q"
        assert slow.overflows >= 1
        await succeed(queue, slow_job)
        assert text_of(await read_to_end(slow)) == "s" * count


async def test_a_cancelled_job_ends_its_listener(bus: TokenBus, queue: JobQueue) -> None:
    job_id = await enqueue(queue)
    async with bus.subscribe(job_id) as subscription:
        await queue.cancel(job_id)
        ((_, event),) = await read_to_end(subscription)
    assert isinstance(event, Failed) and event.code == "cancelled"


async def test_a_listener_that_leaves_unsubscribes_and_may_come_back(
    bus: TokenBus, queue: JobQueue, redis: Redis
) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    for _ in range(3):
        async with bus.subscribe(job.id) as subscription:
            assert len(await read_some(subscription, 1)) == 1

    async def no_channels() -> bool:
        return await ask(redis, "PUBSUB", "CHANNELS") == []

    await wait_until(no_channels)


async def test_a_cancelled_reader_loses_nothing_for_the_next_read(bus: TokenBus, queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with bus.subscribe(job.id) as subscription:
        await read_some(subscription, 1)
        waiting = asyncio.create_task(subscription.read(30))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await emit(queue, job, 1, "a")
        assert text_of(await read_some(subscription, 1)) == "a"
