"""A recurring schedule under fire: each of its turns is exactly one job, however often its scheduler dies.

Cron turns come by the minute at the shortest, so this one is due once a year, and its next turn is moved to now in SQL
again and again, as soon as the one before it was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from dataclasses import replace

from scheduler.schedules import turn_job_id
from tests.chaos.clients import Desk, ask, note_job_id
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.orders import OrderBook
from tests.chaos.stage import SHARD, Stage, seeded

YEARLY = "0 0 1 1 *"
_GAP_S = (0.2, 1.5)
_LOOK_S = 0.1


async def recur(stage: Stage, desk: Desk, seed: int, stop: asyncio.Event) -> None:
    """Turns until `stop`; returns when the last one was taken."""
    rng = seeded(seed, "recurring")
    order = replace(OrderBook("recurring", rng, []).scripted(words=(3, 30)), durable=True)
    wanted = {"cron": YEARLY, "body": order.body, "metadata": {"order": order.name}}
    status, made = await ask(desk, Entry(order), rng, "POST", "/v1/schedules", wanted)
    if status != 201:
        desk.ledger.blame(f"POST /v1/schedules answered {status} {made}")
        return
    while not stop.is_set():
        turn_ms = int(time.time() * 1000)
        if await asyncio.to_thread(_move_turn, stage, made["id"], turn_ms):
            entry = desk.ledger.open(order)
            note_job_id(desk.ledger, entry, turn_job_id(SHARD, made["id"], turn_ms))
            desk.ledger.count("turns of a schedule")
        await asyncio.sleep(rng.uniform(*_GAP_S))
    while _is_due(stage, made["id"]):  # noqa: ASYNC110 - another process's row gives no event
        await asyncio.sleep(_LOOK_S)


def check_turns(stage: Stage, ledger: Ledger) -> None:
    """No schedule made a job that is not a turn's; that each turn has its job is looked at with the other orders."""
    known = ledger.by_job()
    for job_id, schedule_id in stage.sql("select id, schedule_id from durable_jobs where schedule_id is not null"):
        if job_id not in known:
            ledger.blame(f"{schedule_id} made {job_id}, which is the job of no turn")


def _is_due(stage: Stage, schedule_id: str) -> bool:
    due = stage.sql("select 1 from schedules where id = ? and next_ms <= ?", schedule_id, int(time.time() * 1000))
    return bool(due)


def _move_turn(stage: Stage, schedule_id: str, turn_ms: int) -> bool:
    """False: the turn before is not taken yet."""
    with contextlib.closing(sqlite3.connect(stage.home / "spillway.db", timeout=10)) as database, database:
        move = "update schedules set next_ms = ? where id = ? and next_ms > ?"
        return database.execute(move, (turn_ms, schedule_id, turn_ms)).rowcount == 1
