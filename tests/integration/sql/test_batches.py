"""Batches cut off at any commit and begun again: each line is there once, each result file is whole. Bounded memory."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlmodel import col, select

from api.dialect import HttpDialect
from scheduler.batch import BatchRecord, BatchStatus, NewBatch
from scheduler.batches.ends import BatchEnds
from scheduler.batches.expansion import STEP_LINES, Expander
from scheduler.batches.keeper import BatchKeeper
from scheduler.batches.results import ResultWriter
from scheduler.db.batches import BatchStore
from scheduler.db.durable import DurableStore
from scheduler.db.durable_outcomes import DurableEnd, DurableOutcomes
from scheduler.db.files import STRAY_AGE_S, FileRecord, FileStore, new_file_id
from scheduler.db.models import DurableJob
from scheduler.db.session import Database
from scheduler.db.vault import Vault
from scheduler.db.webhook_deliveries import DeliveryStore
from scheduler.db.webhook_endpoints import WebhookEndpoints
from scheduler.errors import NoModelYet
from scheduler.job import JobState, JobView, Priority
from scheduler.lifecycle import Lifecycle
from scheduler.model_card import ModelCard
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.request import Usage, decode_request
from scheduler.settings import Settings
from scheduler.webhooks import DELIVER

CHAT = "/v1/chat/completions"
NOW_MS = int(time.time() * 1000)
LATER_MS = 4_000_000_000_000
MB = 2**20
MAX_LINES = 2 * STEP_LINES + 20
CARDS = [ModelCard(id="demo", context_tokens=512, created_s=1)]


@dataclass
class Parts:
    """The batch machinery on one database."""

    database: Database
    files: FileStore
    batches: BatchStore
    durable: DurableStore
    expander: Expander
    keeper: BatchKeeper
    cards: list[ModelCard]  # what is served
    kicked: list[tuple[str, ...]]

    async def batch(self, lines: int, text: str = "hi") -> BatchRecord:
        """A new batch of this many lines."""
        file = FileRecord(new_file_id(NOW_MS), "default", "in.jsonl", "batch", 0, NOW_MS)
        async with self.files.drafting() as draft:
            for number in range(1, lines + 1):
                await draft.write(_line(number, text))
            await self.files.save(draft, file)
        return await self.batches.create(NewBatch("default", CHAT, file.id, "24h", LATER_MS), NOW_MS)

    async def now(self, batch: BatchRecord) -> BatchRecord:
        found = await self.batches.get(batch.id)
        assert found is not None
        return found

    async def rows(self, batch: BatchRecord) -> list[tuple[int | None, str | None, int]]:
        """Line, custom_id and seed of each."""
        of_batch = select(DurableJob).where(DurableJob.batch_id == batch.id).order_by(col(DurableJob.id))
        async with self.database.session() as session:
            found = list(await session.exec(of_batch))
        return [(row.line, row.custom_id, decode_request(row.request).sampling.seed) for row in found]

    async def end_lines(self, batch: BatchRecord, failed: int = 0) -> None:
        """As the recorder does; the first `failed` lines fail."""
        jobs = await self.durable.list(batch_id=batch.id, limit=10_000)
        await DurableOutcomes(self.database).write([_end(job.id, (job.line or 0) <= failed) for job in jobs])


@pytest.fixture
async def parts(database: Database, migrated: Settings, redis_url: str) -> AsyncIterator[Parts]:
    files, batches, durable = FileStore(database, migrated), BatchStore(database), DurableStore(database)
    dialect = HttpDialect()

    cards, kicked = [*CARDS], []

    async def models() -> list[ModelCard]:
        return cards

    settings = Settings(home=migrated.home, redis_url=redis_url)

    async def kick(name: str, *args: str) -> None:
        kicked.append((name, *args))

    ends = BatchEnds(batches, kick)
    expander = Expander(batches, ends, files, durable, models, dialect, settings)
    redis = connect(settings, "command")
    lifecycle = Lifecycle(JobQueue(redis, settings), Fleet(redis, settings), settings)
    keeper = BatchKeeper(batches, ends, durable, lifecycle, expander, ResultWriter(files, durable, dialect))
    yield Parts(database, files, batches, durable, expander, keeper, cards, kicked)
    await redis.aclose()


def _line(number: int, text: str) -> bytes:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}).encode() + b"\n"


def _end(job_id: str, failed: bool) -> DurableEnd:
    state = JobState.FAILED if failed else JobState.SUCCEEDED
    code = "engine_failure" if failed else None
    job = JobView(
        job_id, state, "demo", "demo", Priority.BATCH, "default", 1, NOW_MS, finished_ms=NOW_MS, error_code=code,
        error_message=code, usage=Usage(prompt_tokens=2, completion_tokens=3), durable=True,
    )  # fmt: skip
    return DurableEnd(job, answer=None if failed else b'{"object":"chat.completion"}')


@contextmanager
def failing_commit(number: int) -> Iterator[None]:
    """The database is gone at the commit of this number, counted from now."""
    left = [number]

    def fail(_session: Session) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OperationalError("COMMIT", {}, OSError("the database is gone"))

    event.listen(Session, "before_commit", fail)
    try:
        yield
    finally:
        event.remove(Session, "before_commit", fail)
    assert left[0] <= 0, "the failure never came"


async def test_an_expansion_cut_off_at_any_commit_goes_on_without_doubles(parts: Parts) -> None:
    lines = 2 * STEP_LINES + 7
    commits = 5  # the total, three steps of lines, the move
    for number in range(1, commits + 1):
        batch = await parts.batch(lines)
        with failing_commit(number), pytest.raises(OperationalError):
            await parts.expander.expand(batch)
        before = await parts.rows(batch)
        await parts.expander.expand(await parts.now(batch))
        after = await parts.rows(batch)
        assert [row[0] for row in after] == list(range(1, lines + 1))
        assert after[: len(before)] == before, "what an attempt may have drawn already was drawn anew"
        now = await parts.now(batch)
        assert (now.status, now.counts.total, now.model) == (BatchStatus.IN_PROGRESS, lines, "demo")


async def test_two_schedulers_expand_one_batch_into_one_set_of_lines(parts: Parts) -> None:
    batch = await parts.batch(STEP_LINES + 3)
    await asyncio.gather(*(parts.expander.expand(batch) for _ in range(2)))
    assert [row[0] for row in await parts.rows(batch)] == list(range(1, STEP_LINES + 4))


async def test_a_cancel_in_mid_expansion_leaves_no_line_behind_its_back(parts: Parts) -> None:
    batch = await parts.batch(3 * STEP_LINES)
    with failing_commit(3), pytest.raises(OperationalError):
        await parts.expander.expand(batch)
    assert await parts.batches.move(await parts.now(batch), BatchStatus.CANCELLING, NOW_MS)
    await parts.expander.expand(batch)  # by one that read it before the cancel
    assert len(await parts.rows(batch)) == STEP_LINES
    await advance(parts, batch)
    now = await parts.now(batch)
    assert (now.status, now.counts.completed, now.counts.failed) == (BatchStatus.CANCELLED, 0, STEP_LINES)


async def advance(parts: Parts, batch: BatchRecord) -> None:
    """One look of the keeper's at this batch."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(parts.keeper.run(stop))
        await parts.keeper.expand(batch.id)
        await parts.keeper.idle()
        stop.set()


async def test_finalising_cut_off_at_any_commit_ends_with_whole_files_and_nothing_beside_them(parts: Parts) -> None:
    lines, failed = 250, 30
    for number in (1, 2):  # the move to finalizing, and the end
        batch = await parts.batch(lines)
        await parts.expander.expand(batch)
        await parts.end_lines(batch, failed)
        with failing_commit(number):
            await advance(parts, batch)
        assert not (await parts.now(batch)).status.is_terminal
        await advance(parts, batch)
        now = await parts.now(batch)
        assert (now.status, now.counts.completed, now.counts.failed) == (BatchStatus.COMPLETED, lines - failed, failed)
        assert now.usage == Usage(prompt_tokens=2 * lines, completion_tokens=3 * lines)
        assert now.output_file_id is not None and now.error_file_id is not None
        done = [json.loads(text) for text in parts.files.path(now.output_file_id).read_text().splitlines()]
        cut = [json.loads(text) for text in parts.files.path(now.error_file_id).read_text().splitlines()]
        assert [entry["custom_id"] for entry in done] == [f"c{n}" for n in range(failed + 1, lines + 1)]
        assert [entry["custom_id"] for entry in cut] == [f"c{n}" for n in range(1, failed + 1)]
        record = await parts.files.get(now.output_file_id, NOW_MS)
        assert record is not None and record.bytes == parts.files.path(record.id).stat().st_size
        here = {path.name for path in parts.files.path(record.id).parent.iterdir()}
        known = {file.id for file in await parts.files.list(None, NOW_MS)}
        assert here == known


@pytest.mark.parametrize("lines", [2000, pytest.param(50_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
async def test_expansion_takes_bounded_memory(parts: Parts, lines: int) -> None:
    """Lines of 2 KB: the file is far larger than what may be held of it."""
    batch = await parts.batch(lines, secrets.token_hex(1000))
    process = psutil.Process()
    before = process.memory_info().rss
    highest = before
    expansion = asyncio.ensure_future(parts.expander.expand(batch))
    while not expansion.done():
        highest = max(highest, process.memory_info().rss)
        await asyncio.wait([expansion], timeout=0.02)
    await expansion
    assert highest - before < 80 * MB
    assert (await parts.now(batch)).counts.total == lines
    assert await parts.durable.counts(batch.id) == {JobState.QUEUED: lines}


async def test_one_line_too_many_fails_the_batch(parts: Parts) -> None:
    parts.expander.max_lines = MAX_LINES
    batch = await parts.batch(MAX_LINES + 1)
    await parts.expander.expand(batch)
    now = await parts.now(batch)
    assert now.status is BatchStatus.FAILED and [error.code for error in now.errors] == ["too_many_requests"]
    assert await parts.rows(batch) == []


async def test_while_no_worker_serves_anything_the_file_is_not_read(parts: Parts) -> None:
    batch = await parts.batch(3)
    parts.files.path(batch.input_file_id).write_bytes(b"broken")  # whoever reads it fails the batch
    served = parts.cards.pop()
    with pytest.raises(NoModelYet):
        await parts.expander.expand(batch)
    assert (await parts.now(batch)).status is BatchStatus.VALIDATING
    parts.cards.append(served)
    await parts.expander.expand(batch)
    assert (await parts.now(batch)).status is BatchStatus.FAILED


async def test_a_file_that_is_deleted_in_mid_expansion_fails_the_batch_and_no_line_stays_behind(parts: Parts) -> None:
    batch = await parts.batch(3 * STEP_LINES)
    with failing_commit(3), pytest.raises(OperationalError):
        await parts.expander.expand(batch)
    await parts.files.delete(batch.input_file_id)
    await parts.expander.expand(await parts.now(batch))
    now = await parts.now(batch)
    assert now.status is BatchStatus.FAILED and [error.code for error in now.errors] == ["file_not_found"]
    assert await parts.durable.counts(batch.id) == {JobState.CANCELLED: STEP_LINES}


async def test_a_file_whose_bytes_are_gone_fails_the_batch(parts: Parts) -> None:
    batch = await parts.batch(3)
    parts.files.path(batch.input_file_id).unlink()
    await parts.expander.expand(batch)
    assert [error.code for error in (await parts.now(batch)).errors] == ["file_not_found"]


async def test_the_webhooks_of_an_end_are_kicked(parts: Parts, migrated: Settings) -> None:
    endpoints = WebhookEndpoints(parts.database, Vault(migrated))
    await endpoints.create("default", "https://example.com", "", ["batch.completed", "batch.failed"])
    good, bad = await parts.batch(1), await parts.batch(1)
    await parts.expander.expand(good)
    await parts.end_lines(good)
    await advance(parts, good)
    parts.files.path(bad.input_file_id).write_bytes(b"broken")
    await parts.expander.expand(bad)
    (endpoint,) = await endpoints.list("default")
    told = {view.type: view.id for view in await DeliveryStore(parts.database).list(endpoint.id)}
    assert parts.kicked == [(DELIVER, told["batch.completed"]), (DELIVER, told["batch.failed"])]


async def test_a_file_whose_commit_was_cut_off_keeps_its_bytes(parts: Parts) -> None:
    """Nobody knows whether such a commit has come to pass; bytes that no row names are swept."""
    file = FileRecord(new_file_id(NOW_MS), "default", "in.jsonl", "batch", 0, NOW_MS)
    async with parts.files.drafting() as draft:
        await draft.write(b"x")
        with failing_commit(1), pytest.raises(OperationalError):
            await parts.files.save(draft, file)
    assert parts.files.path(file.id).read_bytes() == b"x"
    later_ms = int(time.time() * 1000) + (STRAY_AGE_S + 60) * 1000
    assert await parts.files.sweep(later_ms) == 1
    assert not parts.files.path(file.id).exists()
