"""The producers: each orders in its own manner until told to stop, and stays with its orders until they have ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tests.chaos.async_clients import cancel
from tests.chaos.async_producers import asynchronous, batcher
from tests.chaos.clients import Desk, Manner, converse, pause, watch_events
from tests.chaos.ledger import CANCELLABLE, MORTAL, Entry, Order
from tests.chaos.orders import OrderBook
from tests.chaos.stage import seeded

AT_ONCE = 2
_GAP_S = (0.05, 0.5)
_POISON_EVERY = 20

Serve = Callable[[Desk, OrderBook, random.Random], Awaitable[None]]


async def produce(desk: Desk, name: str, serve: Serve, seed: int, demo: list[Order], stop: asyncio.Event) -> None:
    """Up to AT_ONCE orders at a time until `stop`; returns when all have ended."""
    rng = seeded(seed, name)
    book = OrderBook(name, rng, demo)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with room:
            await serve(desk, book, seeded(seed, name, number))

    async with asyncio.TaskGroup() as group:
        number = 0
        while not stop.is_set():
            number += 1
            group.create_task(one(number))
            await asyncio.sleep(rng.uniform(*_GAP_S))
            async with room:  # no backlog of our own
                pass


async def interactive(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """A keyed stream; beside every other one, a reader of the job's events that resumes where it was cut."""
    entry = desk.ledger.open(book.any(), keyed=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(converse(desk, entry, rng, Manner()))
        if rng.random() < 0.5:
            group.create_task(_watch_once_known(desk, entry, rng))


async def impatient(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """Leaves in mid-stream: without a key the job is cancelled, with one it goes on and is asked for again."""
    keyed = rng.random() < 0.5
    order = book.any() if keyed else book.any(CANCELLABLE)
    entry = desk.ledger.open(order, keyed=keyed)
    await converse(desk, entry, rng, Manner(leave_after=rng.randint(1, 30)))
    if keyed and not entry.answered:
        await pause(rng)
        await converse(desk, entry, rng, Manner())


async def slow(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """Reads more slowly than the words come."""
    entry = desk.ledger.open(book.scripted(words=(20, 60)), keyed=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(converse(desk, entry, rng, Manner(dawdle_s=0.05)))
        group.create_task(_watch_once_known(desk, entry, rng, dawdle_s=0.03))


async def classes(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """All priority classes, jobs that fail at first, and jobs with a deadline that may be too short."""
    priority = rng.choice(("high", "low", "batch", "batch"))
    headers = {"Spillway-Priority": priority}
    order = book.scripted(failures=rng.choice((0, 0, 1, 2)))
    if rng.random() < 0.2:
        headers["Spillway-Deadline-Ms"] = str(rng.randint(300, 3000))
        order = replace(order, may_end=MORTAL)
    entry = desk.ledger.open(replace(order, headers=headers), keyed=True)
    await converse(desk, entry, rng, Manner())


async def canceller(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """Cancels what it ordered, sooner or later, from any API."""
    entry = desk.ledger.open(book.any(CANCELLABLE), keyed=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(converse(desk, entry, rng, Manner()))
        group.create_task(_cancel_once_known(desk, entry, rng))


async def poisoner(desk: Desk, book: OrderBook, rng: random.Random) -> None:
    """Mostly harmless; now and then a job that kills every worker it meets."""
    poison = rng.randrange(_POISON_EVERY) == 0
    entry = desk.ledger.open(book.poison() if poison else book.scripted(), keyed=True)
    if poison:
        desk.ledger.count("poison jobs")
    await converse(desk, entry, rng, Manner())


PRODUCERS: dict[str, Serve] = {
    "interactive-1": interactive,
    "interactive-2": interactive,
    "impatient": impatient,
    "slow": slow,
    "classes": classes,
    "canceller": canceller,
    "poisoner": poisoner,
    "asynchronous": asynchronous,
    "batcher": batcher,
}


async def _watch_once_known(desk: Desk, entry: Entry, rng: random.Random, dawdle_s: float = 0.0) -> None:
    if await _known(entry):
        await watch_events(desk, entry, rng, dawdle_s)


async def _cancel_once_known(desk: Desk, entry: Entry, rng: random.Random) -> None:
    if not await _known(entry):
        return
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    await cancel(desk, entry, rng)


async def _known(entry: Entry) -> bool:
    """Waits for the job's id; False where the order ended without one."""
    await entry.known.wait()
    return entry.job_id is not None
