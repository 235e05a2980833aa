"""Producers of the durable side: jobs for now and for later, reprioritised, cancelled, and OpenAI batches."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from tests.chaos.async_clients import cancel, fetch_result, reprioritise, run_batch, submit
from tests.chaos.clients import Desk, watch_events
from tests.chaos.ledger import CANCELLABLE, SUCCEEDED, Expected, Order
from tests.chaos.orders import OrderBook

_PRIORITIES = ("high", "normal", "low", "batch")


async def asynchronous(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """A job by POST /v1/jobs: now or in some seconds; some are moved to another class, some cancelled."""
    doomed = rng.random() < 0.2
    order = replace(book.any(CANCELLABLE if doomed else SUCCEEDED), durable=True)
    entry = desk.ledger.open(order, keyed=True)
    wishes: dict[str, str | int] = {"priority": rng.choice(_PRIORITIES)}
    if rng.random() < 0.4:
        wishes["delay_ms"] = rng.randint(100, 4000)
    job = await submit(desk, entry, rng, **wishes)
    if job is None:
        return
    if rng.random() < 0.3:
        await reprioritise(desk, entry, rng, rng.choice(_PRIORITIES))
    if doomed:
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        await cancel(desk, entry, rng)
    await fetch_result(desk, entry, rng)
    if entry.text is not None and rng.random() < 0.3:
        await watch_events(desk, entry, rng)


async def batcher(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """A batch of some tens of lines, now and then cancelled half-way."""
    leave = rng.random() < 0.2
    name = book.name()
    batch = desk.ledger.open(Order(name, {}, Expected("", ())), keyed=True)
    may_end = CANCELLABLE if leave else SUCCEEDED
    made = [
        book.scripted(may_end=may_end, words=(3, 15), failures=rng.choice((0, 0, 0, 1)))
        for _ in range(rng.randint(5, 25))
    ]
    lines = [desk.ledger.open(replace(order, durable=True, line=True)) for order in made]
    await run_batch(desk, batch, lines, rng, leave=leave)
