"""The fleet registry: who serves what, in which order, and that the gone are forgotten."""

from __future__ import annotations

from redis.asyncio import Redis

from scheduler.model_card import ModelCard
from scheduler.queue.fleet import Fleet, WorkerView
from tests.queue_cases import ask

VIEW = WorkerView(id="mac-1:100", pid=100, engine_pid=101, host="mac-1", models=("demo",), max_rows=32, started_ms=1)
CARD = ModelCard(id="demo", context_tokens=2048)


async def test_a_published_worker_and_its_model_are_seen(fleet: Fleet) -> None:
    await fleet.publish(VIEW, CARD)
    assert await fleet.workers() == [VIEW]
    assert await fleet.models() == [CARD]


async def test_models_come_by_position_then_age(fleet: Fleet) -> None:
    cards = [
        ModelCard(id="org/third:x", context_tokens=1, position=1, created_s=9),
        ModelCard(id="first", context_tokens=1, position=0, created_s=5),
        ModelCard(id="second", context_tokens=1, position=1, created_s=3),
    ]
    for number, card in enumerate(cards):
        await fleet.publish(WorkerView(id=f"w{number}", pid=number), card)
    assert [card.id for card in await fleet.models()] == ["first", "second", "org/third:x"]


async def test_a_withdrawn_worker_is_gone_and_its_model_still_offered(fleet: Fleet) -> None:
    await fleet.publish(VIEW, CARD)
    await fleet.withdraw(VIEW.id)
    assert await fleet.workers() == []
    assert await fleet.models() == [CARD]


async def test_an_expired_entry_is_pruned_from_the_index(fleet: Fleet, redis: Redis) -> None:
    await fleet.publish(VIEW, CARD)
    await redis.delete("sw:{t}:w:mac-1%3A100")
    assert await fleet.workers() == []
    assert await ask(redis, "SCARD", "sw:{t}:fleet") == 0
    assert 0 < await redis.pttl("sw:{t}:card:demo") <= 60_000
