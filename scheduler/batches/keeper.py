"""Moves batches on: expands new ones, ends those that are cancelled or late, finalises those whose lines are over.

The control plane says which batches to look at (`settle` each second, `expand` by a kick); `run` does the work, without
arq's time limit and lease: one that dies in the midst is taken up again by whoever settles next. Several schedulers may
work on one batch: ids, guarded moves and equal files make that harmless.
"""

from __future__ import annotations

import asyncio
import time

from sqlalchemy.exc import SQLAlchemyError

from scheduler.batch import BatchRecord, BatchStatus, LineError
from scheduler.batches.ends import BatchEnds
from scheduler.batches.expansion import Expander
from scheduler.batches.results import Results, ResultWriter
from scheduler.db.batches import BatchStore
from scheduler.db.durable import DurableStore
from scheduler.db.durable_ends import CANCELLED, EXPIRED
from scheduler.db.files import FileStore
from scheduler.db.session import Database
from scheduler.dialect import Dialect
from scheduler.errors import CapacityError, SpillwayError
from scheduler.lifecycle import Lifecycle
from scheduler.queue.fleet import Fleet
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from scheduler.webhooks import Kick

AT_ONCE = 4  # a cancel need not wait behind an expansion
OPEN_BATCHES = 1000  # looked at in a turn, oldest first
CANCELS_PER_TURN = 1000


log = get_logger(__name__)


class BatchKeeper:
    """One per scheduler process: run `run`, and have `settle` called each second."""

    def __init__(
        self,
        batches: BatchStore,
        ends: BatchEnds,
        durable: DurableStore,
        lifecycle: Lifecycle,
        expander: Expander,
        writer: ResultWriter,
    ) -> None:
        self._batches = batches
        self._ends = ends
        self._durable = durable
        self._lifecycle = lifecycle
        self._expander = expander
        self._writer = writer
        self._wanted: asyncio.Queue[str] = asyncio.Queue(OPEN_BATCHES)
        self._taken: set[str] = set()
        self._told: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; what is in the midst then is left for the next start."""
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work(), name=f"batch-keeper-{n}") for n in range(AT_ONCE)]
            await stop.wait()
            for worker in workers:
                worker.cancel()

    async def settle(self) -> None:
        """Have every open batch looked at."""
        for batch_id in await self._batches.open_ids(OPEN_BATCHES):
            await self.expand(batch_id)

    async def expand(self, batch_id: str) -> None:
        """Have this batch looked at now; while it is being worked on already, nothing."""
        if batch_id not in self._taken and not self._wanted.full():
            self._taken.add(batch_id)
            self._wanted.put_nowait(batch_id)

    async def idle(self) -> None:
        """Until everything that was asked for has been looked at."""
        await self._wanted.join()

    async def _work(self) -> None:
        while True:
            batch_id = await self._wanted.get()
            try:
                await self._advance(batch_id)
                self._told.pop(batch_id, None)
            except Exception as error:  # of one batch; the others go on, and this one is tried again
                self._tell_once(batch_id, error)
            finally:
                self._taken.discard(batch_id)
                self._wanted.task_done()

    async def _advance(self, batch_id: str) -> None:
        batch = await self._batches.get(batch_id)
        if batch is None:
            return
        match batch.status:
            case BatchStatus.VALIDATING:
                await self._validate(batch)
            case BatchStatus.IN_PROGRESS:
                await self._watch(batch)
            case BatchStatus.FINALIZING:
                await self._finalise(batch)
            case BatchStatus.CANCELLING:
                await self._cancel(batch)
            case _:
                return

    async def _validate(self, batch: BatchRecord) -> None:
        if batch.expires_ms <= _now_ms():
            await self._batches.move(batch, BatchStatus.IN_PROGRESS, _now_ms())  # where its lines end, if it has any
            return
        try:
            await self._expander.expand(batch)
        except (CapacityError, SQLAlchemyError, OSError):
            raise  # it is tried again
        except Exception as error:
            log.exception("a batch cannot be expanded", batch=batch.id)
            message = f"The server failed on this file ({type(error).__name__}); its log says more."
            await self._expander.fail(batch, LineError("internal_error", message))

    async def _watch(self, batch: BatchRecord) -> None:
        if batch.expires_ms <= _now_ms():  # what Redis has ends by the lines' deadline, which is the same moment
            await self._durable.end_held_lines(batch.id, EXPIRED.state, EXPIRED.code, EXPIRED.message)
        if not await self._batches.has_unfinished(batch.id):
            await self._batches.move(batch, BatchStatus.FINALIZING, _now_ms())
            await self._advance(batch.id)

    async def _cancel(self, batch: BatchRecord) -> None:
        await self._durable.end_held_lines(batch.id, CANCELLED.state, CANCELLED.code, CANCELLED.message)
        for job_id in await self._durable.ids_sent(batch.id, CANCELS_PER_TURN):
            await self._lifecycle.cancel(job_id)
        if not await self._batches.has_unfinished(batch.id):
            await self._finalise(batch)

    async def _finalise(self, batch: BatchRecord) -> None:
        """Results on disk first, then everything that says so in one transaction."""
        began_ms = batch.finalizing_ms if batch.cancelling_ms is None else batch.cancelling_ms
        assert began_ms is not None, "the move to this state writes it"
        results = await self._writer.write(batch, began_ms)
        end, counts, usage = _end_of(batch, results), results.counts, results.usage
        if await self._ends.end(
            batch,
            end,
            results.records,
            output_file_id=None if results.output.record is None else results.output.record.id,
            error_file_id=None if results.errors.record is None else results.errors.record.id,
            completed=counts.completed,
            failed=counts.failed,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ):
            log.info("batch ended", batch=batch.id, status=end.value, completed=counts.completed, failed=counts.failed)

    def _tell_once(self, batch_id: str, error: Exception) -> None:
        text = str(error).partition("\n")[0] or type(error).__name__
        if self._told.get(batch_id) != text:
            trace = None if isinstance(error, _EXPECTED) else error
            log.warning("a batch does not get on; trying on", batch=batch_id, error=text, exc_info=trace)
        self._told[batch_id] = text


def make_keeper(
    database: Database,
    files: FileStore,
    lifecycle: Lifecycle,
    fleet: Fleet,
    dialect: Dialect,
    kick: Kick,
    settings: Settings,
) -> BatchKeeper:
    """A keeper on these connections; `kick` has the webhooks of an end sent at once."""
    batches, durable = BatchStore(database), DurableStore(database)
    ends = BatchEnds(batches, kick)
    expander = Expander(batches, ends, files, durable, fleet.models, dialect, settings)
    return BatchKeeper(batches, ends, durable, lifecycle, expander, ResultWriter(files, durable, dialect))


_EXPECTED = (SpillwayError, SQLAlchemyError, OSError)


def _end_of(batch: BatchRecord, results: Results) -> BatchStatus:
    if batch.cancelling_ms is not None:
        return BatchStatus.CANCELLED
    ended_late = results.any_expired or results.counts.completed + results.counts.failed < max(1, batch.counts.total)
    return BatchStatus.EXPIRED if ended_late else BatchStatus.COMPLETED


def _now_ms() -> int:
    return int(time.time() * 1000)
