"""Batches in SQL: what answers an Idempotency-Key and how many a tenant may have open, however many ask at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from scheduler.batch import BatchRecord, BatchStatus, NewBatch
from scheduler.db.batches import BatchStore
from scheduler.db.session import Database
from scheduler.errors import IdempotencyMismatch, TooManyBatches

NOW_MS = 1_700_000_000_000
NEW = NewBatch("ann", "/v1/chat/completions", "file-1", "24h", NOW_MS + 1, idempotency_key="k", body_digest="d")


@pytest.fixture
def store(database: Database) -> BatchStore:
    return BatchStore(database)


async def move(store: BatchStore, batch: BatchRecord, *steps: BatchStatus) -> None:
    for to in steps:
        now = await store.get(batch.id)
        assert now is not None and await store.move(now, to, NOW_MS)


async def test_a_key_is_answered_by_its_first_batch(store: BatchStore) -> None:
    first = await store.create(NEW, NOW_MS)
    assert await store.create(NEW, NOW_MS + 5) == first
    assert await store.answering("ann", "k", "d") == first
    assert (await store.create(replace(NEW, tenant="bob"), NOW_MS)).id != first.id
    assert await store.answering("bob", "other", "d") is None


async def test_batches_without_a_key_are_each_their_own(store: BatchStore) -> None:
    plain = replace(NEW, idempotency_key=None, body_digest="")
    assert (await store.create(plain, NOW_MS)).id != (await store.create(plain, NOW_MS)).id


async def test_a_key_with_another_body_creates_nothing(store: BatchStore) -> None:
    first = await store.create(NEW, NOW_MS)
    with pytest.raises(IdempotencyMismatch, match=first.id):
        await store.create(replace(NEW, body_digest="other"), NOW_MS)
    with pytest.raises(IdempotencyMismatch, match=first.id):
        await store.answering("ann", "k", "other")
    assert [batch.id for batch in await store.list(None, None, 10)] == [first.id]


@pytest.mark.parametrize(
    "steps",
    [
        [BatchStatus.FAILED],
        [BatchStatus.CANCELLING, BatchStatus.CANCELLED],
        [BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.EXPIRED],
    ],
)
async def test_the_key_of_a_batch_without_success_tries_anew(store: BatchStore, steps: list[BatchStatus]) -> None:
    first = await store.create(NEW, NOW_MS)
    await move(store, first, *steps)
    assert await store.answering("ann", "k", "d") is None
    with pytest.raises(IdempotencyMismatch):
        await store.create(replace(NEW, body_digest="other"), NOW_MS)
    again = await store.create(NEW, NOW_MS)
    assert again.id != first.id
    await move(store, again, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.COMPLETED)
    assert (await store.create(NEW, NOW_MS)).id == again.id


async def test_one_key_at_once_makes_one_batch(store: BatchStore) -> None:
    made = await asyncio.gather(*(store.create(NEW, NOW_MS + n) for n in range(8)))
    assert len({batch.id for batch in made}) == 1
    assert len(await store.list(None, None, 10)) == 1


async def test_a_tenant_has_at_most_so_many_open_batches(store: BatchStore) -> None:
    plain = replace(NEW, idempotency_key=None, body_digest="")
    first, keyed = await store.create(plain, NOW_MS, 2), await store.create(NEW, NOW_MS, 2)
    with pytest.raises(TooManyBatches):
        await store.create(plain, NOW_MS, 2)
    assert len(await store.list("ann", None, 10)) == 2
    assert await store.create(NEW, NOW_MS, 2) == keyed
    await store.create(replace(plain, tenant="bob"), NOW_MS, 2)
    await move(store, first, BatchStatus.CANCELLING, BatchStatus.CANCELLED)
    await store.create(plain, NOW_MS, 2)


async def test_the_last_place_is_given_once(store: BatchStore) -> None:
    plain = replace(NEW, idempotency_key=None, body_digest="")
    made = await asyncio.gather(*(store.create(plain, NOW_MS, 3) for _ in range(8)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in made) == ["BatchRecord"] * 3 + ["TooManyBatches"] * 5
    assert len(await store.list(None, None, 10)) == 3
